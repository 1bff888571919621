"""What a compiled program sends between devices, read off its HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}  # else 4

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|branch_computations|true_computation|false_computation)=\{?([%\w.\-, ]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def collective_bytes(text: str, devices: int) -> tuple[dict[str, float], int]:
  """({kind: bytes that one device receives in one run}, loops of unknown length), as rings move them.

  A loop's body counts as often as the loop is known to turn (by the compiler's note, or by the one number that its
  counter, from 0, is compared with), and once where that is not known. Of r bytes of result
  in a group of n devices: all-gather and all-to-all r (n-1)/n, all-reduce twice that, reduce-scatter r (n-1).
  """
  computations, entry = _computations(text)
  times, unknown = {}, 0

  def count(name: str, factor: int) -> None:
    nonlocal unknown
    times[name] = times.get(name, 0) + factor
    for line in computations[name]:
      turns = _turns(line, computations)
      unknown += turns == 0
      for called in _CALLED.findall(line):
        for inner in re.findall(r"[\w.\-]+", called):
          if inner in computations:
            count(inner, factor * (turns or 1))

  count(entry, 1)
  received = dict.fromkeys(KINDS, 0.0)
  for name, factor in times.items():
    for line in computations[name]:
      if found := _COLLECTIVE.search(line):
        received[found[2]] += factor * _received(found[2], _bytes(found[1], bool(found[3])), _group(line, devices))
  return {kind: total for kind, total in received.items() if total}, unknown


def _turns(line: str, computations: Mapping[str, list[str]]) -> int | None:
  """How often the loop on this line turns, 0 where that is not known; None for a line without a loop."""
  loop = _CONDITION.search(line)
  if loop is None:
    return None
  if noted := _TRIPS.search(line):
    return int(noted[1])
  condition = "\n".join(computations.get(loop[1], ()))
  limits = _LIMIT.findall(condition)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 0


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
  out, entry, name = {}, "", None
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      name = start[2]
      out[name] = []
      entry = name if start[1] else entry
    elif name is not None:
      out[name].append(line)
  return out, entry


def _bytes(shapes: str, asynchronous: bool) -> int:
  """Bytes of a result; an asynchronous start returns its operands before its results, and maybe counters behind."""
  arrays = _ARRAY.findall(shapes)
  if asynchronous:
    arrays = [array for array in arrays if array[1]]
    arrays = arrays[len(arrays) // 2 :]
  return sum(WIDTH.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in arrays)


def _group(line: str, devices: int) -> int:
  """Devices that take part in one instance of a collective."""
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
    return int(iota[2])
  if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  return len(listed[1].split(",")) if listed else devices


def _received(kind: str, result: int, n: int) -> float:
  share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
  return result * share.get(kind, (n - 1) / n)
