"""The next batches, built and put on the devices while the step before them runs.

A batch is a function of its source and its step, so it does not matter when or in which thread it is made: the data
position stays the step.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetch:
  """`make(source, step)` so many steps `ahead`, each in a thread, up to step `end`; whatever it raises is raised by
  `take`. One is enough for texts in memory; those that are tokenised on the way keep several cores busy."""

  def __init__(self, make: Callable[[Any, int], Any], end: int, ahead: int = 1):
    self._make, self._end, self._ahead = make, end, ahead
    self._pool = ThreadPoolExecutor(ahead, "batches")
    self._source: Any = None
    self._begun: collections.deque[tuple[int, Future]] = collections.deque()

  def take(self, source: Any, step: int) -> Any:
    """The batch of `step`, which was begun before if it was the next one of the same `source`; begins those after."""
    if source is not self._source or not self._begun or self._begun[0][0] != step:
      self._drop()
      self._source = source
      self._begin(step)
    _, taken = self._begun.popleft()
    found = taken.result()
    while len(self._begun) < self._ahead and (following := step + 1 + len(self._begun)) < self._end:
      self._begin(following)
    return found

  def _begin(self, step: int) -> None:
    self._begun.append((step, self._pool.submit(self._make, self._source, step)))

  def _drop(self) -> None:
    while self._begun:
      self._begun.popleft()[1].cancel()

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)
