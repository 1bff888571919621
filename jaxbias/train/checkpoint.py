"""Orbax: what a run goes on from, saved together and in the background; what is half written or damaged never counts.

A checkpoint is the state, the data position, the controller's phase, the config, the names of the random streams and
the versions. The data position is the step, because batches are a function of (seed, step). Orbax writes to a temporary
name and renames, so that a kill at any moment leaves a checkpoint whole or not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxbias import distributed, provenance
from jaxbias.config import differing_keys
from jaxbias.errors import UserError
from jaxbias.files import replace
from jaxbias.train.trainable import STREAMS
from jaxbias.types import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates every step, and logs what it raises as well
log = logging.getLogger("jaxbias")

ASIDE = ".damaged"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
  """Ctrl-C waits for the end of what is done here: in its midst it would strand the storage library's threads, which
  complain. (SIGTERM raises nothing: `preemption` tells of it at the next step boundary.)"""
  if threading.current_thread() is not threading.main_thread():  # others hear no signals, and may not ask for them
    yield
    return
  heard = []
  before = signal.signal(signal.SIGINT, lambda *_: heard.append(True)) or signal.SIG_DFL
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
    if heard:
      signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Nothing is printed about tasks that the storage library left behind when a read failed."""
  hooks, level = (sys.excepthook, sys.unraisablehook), logging.getLogger("asyncio").level
  sys.excepthook = sys.unraisablehook = lambda *_: None
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  try:
    with warnings.catch_warnings(action="ignore"):
      try:
        yield
      finally:
        gc.collect()
  finally:
    sys.excepthook, sys.unraisablehook = hooks
    logging.getLogger("asyncio").setLevel(level)


@dataclasses.dataclass
class Kept(PreservationPolicy):
  """The newest `last` checkpoints, and the best one that each of them names: `best[step]`."""

  last: int
  best: dict[int, int] = dataclasses.field(default_factory=dict)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    newest = {info.step for info in checkpoints[-self.last :]}
    wanted = newest | {self.best[step] for step in newest if step in self.best}
    return [info.step in wanted for info in checkpoints]


def _remote(folder: Path) -> bool:
  return "://" in str(folder)


