"""Orbax: state + data position + config of a run, saved together; a half-written step never counts.

The data position is the step, because batches are a function of (seed, step). Orbax writes to a temporary name
and renames, so that a kill at any moment leaves either the old checkpoint or the new one.
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxbias.types import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every step at INFO and WARNING


class Checkpoints:
  """The checkpoints of one run's folder; the newest two are kept."""

  def __init__(self, folder: Path):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def save(self, state: TrainState, config: dict) -> None:
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    about = {"data_position": step, "config": config}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    self._manager.save(step, args=args)

  def restore(self, like: TrainState) -> TrainState | None:
    """The newest complete state with the shapes and shardings of `like`, or None when there is none."""
    step = self._manager.latest_step()
    if step is None:
      return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

  def close(self) -> None:
    self._manager.close()
