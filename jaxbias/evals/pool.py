"""Many texts to read, each of them once."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxbias.data.pipeline import Segment


class Pool:
  """Segments by their inputs; a target that is asked again is answered from the first time."""

  def __init__(self):
    self._inputs: list[Segment] = []
    self._pairs: list[list[tuple[int, int]]] = []  # (position, target) of each segment
    self._known: dict[bytes, dict[tuple[int, int], tuple[int, int]]] = {}  # inputs -> pair -> place
    self._last: dict[bytes, int] = {}

  def add(self, segment: Segment) -> np.ndarray:
    """Where the segment's targets are: [N, 2]."""
    key = _key(segment)
    known = self._known.setdefault(key, {})
    pairs = list(zip(segment.score_at.tolist(), segment.target.tolist(), strict=True))
    new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    number = self._last.get(key)
    # No more targets than tokens: a segment that collected thousands would make every packed row as wide.
    if number is None or new and len(self._pairs[number]) + len(new) > max(len(segment.tokens), len(new)):
      number = self._last[key] = len(self._inputs)
      self._inputs.append(segment)
      self._pairs.append([])
    for pair in new:
      known[pair] = (number, len(self._pairs[number]))
      self._pairs[number].append(pair)
    return np.array([known[pair] for pair in pairs], np.int64).reshape(-1, 2)

  def number(self, segment: Segment) -> int:
    """Of a segment that is asked as a whole."""
    self.add(segment)
    return self._last[_key(segment)]

  def segments(self) -> tuple[Segment, ...]:
    columns = (np.array(pairs, np.int32).reshape(-1, 2).T for pairs in self._pairs)
    return tuple(dataclasses.replace(inputs, score_at=at, target=target)
                 for inputs, (at, target) in zip(self._inputs, columns, strict=True))


def _key(segment: Segment) -> bytes:
  return b"|".join(x.tobytes() for x in (segment.tokens, segment.position, segment.branch))
