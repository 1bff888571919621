"""A phase controller at work in the training loop: it looks, swaps roles, sets the rate, and keeps the best state.

Its decisions go to controller.jsonl in the run's folder; its phase is saved with every checkpoint, so that a continued
run decides as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optax

from jaxbias.distributed import first, to_devices
from jaxbias.files import replace
from jaxbias.mesh import replicated
from jaxbias.methods.controllers import Controller, Phase, better
from jaxbias.models.lora import scaled
from jaxbias.train.checkpoint import Checkpoints
from jaxbias.train.metrics import read_jsonl
from jaxbias.types import TrainState

if TYPE_CHECKING:
  from jaxbias.train.loop import Run, Trainer


@dataclasses.dataclass(frozen=True)
class Control:
  """`look(adapters)` -> ({bias type: SS in %}, LMS in %) on the split that decides; `start_lms` is the base model's."""

  controller: Controller
  look: Callable[[Mapping], tuple[dict[str, float], float]]
  start_lms: float


class Guide:
  """The controller of one run: its phase, the sampler of that phase, and the best evaluation so far."""

  def __init__(self, trainer: Trainer, run: Run, fresh: TrainState, checkpoints: Checkpoints, phase: Phase,
               best: dict | None):  # fmt: skip
    self.trainer, self.run, self.fresh, self.checkpoints, self.best = trainer, run, fresh, checkpoints, best
    self.path = run.folder / "controller.jsonl"
    self._enter(phase)

  @classmethod
  def of(cls, trainer: Trainer, run: Run, fresh: TrainState, checkpoints: Checkpoints) -> Guide:
    """As the newest checkpoint left it, or from the first phase on. Lines of looks that will be repeated go."""
    about = checkpoints.about()
    phase = Phase.from_json(about["phase"]) if "phase" in about else run.control.controller.first()
    path, done = run.folder / "controller.jsonl", about.get("data_position", 0)
    lines = [line for line in read_jsonl(path) if line["step"] <= done]
    if first():
      replace(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return cls(trainer, run, fresh, checkpoints, phase, about.get("best"))

  def _enter(self, phase: Phase) -> None:
    self.phase, self.sampler = phase, self.run.sampler.in_phase(phase)

  def about(self) -> dict[str, Any]:
    """What a checkpoint has to hold beside the state; the best one stays."""
    return {"phase": self.phase.to_json(), "best": self.best}

  def step_for(self, coefficients: Mapping) -> tuple[Callable, dict]:
    """The compiled step of the phase, and the coefficients with its learning rate."""
    rate = np.float32(self.run.coefficients["learning_rate"] * self.phase.rate)
    rate = to_devices(rate, replicated(self.trainer.model.mesh))
    return self.trainer.step_for(self.run.objective, self._optimizer()), {**coefficients, "learning_rate": rate}

  def _optimizer(self) -> optax.GradientTransformation | None:
    if not self.phase.schedule_steps:
      return None
    return self.trainer.optimizer(self.phase.schedule_steps, self.phase.warmup_steps)

  def look(self, state: TrainState) -> TrainState:
    """Evaluate the model that the run would end with, decide, write it down; returns the state to go on with."""
    step = int(state.step)
    adapters, start = self.trainer.adapters(state), self.trainer.model.params
    scores, lms = self.run.control.look(scaled(adapters, self.run.adapter_scale, start))
    drop = self.run.control.start_lms - lms
    best = self.best and (self.best["scores"], self.best["lms_drop"])
    if better((scores, drop), best):
      self.best = {"step": step, "scores": scores, "lms_drop": drop}
    phase = self.run.control.controller.next(self.phase, step, scores)
    record = {"step": step, "scores": scores, "lms": lms, "best": self.best["step"] == step, "next": phase.to_json()}
    if first():
      with self.path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
    self._enter(phase)
    if phase.schedule_steps and phase.began == step:  # new moments, and a schedule that starts anew
      state = state.replace(opt_state=self.trainer.fresh_moments(state.params, self.run.objective))
    return state

  def best_state(self, state: TrainState) -> TrainState:
    """The state of the best look; the last one where nobody looked."""
    return self.checkpoints.best(self.fresh, self.best["step"]) if self.best else state
