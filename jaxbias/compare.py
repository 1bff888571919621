"""The comparison: train every variant for every seed with one budget, evaluate all alike, write one table.

Everything finished is on disk under the work folder, so the same command goes on where it was stopped:

  workdir/config.json  provenance.json  data_card.json  data_card.md  results.json  table.md  report.html  figures/
  workdir/base/evaluation.json
  workdir/<variant>-seed<n>/{metrics.jsonl, tensorboard/, checkpoints/, evaluation.json}
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

from jaxbias import config as configs
from jaxbias import distributed, methods, preemption, provenance
from jaxbias import workdir as claims
from jaxbias.data import card
from jaxbias.data.pipeline import Segment, Shape, packed_batches
from jaxbias.data.rows import DataSet, Split
from jaxbias.data.sources import triple_choices
from jaxbias.errors import UserError
from jaxbias.evals import probe as probes
from jaxbias.evals import stereoset, tradeoff
from jaxbias.evals.scoring import Encoded, encode, score
from jaxbias.files import replace, write_json
from jaxbias.inputs import counts, load_data
from jaxbias.losses.registry import Objective, parse
from jaxbias.mesh import batch_shards, make_mesh
from jaxbias.methods.controllers import Published, Signed
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.lora import scaled
from jaxbias.models.sources import cache_folder
from jaxbias.progress import Tracker
from jaxbias.train import fisher, goodput, reference, trainable, transforms
from jaxbias.train.batches import Sampler, Texts, plan_shape, tokenise
from jaxbias.train.guide import Control
from jaxbias.train.loop import Run, Trainer, TrainingFailed, train
from jaxbias.train.metrics import package, read_jsonl
from jaxbias.train.watch import FILE as WATCH_FILE
from jaxbias.train.watch import Watch

TRAINED_TOKEN = 3.0  # forward passes that one trained token costs: itself and a backward pass of twice that


@dataclasses.dataclass(frozen=True)
class Variant:
  """One row of the table: its losses, and its texts for each seed."""

  name: str
  spec: Mapping  # as in the config
  objective: Objective
  coefficients: Mapping  # {"learning_rate": its peak, "losses": {loss: {coefficient: value}}}
  texts: Mapping[int, Texts]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Everything that is known before the first forward pass."""

  config: object
  workdir: Path
  data: DataSet
  split: Split  # the one that is evaluated
  trainer: Trainer
  variants: tuple[Variant, ...]
  encoded: Mapping[str, Encoded]
  probe: probes.Probe | None  # what is read at every look at a run, where runs are watched

  @property
  def plain(self) -> dict:
    return configs.to_dict(self.config)

  def sampler(self, variant: Variant, seed: int, ref: reference.Reference | None) -> Sampler:
    rows = self.config.train.rows.to_dict() | self.config.train.groups.to_dict()
    shards = batch_shards(self.trainer.model.mesh)
    return Sampler(variant.texts[seed], variant.objective, rows, ref, seed, shards, self.config.train.accumulate)

  def control(self) -> Control | None:
    """The config's controller, which looks at another split than the one that is reported."""
    chosen = self.config.control
    if not chosen.name:
      return None
    split = getattr(self.data, chosen.split)
    rows = encode(triple_choices(split.triples), self.trainer.model.tokenizer, self.trainer.model.config.max_positions)

    def look(adapters: Mapping) -> tuple[dict[str, float], float]:
      scores = score(self.trainer.model, rows, adapters)
      sentences = stereoset.sentence_scores(split.triples, scores, self.config.eval.scoring)
      found = stereoset.reduce(split.triples, sentences, draws=2)
      by_type = {group: estimates["ss"].value for group, estimates in found.estimates.items() if group != "overall"}
      return by_type, found.estimates["overall"]["lms"].value

    if chosen.name == "signed":
      controller = Signed(chosen.every, chosen.hysteresis, chosen.tolerance)
    else:
      controller = Published(chosen.script, max_steps=self.config.train.steps, processes=chosen.processes)
    return Control(controller, look, start_lms=look({})[1])

  def watch(self, tracker: Tracker) -> Watch | None:
    """With what the start model says about the probe, asked once for all runs."""
    if not self.probe:
      return None
    tracker.phase("watch: what the start model says", len(self.probe.segments), 0.0)
    start = self.trainer.adapters(self.trainer.initial_state(0))
    path, chosen = self.workdir / "watch_start.npz", self.config.watch
    found = probes.start(self.trainer.model, self.probe, start, path, self.config.eval.scoring, tracker.advance)
    return Watch(configs.watched(self.config), self.probe, found, self.config.eval.scoring,
                 self.config.eval.bootstrap_draws, chosen.batches)  # fmt: skip

  def shapes(self) -> dict[Objective, Shape]:
    """One packed shape an objective: variants that compose the same losses share one compiled step."""
    samplers: dict[Objective, list[Sampler]] = {}
    for variant in self.variants:
      samplers.setdefault(variant.objective, []).extend(self.sampler(variant, s, None) for s in self.config.seeds)
    return {objective: plan_shape(members, self.config.train.steps) for objective, members in samplers.items()}

  def reference_segments(self) -> list[Segment]:
    """The distinct texts about which some loss asks the start model."""
    if self.config.train.reference == "step":
      return []
    asking = [v for v in self.variants if v.objective.needs & {"ref_logprob", "ref_hidden"}]
    segments = (s for variant in asking for texts in variant.texts.values() for s in texts.all_segments())
    return list({reference.key_of(segment): segment for segment in segments}.values())

  def fisher_segments(self, variant: Variant) -> tuple[Segment, ...]:
    """The general texts on which the Fisher information is estimated; () where no loss reads it."""
    if "fisher" not in variant.objective.needs:
      return ()
    model, most = self.trainer.model, configs.remedy(self.plain, variant.name)["fisher_texts"]
    return fisher.general_segments(self.data.train, self.split, model.tokenizer, model.config.max_positions, most)

  def read_cost(self, segments) -> float:
    """Tokens of one forward pass over `segments`, padding included."""
    planned = packed_batches(segments, batch_shards(self.trainer.model.mesh)) if segments else []
    return float(sum(shape.B * shape.T for *_, shape in planned))


