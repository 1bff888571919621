"""`finetune`: a model taught a downstream task, once for each seed, and its accuracy on examples it has not seen.

A seed's folder is a run's folder as `train` writes it: checkpoints that a restart goes on from, and a source for
`--model`, so that bias is measured before and after. What finished seeds said is kept beside the checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from rich.table import Table

from jaxbias import config as configs
from jaxbias import preemption, provenance
from jaxbias.compare import TRAINED_TOKEN
from jaxbias.data import glue
from jaxbias.data.glue import Example
from jaxbias.data.pipeline import Segment, Shape, draw, pack, place_in, plan, union
from jaxbias.errors import UserError
from jaxbias.evals import datafiles, downstream, show
from jaxbias.evals.downstream import Encoded
from jaxbias.evals.metrics import Estimate
from jaxbias.files import write_json
from jaxbias.losses import classification
from jaxbias.mesh import batch_shards
from jaxbias.models import language_model
from jaxbias.progress import Tracker
from jaxbias.train import goodput
from jaxbias.train.batches import PLANNED_STEPS
from jaxbias.train.loop import Run, Trainer, TrainingFailed, train
from jaxbias.train.metrics import read_jsonl
from jaxbias.types import ROLES, Batch
from jaxbias.workdir import claim

SCHEMA = 1
RESULT, ANSWERS = "finetune.json", "predictions.json"
ADAPTER_RATE, BASE_RATE = 5e-4, 2e-5  # peak learning rates: of adapters, and where leaves of the base train
WARMUP = 0.06  # of all steps
PLANNED_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the model is taught; a limit of 0 means all. `base`: leaves of the base that train, as in config.train.base."""

  seeds: tuple[int, ...] = (0, 1, 2)
  rank: int = 8
  base: tuple[str, ...] = ()
  learning_rate: float = 0.0  # at its peak; 0: ADAPTER_RATE or BASE_RATE
  epochs: float = 3.0
  batch: int = 32
  max_length: int = 128
  train_limit: int = 1000
  limit: int = 0

  def check(self) -> None:
    """Raises UserError for the first value that cannot be used."""
    if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
      raise UserError(f"--seeds={','.join(map(str, self.seeds))}; give whole numbers from 0 on, each of them once.")
    for name in ("epochs", "batch", "max_length"):
      if not getattr(self, name) > 0:
        raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}; it has to be positive.")
    for name in ("learning_rate", "train_limit", "limit", "rank"):
      if getattr(self, name) < 0:
        raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}; it cannot be negative.")
    if not self.rank and not self.base:
      raise UserError("--rank=0 leaves the model as it is; name with --base what trains, such as --base='*' for all.")

  def config(self, model: str, dtype: str | None, examples: int):
    """What a Trainer reads, for so many training examples."""
    c = configs.defaults()
    steps = math.ceil(self.epochs * examples / self.batch)
    c.model, c.dtype = model, dtype or "auto"
    c.lora.rank, c.train.base = self.rank, self.base
    c.train.learning_rate = self.learning_rate or (BASE_RATE if self.base else ADAPTER_RATE)
    c.train.steps, c.train.warmup_steps = steps, int(WARMUP * steps)
    c.train.checkpoint_every = max(10, steps // 5)
    return c


@dataclasses.dataclass(frozen=True)
class Drawn:
  """batch(step) of one seed: `per_step` examples of an epoch's own permutation, packed into rows."""

  examples: Sequence[Example]
  segments: Sequence[Segment]
  per_step: int
  seed: int
  shards: int
  ahead = 1  # step before its own in which a batch is begun

  def members(self, step: int) -> list[int]:
    return [int(i) for i in draw(len(self.examples), self.per_step, step, (self.seed,))]

  def shape(self, steps: int) -> Shape:
    """That holds the first steps; a later one that needs more gets its own."""
    members = (self.members(step) for step in range(min(steps, PLANNED_STEPS)))
    return plan([[self.segments[i] for i in chosen] for chosen in members], self.shards)

  def batch(self, step: int, planned: Shape) -> tuple[Batch, list[str]]:
    """The packed batch in numpy, and the id of every example in it by `batch.row`."""
    members = self.members(step)
    segments = [self.segments[i] for i in members]
    places, need = place_in(segments, planned)
    shape = union([planned, need], self.shards)
    arrays = pack(segments, places, shape)
    arrays.pop("branch")
    per_segment = {name: np.full((shape.B, shape.S), -1, np.int32) for name in ("role", "row", "label")}
    for number, (i, at) in enumerate(zip(members, places, strict=True)):
      per_segment["role"][at.b, at.s] = ROLES.index(classification.ON)
      per_segment["row"][at.b, at.s], per_segment["label"][at.b, at.s] = number, self.examples[i].label
    return Batch(**arrays, **per_segment), [self.examples[i].id for i in members]


@dataclasses.dataclass(frozen=True)
class Data:
  """What was read: the examples of both parts, how many there are of each, and the files' sha256."""

  task: glue.Task
  sources: Mapping[str, str]
  examples: Mapping[str, Sequence[Example]]
  of: Mapping[str, int]
  files: Mapping[str, str]

  @classmethod
  def read(cls, task: glue.Task, given: Sequence[str], limits: Mapping[str, int]) -> Data:
    """Raises UserError with file, line and field of whatever is wrong with the data."""
    sources, whole, files = glue.parts(given), {}, {}
    for part, source in sources.items():
      path = datafiles.local(source)
      whole[part] = glue.read(path, task, part)
      files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    kept = {part: examples[: limits[part] or None] for part, examples in whole.items()}
    return cls(task, sources, kept, {part: len(examples) for part, examples in whole.items()}, files)

  @property
  def subsets(self) -> dict[str, str | None]:
    return {part: show.subset(len(examples), self.of[part]) for part, examples in self.examples.items()}

  @property
  def overlap(self) -> int:
    """Examples to be answered whose texts are among the training examples."""
    seen = {example.texts for example in self.examples["train"]}
    return sum(example.texts in seen for example in self.examples["dev"])


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything that is known before the first step."""

  workdir: Path
  command: str
  data: Data
  encoded: Mapping[str, Encoded]
  majority: int
  settings: Settings
  trainer: Trainer
  plain: Mapping[str, Any]  # what the work folder is claimed for

  @property
  def draws(self) -> dict[int, Drawn]:
    shards = batch_shards(self.trainer.model.mesh)
    return {seed: Drawn(self.data.examples["train"], self.encoded["train"].segments, self.settings.batch, seed, shards)
            for seed in self.settings.seeds}  # fmt: skip

  @property
  def shape(self) -> Shape:
    """Planned on the same seeds whichever are asked, so that what a seed finds does not depend on the others."""
    drawn, shards = next(iter(self.draws.values())), batch_shards(self.trainer.model.mesh)
    each = (dataclasses.replace(drawn, seed=seed).shape(self.trainer.train.steps) for seed in range(PLANNED_SEEDS))
    return union(each, shards)

  def folder(self, seed: int) -> Path:
    return self.workdir / f"{self.data.task.name}-seed{seed}"

  @property
  def finished(self) -> dict[int, Path]:
    """The folders of the seeds that have answered the dev examples."""
    folders = {seed: self.folder(seed) for seed in self.settings.seeds}
    return {seed: folder for seed, folder in folders.items() if (folder / ANSWERS).exists()}


def finetune(
  source: str, name: str, given: Sequence[str], settings: Settings, workdir: Path, dtype: str | None = None,
  command: str = "",
) -> tuple[Table, list[str]]:  # fmt: skip
  """Teach `source` the task `name` in workdir/NAME-seedN, answer the dev examples, and write workdir/finetune.json
  after each seed; returns a table of it, and why seeds failed.

  given: what `--data` says (`glue.parts`). The same command goes on where it was interrupted; more seeds may be added
  later. Raises UserError for what cannot be begun, for a folder of other settings, and where every seed failed.
  """
  job = prepare(source, name, given, settings, workdir, dtype, command)
  failed = run(job)
  if not job.finished:
    raise UserError("\n  ".join(failed))
  model, data = job.trainer.model, job.data
  about = [f"{part}: {said or f'{data.of[part]:,} examples'}" for part, said in data.subsets.items()]
  title = f"{model.name} in {model.config.dtype}, {', '.join(about)}"
  return downstream.table(title, data.task, write(job)), failed


def prepare(
  source: str, name: str, given: Sequence[str], settings: Settings, workdir: Path, dtype: str | None, command: str
) -> Job:
  """Check everything that can be wrong, load data and model, tokenise, and claim `workdir`."""
  task = glue.get(name)
  settings.check()
  data = Data.read(task, given, {"train": settings.train_limit, "dev": settings.limit})
  majority = downstream.majority_class(data.examples["train"])
  model = language_model.load(source, dtype)
  length = min(settings.max_length, model.config.max_positions)
  encoded = {part: downstream.encode(examples, model.tokenizer, model.config.causal, length)
             for part, examples in data.examples.items()}  # fmt: skip
  config = settings.config(source, dtype, len(data.examples["train"]))
  config.lora.targets = tuple(name for name in config.lora.targets if name in _projections(model.params))
  trainer = Trainer.of(model, config)
  whole = configs.to_dict(config)
  plain = {name: whole[name] for name in ("model", "dtype", "lora", "train")}  # what `--model` reads of a run
  plain |= {name: getattr(settings, name) for name in ("epochs", "batch", "max_length", "train_limit", "limit")}
  plain |= {"task": task.name, "data": dict(data.sources), "sha256": list(data.files.values()),
            "model_fingerprint": model.fingerprint}  # fmt: skip
  claim(workdir, plain, command)
  return Job(workdir, command, data, encoded, majority, settings, trainer, plain)


def _projections(params: Mapping) -> set[str]:
  """The projections that a model has: encoders, for one, have no gate."""
  return {path[-2] for path in flatten_dict(dict(params)) if path[0] == "layers" and path[-1] == "kernel"}


def run(job: Job) -> list[str]:
  """Train and ask every seed that is not finished yet; returns why seeds failed."""
  trainer, draws, segments, failed = job.trainer, job.draws, job.encoded["dev"].segments, []
  steps, shape, key = trainer.train.steps, job.shape, classification.KEY
  objective = classification.objective(len(job.data.task.labels))
  coefficients = {"learning_rate": trainer.train.learning_rate, "losses": {key: {"weight": 1.0}}}
  todo = [seed for seed in draws if seed not in job.finished]
  train_cost = TRAINED_TOKEN * steps * shape.B * shape.T
  dev_cost = float(sum(len(segment.tokens) for segment in segments))
  with Tracker("finetune", max(1.0, len(todo) * (train_cost + dev_cost)), check=preemption.check) as tracker:
    for seed in todo:
      folder = job.folder(seed)
      folder.mkdir(parents=True, exist_ok=True)
      one = Run(folder, {**job.plain, "seed": seed}, objective, coefficients, draws[seed], shape)
      tracker.phase(f"train {folder.name}", steps, train_cost)
      try:
        state = train(trainer, one, lambda record: tracker.reach(record["step"], _note(record)))
      except TrainingFailed as failure:
        failed.append(str(failure))
        continue
      tracker.phase(f"evaluate {folder.name}", len(segments), dev_cost)
      began, adapters = time.perf_counter(), trainer.adapters(state)
      logits_EC = downstream.predict(trainer.model, segments, state.params["losses"][key], adapters, tracker.advance)
      write_json(folder / ANSWERS, {"logits": logits_EC.tolist(), "seconds": time.perf_counter() - began})
      write(job)
  return failed


def _note(record: Mapping) -> str:
  rate = f"{record['tokens_per_second']:,.0f} tokens/s  " if "tokens_per_second" in record else ""
  return (f"{rate}loss {record['loss']:.3f}  "
          f"accuracy {100 * record['notes'][f'{classification.KEY}/accuracy']:.0f} %")


def write(job: Job) -> dict[str, Estimate]:
  """Write the result of the seeds that are finished, and return its estimates."""
  data, encoded, model, done = job.data, job.encoded, job.trainer.model, job.finished
  said = {seed: json.loads((folder / ANSWERS).read_text(encoding="utf-8")) for seed, folder in done.items()}
  label_E = np.array([example.label for example in data.examples["dev"]])
  predicted_ME = np.array([np.argmax(one["logits"], axis=-1) for one in said.values()])
  estimates, benchmark = downstream.reduce(label_E, predicted_ME, job.majority), downstream.benchmark(data.task)

  def of_seed(seed: int, accuracy: float) -> dict:
    found = goodput.summary(read_jsonl(done[seed] / "metrics.jsonl"))
    spent = {f"training_{name}": found[name] for name in ("seconds", "tokens", "goodput")}
    return {"folder": done[seed].name, "accuracy": accuracy, "evaluation_seconds": said[seed]["seconds"], **spent}

  write_json(job.workdir / RESULT, {
    "schema": SCHEMA, "command": job.command, "created": provenance.now(), "settings": dict(job.plain),
    "model": {"source": job.plain["model"], "name": model.name, "fingerprint": model.fingerprint,
              "parameters": model.num_parameters, "trainable": job.trainer.num_trainable},
    "tokenizer": model.tokenizer.fingerprint, "dtype": model.config.dtype,
    "versions": provenance.versions(), "git": provenance.git(), "hardware": provenance.hardware(),
    "task": {"name": benchmark.name, "source": benchmark.source, "metrics": benchmark.describe(),
             "cluster": benchmark.cluster, "labels": data.task.labels, "majority": data.task.labels[job.majority]},
    "data": {part: {"source": source, "examples": len(data.examples[part]), "of": data.of[part],
                    "subset": data.subsets[part], "truncated": encoded[part].truncated}
             for part, source in data.sources.items()},
    "files": data.files, "overlap": data.overlap,
    "estimates": {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()},
    "spread": downstream.spread(estimates["accuracy"]),
    "seeds": {str(seed): of_seed(seed, accuracy)
              for seed, accuracy in zip(done, estimates["accuracy"].per_seed, strict=True)},
    "missing_seeds": [seed for seed in job.settings.seeds if seed not in done],
    "ids": [example.id for example in data.examples["dev"]], "labels": label_E.tolist(),
    "predicted": dict(zip(map(str, done), predicted_ME.tolist(), strict=True)),
  })  # fmt: skip
  return estimates
