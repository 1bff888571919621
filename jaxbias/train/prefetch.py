"""The next batch, built and put on the devices while the step before it runs.

A batch is a function of its source and its step, so it does not matter when or in which thread it is made: the data
position stays the step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetch:
  """`make(source, step)` one step ahead, up to step `end`; whatever it raises is raised by `take`."""

  def __init__(self, make: Callable[[Any, int], Any], end: int):
    self._make, self._end = make, end
    self._pool = ThreadPoolExecutor(1, "batches")
    self._next: tuple[Any, int, Future] | None = None

  def take(self, source: Any, step: int) -> Any:
    """The batch of `step`, which was begun before if it was the next one of the same `source`; begins the next."""
    if self._next is None or self._next[0] is not source or self._next[1] != step:
      self._begin(source, step)
    found = self._next[2].result()
    self._next = None
    if step + 1 < self._end:
      self._begin(source, step + 1)
    return found

  def _begin(self, source: Any, step: int) -> None:
    self._next = source, step, self._pool.submit(self._make, source, step)

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)