def compare(config, workdir: Path, command: str, profile: tuple[int, int] | None = None) -> dict:
  """Run what is missing under `workdir`, write results.json, and return what is in it.

  profile: the first and the last step of each run of which jax.profiler keeps a trace, in the run's folder.
  Raises UserError when the folder belongs to another config, or when the config, the model or the data cannot be used.
  A variant whose training fails gets a row that says why; the others are completed.
  """
  comparison = prepare(config, workdir, command)
  if profile and profile[1] > config.train.steps:
    raise UserError(f"--profile ends at step {profile[1]}, the runs at train.steps = {config.train.steps}.")
  return run(comparison, command, profile)


def prepare(config, workdir: Path, command: str) -> Comparison:
  """Check everything that can be wrong, load data and model, tokenise; claims `workdir` before the slow part."""
  configs.validate(config)
  plain = configs.to_dict(config)
  specs = {name: plain["variants"][name] for name in configs.compared(config)}
  parsed = {name: parse(spec["losses"]) for name, spec in specs.items()}
  recipes = {name: methods.recipe(spec["method"], spec.get("texts", {})) for name, spec in specs.items()}
  if config.log.wandb_project:
    package()
  data = load_data(config.data, config.watch.general)
  if distributed.from_first(lambda: data.fingerprint) != data.fingerprint:
    raise UserError("this process reads other data than the first one; give every machine the same files.")
  distributed.from_first(lambda: claims.claim(workdir, plain, command))
  dtype = None if config.dtype == "auto" else config.dtype
  model = language_model.load(config.model, dtype, make_mesh(config.mesh), config.train.remat, config.mesh.rules)
  inputs = {"model": model.fingerprint, "tokenizer": model.tokenizer.fingerprint, "data": data.fingerprint}
  distributed.from_first(lambda: provenance.bind(
    workdir, inputs | provenance.files_named(plain), model.mesh.shape, command, computed=claims.computed(workdir)
  ))  # fmt: skip

  def variant(name: str) -> Variant:
    objective, coefficients = parsed[name]
    peak = plain["train"]["learning_rate"] * specs[name]["learning_rate_scale"]
    texts = {
      seed: tokenise(recipes[name](data.train, seed), objective, model.tokenizer, model.config.max_positions,
                     config.data.max_tokens)
      for seed in plain["seeds"]
    }
    remedy = transforms.coefficients(configs.remedy(plain, name), plain["train"]["steps"], model.config)
    traced = {"learning_rate": peak, "losses": coefficients, **remedy}
    return Variant(name, specs[name], objective, traced, texts)

  split = getattr(data, config.eval.split)
  variants = tuple(map(variant, specs))
  encoded = tradeoff.encode_split(model, split)
  trainer = Trainer.of(model, config)
  for found in variants:
    trainer.check_rules(found.objective)
    trainable.check(found.objective, model.params, tuple(config.train.base))
    if config.train.accumulate > 1 and (why := found.objective.coupled()):
      raise UserError(f"train.accumulate = {config.train.accumulate} would change what is trained: {why}; set it to 1.")
  probe = _probe(config, model, data) if configs.watched(config) else None
  return Comparison(config, workdir, data, split, trainer, variants, encoded, probe)


