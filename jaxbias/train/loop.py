"""The training loop: restore, step, read metrics one step late, save, stop on a loss that is not finite."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxbias import preemption
from jaxbias.data.pipeline import Shape
from jaxbias.distributed import first, on_host, to_devices
from jaxbias.errors import Preempted, UserError
from jaxbias.losses.registry import Objective
from jaxbias.mesh import batch_sharding, replicated
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.lora import LoraConfig, lora_scale, target_kernels
from jaxbias.models.transformer import abstract_variables
from jaxbias.train import trainable
from jaxbias.train.batches import Sampler
from jaxbias.train.checkpoint import Checkpoints
from jaxbias.train.flops import needed_flops, peak_flops
from jaxbias.train.goodput import Stopwatch
from jaxbias.train.guide import Control, Guide
from jaxbias.train.metrics import MetricsWriter
from jaxbias.train.optim import make_optimizer, rule_of
from jaxbias.train.prefetch import Prefetch
from jaxbias.train.profile import Profile
from jaxbias.train.step import make_train_step
from jaxbias.train.watch import Watch, Watcher
from jaxbias.types import TrainState

NOTHING = Objective(())


class TrainingFailed(UserError):
  """The loss or its gradient stopped being finite; the last good checkpoint is in the run's folder."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run: what it optimises, the texts that it draws, and the folder that it writes to."""

  folder: Path
  config: Any  # the whole merged config, as plain types
  objective: Objective
  coefficients: Mapping[str, Any]  # {"learning_rate": its peak, "losses": {loss: {coefficient: value}}}
  sampler: Sampler
  shape: Shape
  control: Control | None = None
  adapter_scale: float = 1.0  # of the model that is looked at, as of the one that is reported
  fisher: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # for `ewc`, by the path of a weight
  watch: Watch | None = None
  profile: tuple[int, int] | None = None  # first and last step of which a trace is kept


