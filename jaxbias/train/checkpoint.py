"""Orbax: state + data position + config of a run, saved together; a half-written step never counts.

The data position is the step, because batches are a function of (seed, step). Orbax writes to a temporary name
and renames, so that a kill at any moment leaves either the old checkpoint or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxbias.errors import UserError
from jaxbias.types import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates every step, and logs what it raises as well


@contextlib.contextmanager
def _uninterrupted():
  """Ctrl-C waits for the end of a save: in its midst it would strand the storage library's threads, which complain."""
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


class _Manager(ocp.CheckpointManager):
  """One that does not ask jax's preemption service by a count of its own: `preemption.due` asks at every boundary."""

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The checkpoints of one run's folder; the newest `keep` stay."""

  def __init__(self, folder: Path, keep: int = 2):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    self._manager = _Manager(folder.absolute(), options=options)

  @property
  def newest(self) -> int | None:
    """The step of the newest checkpoint."""
    return self._manager.latest_step()

  def save(self, state: TrainState, config: dict, **more: Any) -> None:
    """more: what else a run needs to go on, as plain data."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    about = {"data_position": step, "config": config, **more}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + (1 << 20)
    if shutil.disk_usage(self._manager.directory).free < needed:  # said before anything is half written
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._manager.directory))
    try:
      with _uninterrupted():
        self._manager.save(step, args=args)
    except ValueError as error:  # the storage library's way to say what the disk refused
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if not code:
        raise
      raise OSError(int(code[1]), os.strerror(int(code[1])), str(self._manager.directory)) from None

  def restore(self, like: TrainState) -> TrainState | None:
    """The newest complete state with the shapes and shardings of `like`, or None when there is none.

    Raises UserError for one that is damaged, naming the folder to delete.
    """
    step = self.newest
    if step is None:
      return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    except (ValueError, KeyError):
      raise UserError(f"the checkpoint {self._manager.directory / str(step)} is damaged; delete it, and the same "
                      "command goes on from what is left.") from None  # fmt: skip

  def about(self) -> dict:
    """What was saved beside the newest state; {} without one."""
    step = self.newest
    args = ocp.args.Composite(about=ocp.args.JsonRestore())
    return {} if step is None else self._manager.restore(step, args=args)["about"]

  def close(self) -> None:
    self._manager.close()