def run(job: Comparison, command: str, profile: tuple[int, int] | None = None) -> dict:
  """Reference, base, then every variant and seed that is not finished yet; then the results."""
  seeds, steps, model = job.config.seeds, job.config.train.steps, job.trainer.model
  shapes, asked = job.shapes(), job.reference_segments()
  evaluation_cost = sum(job.read_cost(encoded.segments) for encoded in job.encoded.values())
  looks, read_each = len(configs.watched(job.config)), job.read_cost(job.probe.segments) if job.probe else 0.0
  trained = steps * job.config.train.accumulate + looks * job.config.watch.batches
  train_cost = {o: TRAINED_TOKEN * trained * shape.B * shape.T + looks * read_each for o, shape in shapes.items()}
  finished = distributed.from_first(lambda: _finished(job))
  todo = [(v, s) for v in job.variants for s in seeds if f"{v.name}-seed{s}" not in finished]
  held_by = {v.name: job.fisher_segments(v) for v, _ in todo}
  held_cost = {name: TRAINED_TOKEN * job.read_cost(segments) for name, segments in held_by.items()}
  cost = job.read_cost(asked) + sum(train_cost[v.objective] + evaluation_cost for v, _ in todo) + evaluation_cost
  cost += sum(held_cost[v.name] for v, _ in todo)
  distributed.from_first(lambda: _write_card(job))
  failures = {}
  with Tracker("comparison", cost, quiet=not distributed.first(), check=preemption.check) as tracker:
    tracker.phase("reference: what the start model says", len(asked), job.read_cost(asked))
    ref = reference.compute(model, asked, cache_folder() / "reference", tracker.advance) if asked else None
    if "base" not in finished:
      tracker.phase("evaluate base", _texts_evaluated(job), evaluation_cost)
      _evaluate(job, "base", job.trainer.adapters(job.trainer.initial_state(0)), tracker, {})
    control, watch = (job.control(), job.watch(tracker)) if todo else (None, None)
    for variant, seed in todo:
      name, factor = f"{variant.name}-seed{seed}", variant.spec.get("adapter_scale", 1.0)
      held = {}
      if segments := held_by[variant.name]:
        tracker.phase("fisher: which weights general text rests on", len(segments), held_cost[variant.name])
        found = fisher.compute(model, segments, job.trainer.moved, cache_folder() / "fisher", tracker.advance)
        held = fisher.normalised(found)
      spec = Run(job.workdir / name, {**job.plain, "variant": variant.name, "seed": seed}, variant.objective,
                 variant.coefficients, job.sampler(variant, seed, ref), shapes[variant.objective], control,
                 factor, held, watch, profile)  # fmt: skip
      spec.folder.mkdir(parents=True, exist_ok=True)
      tracker.phase(f"train {name}", steps, train_cost[variant.objective])
      try:
        state = train(job.trainer, spec, lambda record: tracker.reach(record["step"], _note(record)))
      except TrainingFailed as failure:
        failures[variant.name] = str(failure)
        tracker.say(f"jaxbias: {failure}")
        continue
      spent = goodput.summary(read_jsonl(spec.folder / "metrics.jsonl"))
      tracker.say(f"{name}: {goodput.describe(spent)}")
      tracker.phase(f"evaluate {name}", _texts_evaluated(job), evaluation_cost)
      _evaluate(job, name, scaled(job.trainer.adapters(state), factor, model.params), tracker, spent)
  results = summarise(job, failures, command)
  distributed.from_first(lambda: write_json(job.workdir / "results.json", results))
  return results


def _evaluation(job: Comparison, name: str) -> Path:
  return job.workdir / name / "evaluation.json"


def _finished(job: Comparison) -> list[str]:
  """Of the base and all runs those that are evaluated."""
  names = ["base", *(f"{variant.name}-seed{seed}" for variant in job.variants for seed in job.config.seeds)]
  return [name for name in names if _evaluation(job, name).exists()]


def _texts_evaluated(job: Comparison) -> int:
  return sum(len(encoded.wanted) for encoded in job.encoded.values())


def _note(record: Mapping) -> str:
  parts = " ".join(f"{name} {value:.2f}" for name, value in record["parts"].items())
  rate = f"{record['tokens_per_second']:,.0f} tokens/s  " if "tokens_per_second" in record else ""
  mfu = f"MFU {100 * record['mfu']:.1f} %  " if "mfu" in record else ""
  return f"{rate}{mfu}loss {record['loss']:.2f} ({parts})"