@dataclasses.dataclass(frozen=True)
class Trainer:
  """What the runs of one config share: the loaded model, the optimizer, compiled steps by objective."""

  model: LanguageModel
  train: Any  # the config's `train` section
  log: Any  # and its `log` section
  lora: LoraConfig
  tx: optax.GradientTransformation
  steps: dict[tuple, Callable] = dataclasses.field(default_factory=dict)
  optimizers: dict[tuple, optax.GradientTransformation] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, model: LanguageModel, config) -> Trainer:
    chosen = config.lora
    lora = LoraConfig(chosen.rank, chosen.alpha, tuple(chosen.targets), tuple(chosen.layers), chosen.dropout)
    target_kernels(model.params, lora)  # refuses targets that the model has not
    trainable.chosen_leaves(model.params, tuple(config.train.base))  # and leaves
    lora_scale(lora, model.config.num_layers)  # refuses layers that it has not
    return cls(model, config.train, config.log, lora, make_optimizer(config.train))

  def step_for(self, objective: Objective, tx: optax.GradientTransformation | None = None) -> Callable:
    """The compiled step; tx: another optimizer than the run's, for a phase with a schedule of its own."""
    key = (objective, tx)
    if key not in self.steps:
      module = self.model.module.clone(lora_dropout=self.lora.dropout)
      self.steps[key] = make_train_step(module, objective, tx or self.tx, self.train.accumulate)
    return self.steps[key]

  def optimizer(self, steps: float, warmup_steps: float) -> optax.GradientTransformation:
    """One object for one schedule, so that phases that share it share a compiled step."""
    if (steps, warmup_steps) not in self.optimizers:
      self.optimizers[steps, warmup_steps] = make_optimizer(self.train, steps, warmup_steps)
    return self.optimizers[steps, warmup_steps]

  @property
  def scale(self) -> dict:
    """Whole on every device, as the loop lets nothing move between devices."""
    scale = lora_scale(self.lora, self.model.config.num_layers)
    return to_devices(jax.device_get(scale), replicated(self.model.mesh))

  @property
  def moved(self) -> tuple[str, ...]:
    """Paths of the model's weights that a run changes."""
    frozen = {"params": self.model.params, "lora_scale": self.scale}
    return tuple(jax.eval_shape(trainable.displacement, self.abstract(NOTHING), frozen))

  @property
  def num_trainable(self) -> int:
    """Of the model; a loss's own parameters are left behind with the run."""
    model = {k: v for k, v in self.abstract(NOTHING).items() if k != "losses"}
    return sum(leaf.size for leaf in jax.tree.leaves(model))

  def _trainable(self, seed: int, params: Mapping, objective: Objective) -> dict:
    chosen = tuple(self.train.base)
    return trainable.init(jax.random.key(seed), params, self.lora, chosen, objective, self.model.config)

  @property
  def _read_by_aux(self) -> tuple:
    return self.model.config, self.model.tokenizer

  def abstract(self, objective: Objective) -> dict:
    """The trainable leaves as shapes."""
    return jax.eval_shape(functools.partial(self._trainable, 0, objective=objective), self.model.params)

  def check_rules(self, objective: Objective) -> None:
    """Raises UserError for a trained leaf that no rule of the optimizer covers, and for a rule that covers none."""
    if self.train.rules:
      leaves = jax.tree_util.tree_leaves_with_path(self.abstract(objective))
      used = [rule_of(path, tuple(self.train.rules)) for path, _ in leaves]
      for pattern, rule in self.train.rules:
        if not any(rule is one for one in used):
          raise UserError(f"train.rules has `{pattern}`, which is no parameter's first match.")

  def state_shardings(self, objective: Objective) -> TrainState:
    """A NamedSharding for every leaf of a state: moments lie as their parameters do, counters are everywhere."""
    whole, abstract = replicated(self.model.mesh), self.abstract(objective)
    boxed = abstract_variables(self.model.module)
    logical = trainable.axes(abstract, nn.get_partition_spec(boxed), boxed, self.lora, tuple(self.train.base))
    params = self.model.layout.shardings(abstract, logical)
    moments = optax.tree_map_params(
      self.tx, lambda _, sharding: sharding, jax.eval_shape(self.tx.init, abstract), params,
      transform_non_params=lambda _: whole,
    )  # fmt: skip
    aux = jax.tree.map(lambda _: whole, jax.eval_shape(functools.partial(objective.init_aux, *self._read_by_aux)))
    return TrainState(whole, params, moments, aux)

  def initial_state(self, seed: int, objective: Objective = NOTHING) -> TrainState:
    """Fresh trainable leaves (born sharded), optimizer state for them alone, and the losses' running statistics."""
    shardings = self.state_shardings(objective)
    make = functools.partial(self._trainable, objective=objective)
    params = jax.jit(make, static_argnums=0, out_shardings=shardings.params)(seed, self.model.params)
    opt_state = self.fresh_moments(params, objective)
    aux = jax.jit(functools.partial(objective.init_aux, *self._read_by_aux), out_shardings=shardings.aux)()
    return TrainState(to_devices(np.int32(0), shardings.step), params, opt_state, aux)

  def fresh_moments(self, params: Mapping, objective: Objective):
    """The optimizer's state at the beginning of a schedule."""
    return jax.jit(self.tx.init, out_shardings=self.state_shardings(objective).opt_state)(params)

  def adapters(self, state: TrainState) -> dict:
    """The collections that turn the base into the trained model; those that hold nothing new are left out."""
    found = trainable.collections(state.params, {"params": self.model.params, "lora_scale": self.scale})
    return {k: v for k, v in found.items() if k != "params" or "base" in state.params}


