"""A window of steps under jax.profiler, for XProf, TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxbias.errors import UserError
from jaxbias.types import TrainState


def window(given: str) -> tuple[int, int]:
  """(first, last) step of `FROM:TO`, counted from 1 as in metrics.jsonl."""
  first, _, last = given.partition(":")
  if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise UserError(f"--profile={given} has to be FROM:TO, the first and the last step to record, such as 11:15.")
  return int(first), int(last)


class Profile:
  """Traces the steps of `window` into `folder`; without a window nothing. A run that goes on within it joins there."""

  def __init__(self, folder: Path, window: tuple[int, int] | None):
    self._folder, self._window, self._on = folder, window, False

  def before(self, step: int, state: TrainState) -> None:
    """step: the one that begins now. `state` is waited for, so that the trace holds no earlier step."""
    if self._window and not self._on and self._window[0] <= step <= self._window[1]:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def after(self, step: int, state: TrainState) -> None:
    if self._on and step == self._window[1]:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