def _evaluate(job: Comparison, name: str, adapters: Mapping, tracker: Tracker, train_record: Mapping) -> None:
  began = time.perf_counter()
  scores = tradeoff.measure(job.trainer.model, job.encoded, adapters, tracker.advance)
  record = {"scores": scores, "train": train_record, "seconds": time.perf_counter() - began}
  distributed.from_first(lambda: write_json(_evaluation(job, name), record))


def summarise(job: Comparison, failures: Mapping[str, str], command: str) -> dict:
  """results.json (schema 1): estimates of every metric for the base and each variant, and the training curves."""
  read = lambda name: json.loads(_evaluation(job, name).read_text(encoding="utf-8"))
  base = read("base")
  how = {"scoring": job.config.eval.scoring, "draws": job.config.eval.bootstrap_draws}

  def row(name: str, label: str, runs: list[dict], **more) -> dict:
    overall, domains = tradeoff.estimates(job.split, base["scores"], [run["scores"] for run in runs], **how)
    plain = lambda found: {metric: dataclasses.asdict(estimate) for metric, estimate in found.items()}
    return {"name": name, "label": label, "estimates": plain(overall),
            "domains": {domain: plain(found) for domain, found in domains.items()}, **more}  # fmt: skip

  rows, curves, watched, seconds = [row("base", "base model", [base], train=None)], {}, {}, base["seconds"]
  for variant in job.variants:
    about = {"losses": variant.spec["losses"]}
    if variant.name in failures:
      rows.append({"name": variant.name, "label": variant.spec["label"], "failed": failures[variant.name], **about})
      continue
    runs = [read(f"{variant.name}-seed{seed}") for seed in job.config.seeds]
    spent = {key: [r["train"][key] for r in runs] for key in ("seconds", "tokens", "goodput")}
    rows.append(row(variant.name, variant.spec["label"], runs, train=spent, **about))
    seconds += sum(spent["seconds"]) + sum(r["seconds"] for r in runs)
    curves[variant.name] = {
      str(seed): read_jsonl(job.workdir / f"{variant.name}-seed{seed}" / "metrics.jsonl") for seed in job.config.seeds
    }
    if job.probe:
      watched[variant.name] = {
        str(seed): read_jsonl(job.workdir / f"{variant.name}-seed{seed}" / WATCH_FILE) for seed in job.config.seeds
      }
  model, provenance_file = job.trainer.model, job.workdir / provenance.FILE
  return {
    "schema": 1,
    "title": job.config.title,
    "model": {"source": job.config.model, "fingerprint": model.fingerprint, "parameters": model.num_parameters,
              "trainable": job.trainer.num_trainable},
    "data": {"name": job.data.name, "fingerprint": job.data.fingerprint, "counts": counts(job.data),
             "card": json.loads((job.workdir / "data_card.json").read_text(encoding="utf-8"))},
    **json.loads(provenance_file.read_text(encoding="utf-8")),
    "command": command,
    "seeds": list(job.config.seeds),
    "steps": job.config.train.steps,
    "wall_seconds": seconds,
    "interval": f"95 % bootstrap over target terms of the {job.config.eval.split} split (general text: over "
                f"sentences), {job.config.eval.bootstrap_draws:,} draws; noise between seeds is not in it",
    "metrics": {name: dict(zip(("label", "unit", "ideal", "better", "help"), about, strict=True))
                for name, about in tradeoff.METRICS.items()},
    "rows": rows,
    "curves": curves,
    **({"watch": watched} if watched else {}),
  }  # fmt: skip


def _write_card(job: Comparison) -> None:
  """data_card.json and data_card.md: of each variant the texts of the first seed."""
  read = {variant.name: variant.texts[job.config.seeds[0]].rows for variant in job.variants}
  made = card.make(job.data, job.config.eval.split, read, job.trainer.model.tokenizer, job.config.data.max_tokens)
  write_json(job.workdir / "data_card.json", made)
  replace(job.workdir / "data_card.md", card.markdown(made).encode())


def _probe(config, model: LanguageModel, data: DataSet) -> probes.Probe:
  """What `config.watch` has read: the triples of its split, and general text of this split or of a file."""
  chosen, split = config.watch, getattr(data, config.watch.split)
  general = probes.read_general(chosen.general, chosen.group) if chosen.general else probes.general(split.texts)
  masks = probes.Masks(chosen.mask_draws, chosen.mask_share, chosen.mask_seed)
  return probes.make(model, split.triples, general, masks)
