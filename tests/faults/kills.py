"""Stopping a run at a chosen moment, and what it leaves behind; for the tests here and for benchmarks/faults.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxbias.train.metrics import read_jsonl
from tests.train import read, untimed

UNFINISHED = ".orbax-checkpoint-tmp"


@dataclass(frozen=True)
class Moment:
  """Of the run in `folder`: "start" before its first line, "steps" from its `step`-th line on, "saving" while a
  checkpoint is written from then on, "evaluation" behind its last checkpoint."""

  folder: Path
  name: str
  step: int

  def now(self) -> bool:
    checkpoints = self.folder / "checkpoints"
    if self.name == "start":
      return checkpoints.is_dir()
    if self.name == "evaluation":
      return (checkpoints / str(self.step)).is_dir() and not (self.folder / "evaluation.json").exists()
    metrics = self.folder / "metrics.jsonl"
    there = metrics.exists() and metrics.read_bytes().count(b"\n") >= self.step
    return there and (self.name == "steps" or any(checkpoints.glob(f"*{UNFINISHED}")))


@dataclass(frozen=True)
class Left:
  """What a stopped run left: its newest checkpoint, and the clock's reading in every line of its metrics, by which one
  sees later which lines were kept."""

  folder: Path
  saved: int
  seconds: tuple[float, ...]
  saving: bool

  @classmethod
  def of(cls, folder: Path) -> Left:
    steps = saved_steps(folder)
    seconds = tuple(line["seconds"] for line in read_jsonl(folder / "metrics.jsonl"))
    return cls(folder, max(steps, default=0), seconds, any(folder.glob(f"checkpoints/*{UNFINISHED}")))

  def went_on_from(self) -> int:
    """The step that the next process began at."""
    now = [line["seconds"] for line in read_jsonl(self.folder / "metrics.jsonl")]
    same = [a == b for a, b in zip(self.seconds, now, strict=False)]
    return same.index(False) if False in same else len(same)


def saved_steps(run: Path) -> list[int]:
  return sorted(int(path.name) for path in run.glob("checkpoints/*") if path.name.isdecimal())


def stop(process: subprocess.Popen, moment: Moment, how: signal.Signals = signal.SIGKILL) -> bool:
  """Whether the process was there to be told when the moment came; it has ended by now."""
  while process.poll() is None:
    if moment.now():
      process.send_signal(how)
      break
    time.sleep(0.001)
  process.wait()
  return process.returncode != 0


def state_at(run: Path, step: int) -> dict:
  """The arrays of a checkpoint, as numpy. Raises what Orbax does for one that is not whole."""
  args = ocp.args.Composite(state=ocp.args.StandardRestore())
  with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
    return jax.tree.map(np.asarray, manager.restore(step, args=args)["state"])


def half_written(workdir: Path) -> list[Path]:
  """Files and checkpoints under a final name that cannot be read."""
  broken = []
  for folder, _, names in os.walk(workdir):
    for path in (Path(folder, name) for name in names if name.endswith(".json")):
      try:
        read(path)
      except ValueError:
        broken.append(path)
  for run in {path.parent for path in workdir.glob("*/checkpoints")}:
    for step in saved_steps(run):
      try:
        state_at(run, step)
      except Exception:
        broken.append(run / "checkpoints" / str(step))
  return broken


def differences(run: Path, other: Path) -> list[str]:
  """What differs, to the last bit, between two finished runs: of metrics, scores, and the newest checkpoint."""
  metrics = [untimed(read_jsonl(folder / "metrics.jsonl")) for folder in (run, other)]
  scores = [read(folder / "evaluation.json")["scores"] for folder in (run, other)]
  steps = [saved_steps(folder)[-1] for folder in (run, other)]
  states = [state_at(folder, step) for folder, step in zip((run, other), steps, strict=True)]
  same = {
    "metrics": metrics[0] == metrics[1], "scores": scores[0] == scores[1], "steps": steps[0] == steps[1],
    "state": jax.tree.structure(states[0]) == jax.tree.structure(states[1])
             and all(map(np.array_equal, *map(jax.tree.leaves, states))),
  }  # fmt: skip
  return [name for name, equal in same.items() if not equal]
