"""Where the wall time of a run goes: into steps, or into compiling, waiting for data, saving, looking, starting.

Every record of metrics.jsonl has the `seconds` of its step, and under `spent` what else passed since the record before.
What follows the last step is in none, and steps that a kill made a run do twice are in it once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence


class Stopwatch:
  """Splits the time between two records."""

  def __init__(self):
    self._since, self._spent = time.perf_counter(), {}

  @contextlib.contextmanager
  def on(self, what: str) -> Iterator[None]:
    """What happens within is `what`, and not a step."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - began

  def lap(self) -> tuple[float, dict[str, float]]:
    """(seconds in steps, {what else: seconds}) since the last lap."""
    now, spent = time.perf_counter(), self._spent
    seconds, self._since, self._spent = now - self._since - sum(spent.values()), now, {}
    return max(seconds, 0.0), spent


def summary(records: Sequence[Mapping]) -> dict:
  """{"seconds": all, "tokens", "goodput": share of it in steps, "spent": {what: seconds}} of a run's records."""
  spent: dict[str, float] = {}
  for record in records:
    for what, seconds in record.get("spent", {}).items():
      spent[what] = spent.get(what, 0.0) + seconds
  steps = sum(record["seconds"] for record in records)
  wall = steps + sum(spent.values())
  return {"seconds": wall, "tokens": sum(record["tokens"] for record in records), "goodput": steps / max(wall, 1e-9),
          "spent": spent}  # fmt: skip


def describe(found: Mapping) -> str:
  """One line of a `summary`, for a person."""
  share = lambda seconds: f"{100 * seconds / max(found['seconds'], 1e-9):.1f} %"
  rest = ", ".join(f"{what} {share(seconds)}" for what, seconds in sorted(found["spent"].items(), key=lambda x: -x[1]))
  rate = found["tokens"] / max(found["seconds"] * found["goodput"], 1e-9)
  return f"{rate:,.0f} tokens/s in steps, goodput {100 * found['goodput']:.1f} % ({rest or 'nothing else'})"