def train(trainer: Trainer, run: Run, on_step: Callable[[dict], None] = lambda record: None) -> TrainState:
  """Train from the newest checkpoint of the run (or from the start) to the end, and return the state.

  The same folder continued gives the same numbers as an uninterrupted run. `on_step` gets every record that goes
  to metrics.jsonl. With a controller the run ends when that says so, and the state is the best that it looked at.
  Raises TrainingFailed with the step, the loss part and the texts when a loss is not finite, and Preempted, after a
  save, at the first step boundary at which `preemption.due` says so.
  """
  clock, mesh = Stopwatch(), trainer.model.mesh
  with clock.on("start"):
    checkpoints = Checkpoints.of(run.folder, trainer.train.checkpoints, trainer.train.keep_checkpoints)
    fresh = trainer.initial_state(run.sampler.seed, run.objective)
    state = checkpoints.restore(fresh, run.config) or fresh
    guide = Guide.of(trainer, run, fresh, checkpoints) if run.control else None
    sampler = guide.sampler if guide else run.sampler
    done = int(state.step)
    watcher = Watcher(trainer, run, run.watch, done) if run.watch else None
    writer = MetricsWriter(run.folder, done, trainer.log.wandb_project, run.config) if first() else None
    frozen = {"params": trainer.model.params, "lora_scale": trainer.scale, "fisher": dict(run.fisher)}
    whole = replicated(mesh)
    coefficients = to_devices(jax.tree.map(np.float32, run.coefficients), whole)
    coefficients |= jax.jit(_keys, out_shardings=whole)(run.sampler.seed)
    step_function = trainer.step_for(run.objective)
  sharding = batch_sharding(mesh, trainer.train.accumulate)
  ahead = Prefetch(functools.partial(_batch, run.shape, sharding), trainer.train.steps, run.sampler.ahead)
  profile, compiled = Profile(run.folder / "profile", run.profile if first() else None), set()
  peak, trained = peak_flops(mesh.devices.flat, trainer.log.peak_tflops), trainer.abstract(run.objective)

  def report(step: int, metrics, ids: list[str], batch) -> None:
    logprob_BS = metrics.pop("logprob")  # the only one that lies across processes
    metrics = jax.device_get(metrics)
    if not metrics["finite"]:
      raise TrainingFailed(_failure(run, step, metrics, on_host([logprob_BS])[0], ids, batch, checkpoints))
    seconds, spent = clock.lap()
    record = {
      "step": step, "loss": float(metrics["loss"]), "parts": {k: float(v) for k, v in metrics["parts"].items()},
      "gradient_norm": float(metrics["gradient_norm"]), "seconds": seconds, "spent": spent,
      "tokens": int((batch.segment > 0).sum()),
    }  # fmt: skip
    if "compile" not in spent:  # where a program is compiled it may run as well
      record["tokens_per_second"] = record["tokens"] / seconds
      if peak:
        needed = needed_flops(trainer.model.config, batch, trained, run.objective)
        record["mfu"] = needed / seconds / peak
    if metrics["notes"]:
      record["notes"] = {k: float(v) for k, v in metrics["notes"].items()}
    if writer:
      writer.write(step, record)
    on_step({**record, "texts": len(ids)})

  try:
    late = None
    for step in range(done, trainer.train.steps):
      if guide:
        if guide.phase.done:
          break
        step_function, coefficients = guide.step_for(coefficients)
      if watcher and watcher.due(step):
        if late:
          report(*late)
          late = None
        with clock.on("look"):
          watcher.look(state, sampler, frozen, coefficients)
      with clock.on("data"):
        batch, ids, on_devices = ahead.take(sampler, step)
      profile.before(step + 1, state)
      program = step_function, batch.tokens.shape, batch.target.shape
      with clock.on("compile") if program not in compiled else nullcontext(), jax.transfer_guard("disallow"):
        state, metrics = step_function(state, frozen, on_devices, coefficients)
      compiled.add(program)
      profile.after(step + 1, state)
      if late:
        report(*late)
      late = (step + 1, metrics, ids, batch)
      last, look = step + 1 == trainer.train.steps, guide and step + 1 == guide.phase.until
      stop = preemption.due()
      if (step + 1) % trainer.train.checkpoint_every == 0 or last or look or stop:
        report(*late)
        late = None
        if look or (guide and last):
          with clock.on("look"):
            state = guide.look(state)
          sampler = guide.sampler
        with clock.on("checkpoint"):
          checkpoints.save(state, run.config, **(guide.about() if guide else {}))
        if stop:
          raise Preempted(f"{run.folder.name} is saved at step {step + 1}")
    if watcher:
      watcher.look(state, sampler, frozen, coefficients)
    return guide.best_state(state) if guide else state
  finally:
    profile.close()
    ahead.close()
    if writer:
      writer.close()
    checkpoints.close()


def _batch(shape: Shape, sharding: NamedSharding, sampler: Sampler, step: int):
  """What a step reads: the batch in numpy, the ids of its texts, and the batch on the devices."""
  batch, ids = sampler.batch(step, shape)
  with jax.transfer_guard("disallow"):  # a guard is of one thread
    return batch, ids, to_devices(batch, sharding)


def _keys(seed: int) -> dict[str, jax.Array]:
  draws = jax.random.key(seed)
  return {f"{name}_key": jax.random.fold_in(draws, trainable.STREAMS[name]) for name in ("dropout", "mixout")}


def _failure(
  run: Run, step: int, metrics: dict, logprob_BS: np.ndarray, ids: list[str], batch, checkpoints: Checkpoints
) -> str:
  parts = [name for name, value in metrics["parts"].items() if not np.isfinite(value)]
  bad = batch.row[(batch.row >= 0) & ~np.isfinite(logprob_BS)]
  texts = [ids[i] for i in bad] or ids
  shown = ", ".join(texts[:6]) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")
  what = f"loss part {', '.join(parts)}" if parts else "gradient"
  saved = checkpoints.newest
  kept = f"The checkpoint of step {saved} is kept in {checkpoints.folder}" if saved else "No step was saved yet"
  return (f"{run.folder.name}: the {what} is not finite at step {step} (texts {shown}). {kept}; try a lower "
          "train.learning_rate.")
