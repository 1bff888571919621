"""Looks at a run while it trains: what it forgot so far, how far it went, and where its loss parts pull.

A look is one forward pass over the probe, the gradients of the objective's terms on a few fixed batches, and one line
of watch.jsonl in the run's folder. It changes nothing and draws nothing, so that a run is the same with it and without,
and a continued run looks as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxbias.distributed import first, on_host, to_devices
from jaxbias.evals import forgetting, stereoset
from jaxbias.evals.forgetting import Losses
from jaxbias.evals.metrics import Estimate
from jaxbias.evals.probe import GENDERED, Probe, Start, look
from jaxbias.losses.remedies import total_square
from jaxbias.mesh import batch_sharding
from jaxbias.models.lora import scaled
from jaxbias.train import conflict
from jaxbias.train.batches import Sampler
from jaxbias.train.metrics import rewind
from jaxbias.train.trainable import displacement
from jaxbias.types import TrainState

if TYPE_CHECKING:
  from jaxbias.train.loop import Run, Trainer

FILE = "watch.jsonl"


@dataclasses.dataclass(frozen=True)
class Watch:
  """When and at what the runs of one config are looked at: after `steps`, and at their end.

  scored: "sum" or "token_mean", as for the table. draws: resamples of an interval. batches: of the run's first steps,
  on which gradients are taken, the same ones at every look.
  """

  steps: tuple[int, ...]
  probe: Probe
  start: Start
  scored: str
  draws: int
  batches: int


class Watcher:
  """The looks at one run."""

  def __init__(self, trainer: Trainer, run: Run, watch: Watch, done: int):
    """Lines from step `done` on go: these looks will be repeated."""
    self.trainer, self.run, self.watch = trainer, run, watch
    self.path = run.folder / FILE
    if first():
      rewind(self.path, lambda line: line["step"] < done)

  def due(self, step: int) -> bool:
    return step in self.watch.steps

  def look(self, state: TrainState, sampler: Sampler, frozen: Mapping, coefficients: Mapping) -> None:
    """Write what there is to see after `state.step` steps. frozen, coefficients: as the train step takes them."""
    factor, model = self.run.adapter_scale, self.trainer.model
    probe, adapters = self.watch.probe, scaled(self.trainer.adapters(state), factor, model.params)
    losses = look(model, probe, self.watch.start, adapters, self.watch.scored)
    keys = [term.key for term in self.run.objective.terms]
    sharding = batch_sharding(model.mesh)
    whole = dataclasses.replace(sampler, accumulate=1)
    batches = [to_devices(whole.batch(i, self.run.shape)[0], sharding) for i in range(self.watch.batches)]
    products_KK = conflict.measure(model.module, self.run.objective, state, frozen, batches, coefficients)
    [square] = on_host([_square(state.params, frozen)])
    record = {
      "step": int(state.step), "distance": abs(factor) * float(np.sqrt(square)),
      "gradients": conflict.describe(keys, products_KK),
      **summary(probe, self.watch.start.losses, losses, self.watch.draws),
    }  # fmt: skip
    if first():
      with self.path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


@jax.jit
def _square(params: Mapping, frozen: Mapping) -> jax.Array:
  """||theta - theta_0||^2 of the model's effective weights: adapters count multiplied out, at their own scale."""
  return total_square(displacement(params, frozen).values())


def summary(probe: Probe, start: Losses, now: Losses, draws: int) -> dict[str, Any]:
  """{"overall", "span"}: forgetting on whole sentences, and on the spans alone in which a triple's sentences differ;
  "groups": {grouping: {group: ...}} of general text; "bias": ss, lms, icat. Metrics are {"value", "low", "high"}."""
  found = forgetting.reduce(probe.triples, start, [now], probe.general.documents, draws=draws).estimates
  bias = stereoset.reduce(probe.triples, now.score_E3, draws=draws).estimates["overall"]
  by_group = functools.partial(forgetting.by_group, before=start, after=[now], documents=probe.general.documents,
                               draws=draws)  # fmt: skip
  groups = {name: {group: {"share": share, **_plain(estimates)} for group, (share, estimates) in by_group(of).items()}
            for name, of in probe.general.groupings.items()}  # fmt: skip
  for half in GENDERED:
    groups["gender"].setdefault(half, {"share": 0.0, "reason": f"no general text is {half}"})
  return {group: _plain(estimates) for group, estimates in found.items()} | {"groups": groups, "bias": _plain(bias)}


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
  return {name: {"value": found.value, "low": found.low, "high": found.high} for name, found in estimates.items()}
