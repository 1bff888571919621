"""What is running and how long is left: bars on a terminal, one line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

QUIET_SECONDS = 15.0  # between lines when there is no terminal


class _Bars(Progress):
  """Bars with a line below them, so that a long note takes no room from the time that is left."""

  note = ""

  def get_renderables(self) -> Iterable[RenderableType]:
    yield from super().get_renderables()
    yield Text(f"  {self.note}", style="dim", no_wrap=True, overflow="ellipsis")


class Tracker:
  """Two bars: the phase in hand, counted in its own units, and the whole job, counted in tokens read or trained on.

  Token counts (a trained token as three read ones) make the time left honest across phases of different kinds.
  `quiet` shows nothing: for all processes but the first. `check` is called between units, where it may raise.
  """

  def __init__(
    self, job: str, total_cost: float, quiet: bool = False, check: Callable[[], None] = lambda: None
  ):  # fmt: skip
    self._check = check
    self._console = Console(stderr=True, soft_wrap=True, quiet=quiet)
    self._live = self._console.is_terminal
    self._bars = _Bars(
      TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
      TextColumn("left"), TimeRemainingColumn(), console=self._console, disable=not self._live,
      speed_estimate_period=120,
    )  # fmt: skip
    self._total_cost, self._done_cost = total_cost, 0.0
    self._whole = self._bars.add_task(f"[bold]{job}", total=100)
    self._phase = self._bars.add_task("", total=1, visible=False)
    self._name, self._units, self._done, self._cost_each = "", 0, 0, 0.0
    self._began = self._spoke = time.monotonic()

  def __enter__(self) -> Tracker:
    self._bars.start()
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
    self._bars.stop()

  def phase(self, name: str, units: int, cost: float) -> None:
    """Begin a phase of `units` steps or texts that costs `cost` tokens in all."""
    self._name, self._units, self._done, self._cost_each = name, units, 0, cost / max(units, 1)
    self._bars.note = ""
    self._bars.reset(self._phase, total=units, description=f"  {name}", visible=True)
    self._say(name, force=True)

  def advance(self, units: int, note: str = "") -> None:
    """`units` more of the phase are done; `note` (a loss, a score) is shown beside its name."""
    self.reach(self._done + units, note)
    self._check()

  def reach(self, done: int, note: str = "") -> None:
    """`done` units of the phase are done, whether in this process or in one before it."""
    self._done_cost += (done - self._done) * self._cost_each
    self._done = done
    self._bars.note = note
    self._bars.update(self._phase, completed=self._done)
    self._bars.update(self._whole, completed=round(100 * self._done_cost / self._total_cost))
    self._say(f"{self._name}: {self._done}/{self._units}  {note}")

  def skip(self, cost: float) -> None:
    """Work of the plan that an earlier run of the same command has done already."""
    self._total_cost -= cost

  def say(self, line: str) -> None:
    """A line that stays."""
    self._console.print(line, highlight=False)

  def _say(self, line: str, force: bool = False) -> None:
    if self._live or (not force and time.monotonic() - self._spoke < QUIET_SECONDS):
      return
    self._spoke = time.monotonic()
    left = ""
    if self._done_cost > 0:
      seconds = (self._spoke - self._began) * (self._total_cost / self._done_cost - 1)
      left = f"  (about {seconds / 60:.0f} min left)" if seconds > 90 else f"  (about {max(seconds, 0):.0f} s left)"
    self._console.print(line.rstrip() + left, highlight=False)