class _Manager(ocp.CheckpointManager):
  """One that does not ask jax's preemption service by a count of its own: `preemption.due` asks at every boundary."""

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The checkpoints of one run: the newest `keep` stay, and the best.

  `save` returns as soon as the state is copied; everything that reads waits for what is still being written, and so
  does `close`. What the disk refused in the background is raised by whichever comes next, as an OSError.
  """

  def __init__(self, folder: Path, keep: int = 2):
    """folder: also an address in the cloud, as an `epath.Path`."""
    self._kept, self._versions = Kept(keep), provenance.versions()
    options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
    try:
      self._manager = _Manager(folder if _remote(folder) else folder.absolute(), options=options)
    except ImportError as error:
      raise UserError(f"{folder} cannot be reached: {error}.") from None
    self.folder = self._manager.directory

  @classmethod
  def of(cls, run: Path, elsewhere: str = "", keep: int = 2) -> Checkpoints:
    """Of the run in the folder `run`: in `run`/checkpoints, or under the address `elsewhere`, such as gs://bucket/mine,
    below the names of its work folder and its own; a file `run`/checkpoints then says where."""
    pointer = run / "checkpoints"
    if not elsewhere:
      return cls(pointer, keep)
    place = epath.Path(elsewhere) / run.absolute().parent.name / run.name
    if distributed.first():
      replace(pointer, f"{place}\n".encode())
    return cls(place, keep)

  @property
  def newest(self) -> int | None:
    """The step of the newest whole checkpoint."""
    self._wait()
    return self._manager.latest_step()

  def save(self, state: TrainState, config: Mapping, best: Mapping | None = None, **more: Any) -> None:
    """best: {"step": of the checkpoint that stays whatever follows, ...}. more: what else a run needs to go on.
    Raises OSError where the disk is full or refuses, now or at the save before."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    about = {"data_position": step, "config": config, "streams": STREAMS, "versions": self._versions,
             "best": best, **more}  # fmt: skip
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    self._check_space(2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + (1 << 20))
    if best:
      self._kept.best[step] = best["step"]
    with _uninterrupted(), self._disk_errors():
      self._manager.save(step, args=args)

  def restore(self, like: TrainState, config: Mapping | None = None) -> TrainState | None:
    """The newest state that can be read, with the shapes and shardings of `like`; None where nothing was saved.

    Newer checkpoints that cannot be read are named in a warning and put aside under another name.
    Raises UserError where none can be read, and for one of another config or of other random streams; these stay.
    """
    self._wait()
    damaged = []
    for step in reversed(self._manager.all_steps()):
      try:
        with _quietly():
          state = self._read(step, like)
      except Exception:  # a plain one is what Orbax raises for missing data
        damaged.append(step)
        continue
      about = self.about(step)
      self._check_same(step, about, config)
      self._put_aside(damaged, step)
      if best := about.get("best"):
        self._kept.best[step] = best["step"]
      return state
    if damaged:
      raise UserError(f"no checkpoint in {self.folder} can be read: damaged, or of another model; delete the folder to "
                      "start anew.")  # fmt: skip
    return None

  def best(self, like: TrainState, step: int) -> TrainState:
    """The state of one step. Raises UserError where it cannot be read."""
    self._wait()
    try:
      with _quietly():
        return self._read(step, like)
    except Exception:
      raise UserError(f"the run's best checkpoint {self.folder / str(step)} is missing or damaged; delete "
                      f"{self.folder}, and the same command trains anew.") from None  # fmt: skip

  def about(self, step: int | None = None) -> dict:
    """What was saved beside the state of a step, by default the newest; {} without one."""
    step = self.newest if step is None else step
    args = ocp.args.Composite(about=ocp.args.JsonRestore())
    return {} if step is None else self._manager.restore(step, args=args)["about"]

  def close(self) -> None:
    """Waits until everything is written."""
    with _uninterrupted():
      try:
        self._wait()
      finally:
        self._manager.close()

  def _wait(self) -> None:
    with self._disk_errors():
      self._manager.wait_until_finished()

  def _read(self, step: int, like: TrainState) -> TrainState:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), about=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)["state"]

  def _check_same(self, step: int, about: Mapping, config: Mapping | None) -> None:
    where = f"the checkpoint {self.folder / str(step)}"
    if about.get("streams", STREAMS) != STREAMS:
      raise UserError(f"{where} is of a version of jaxbias with other random streams; train anew in another folder.")
    keys = [] if config is None else differing_keys(json.loads(json.dumps(config)), about["config"])
    if keys:
      more = f"; and {len(keys) - 4} more" if len(keys) > 4 else ""
      raise UserError(f"{where} is of another config ({'; '.join(keys[:4])}{more}); choose another folder.")

  def _put_aside(self, damaged: list[int], step: int) -> None:
    """So that the steps are written again, and nothing is deleted that somebody may want to look at."""
    for bad in damaged:
      log.warning("the checkpoint %s is damaged and was put aside as %s%s; the run goes on from step %d.",
                  self.folder / str(bad), bad, ASIDE, step)  # fmt: skip
      if distributed.first():
        aside = self.folder / f"{bad}{ASIDE}"
        if aside.exists():
          aside.rmtree()
        (self.folder / str(bad)).rename(aside)
    if damaged and jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoints were put aside")
    if damaged:
      self._manager.reload()

  def _check_space(self, needed: int) -> None:
    """Said before anything is half written; buckets have no end."""
    if not _remote(self.folder) and shutil.disk_usage(self.folder).free < needed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """What the disk refused as an OSError, whichever way the storage library says it."""
    try:
      yield
    except ValueError as error:
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if not code:
        raise
      raise OSError(int(code[1]), os.strerror(int(code[1])), str(self.folder)) from None
