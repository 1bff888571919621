"""The diagnosis as a run: objective x remedy x data size x seed -> one table of checkpoints, its statistics, a report.

The grid is expanded into the variants of one comparison (`jaxbias/compare.py`), so that runs are resumable and lie in
one folder each; what a run is asked along the way is `config.watch`'s business. Everything that was finished is kept:

  workdir/planted/, pretrain/   the planted language and the start model that learned it, where `diagnose.planted` is on
  workdir/grid/                 the comparison
  workdir/table.jsonl, table.csv, cards.json, findings.json, report.md, figures/

`config.diagnose` begins as `methods.grid.settings`; every key can be overridden on the command line.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxbias import compare as comparison
from jaxbias import methods
from jaxbias.data import planted
from jaxbias.data.corpora import CORPORA, Pool, make, read_texts
from jaxbias.errors import UserError, did_you_mean
from jaxbias.evals import diagnosis, registry
from jaxbias.evals.scoring import score
from jaxbias.files import new_folder, replace, write_json
from jaxbias.inputs import load_data
from jaxbias.methods.grid import REMEDIES, variants
from jaxbias.models import language_model
from jaxbias.report.diagnosis import write as write_report
from jaxbias.train.metrics import read_jsonl
from jaxbias.train.watch import FILE as WATCH

CDA = ("two_sided", "one_sided")  # fairness objectives; the other corpora are controls
KEYS = (*diagnosis.RUN, "step", "steps", "lr")


def diagnose(config: ConfigDict, workdir: Path, command: str) -> Path:
  """Run what is missing under `workdir` and return the report's path.

  Raises UserError for a grid that cannot be run, before anything is trained.
  """
  check(config)
  if config.diagnose.planted:
    config = plant(config, workdir, command)
  grid = expanded(config)
  results = comparison.compare(grid, workdir / "grid", command)
  failed = [row["name"] for row in results["rows"] if row.get("failed")]
  about = grid.diagnose.to_dict()
  table = collect(grid, workdir / "grid")
  write_table(workdir, table)
  write_json(workdir / "cards.json", list(cards(grid)))
  write_json(workdir / "findings.json", findings(table, about, failed))
  return write_report(workdir)


def check(config: ConfigDict) -> None:
  """Raises UserError for a diagnosis that could not be run to its end."""
  if "diagnose" not in config:
    raise UserError("this config has no `diagnose` section; see configs/diagnose_planted.py for one.")
  chosen = config.diagnose
  for key in ("objectives", "remedy_objectives"):
    if unknown := [name for name in chosen[key] if name not in CORPORA]:
      raise UserError(f"diagnose.{key} has `{unknown[0]}`; {did_you_mean(unknown[0], CORPORA)}")
    if key == "remedy_objectives" and set(chosen[key]) - set(chosen.objectives):
      raise UserError("diagnose.remedy_objectives has an objective that diagnose.objectives lacks, so that there would "
                      "be no run without a remedy to compare with.")  # fmt: skip
  if set(chosen.remedy_sizes) - set(chosen.sizes):
    raise UserError("diagnose.remedy_sizes has a size that diagnose.sizes lacks; each needs a run without a remedy.")
  for name, how in chosen.remedies.items():
    if how["remedy"] not in REMEDIES:
      raise UserError(f"diagnose.remedies.{name} is `{how['remedy']}`; {did_you_mean(how['remedy'], REMEDIES)}")
  for name, column in chosen.columns.items():
    registry.get(column["benchmark"])
    if not chosen.planted and not Path(column["data"]).exists():
      raise UserError(f"diagnose.columns.{name}.data = `{column['data']}`: there is no such file.")
  if not config.watch.steps:
    raise UserError("watch.steps is empty, and the diagnosis reads what runs forget along the way; set it to log.")
  if not chosen.planted and not config.data.corpus:
    raise UserError("data.corpus is empty; name a file of texts, one {\"id\", \"text\"} a line.")


def plant(config: ConfigDict, workdir: Path, command: str) -> ConfigDict:
  """The config with the planted language as data and, as its model, one that was fitted to it."""
  language = workdir / "planted"
  if not language.exists():
    with new_folder(language) as folder:
      planted.write(folder)
  fit = _unlocked(config)
  chosen, fit.diagnose.planted = config.diagnose.pretrain, False
  fit.title, fit.model, fit.seeds = "The planted language's start model", str(language / "model"), (0,)
  fit.data.source, fit.data.corpus = str(language), str(language / "pretraining.jsonl")
  fit.lora.rank, fit.train.base, fit.watch.steps = 0, ("*",), ""
  fit.train.steps, fit.train.learning_rate, fit.train.schedule = chosen.steps, chosen.learning_rate, "cosine"
  fit.train.warmup_steps, fit.train.checkpoint_every = min(20, chosen.steps), chosen.steps
  fit.train.rows = {"forget": 1, "retain": chosen.rows, "general": 1}
  texts = len(read_texts(language / "pretraining.jsonl"))
  fit.variants = {"fit": methods.variant("cda") | {"texts": {"corpus": "random", "n": texts}}}
  fit.compare = ("fit",)
  comparison.compare(fit, workdir / "pretrain", command)
  out = _unlocked(config)
  out.model, out.data.source, out.data.corpus = (
    str(workdir / "pretrain" / "fit-seed0"), str(language), str(language / "pool.jsonl"))  # fmt: skip
  for column in out.diagnose.columns.values():
    column["data"] = str(language / column["data"])
  return out


def _unlocked(config: ConfigDict) -> ConfigDict:
  out = copy.deepcopy(config)
  out.unlock()
  return out


def expanded(config: ConfigDict) -> ConfigDict:
  """The config of the comparison: one variant for each cell of the grid, whose `cell` says which."""
  out = _unlocked(config)
  cells = dict(variants(config.diagnose))
  out.variants, out.compare = cells, tuple(cells)  # the config sorts its keys, the table goes by the grid
  return out


def collect(config: ConfigDict, workdir: Path) -> list[dict]:
  """The tidy table of a finished comparison: a row for each look at each run; what is missing says why."""
  start = language_model.load(config.model, None if config.dtype == "auto" else config.dtype)
  at_start = columns_of(config, workdir / "base", lambda: start)
  table, steps = [], config.train.steps
  for name in config.compare:
    spec = config.variants[name]
    for seed in config.seeds:
      folder = workdir / f"{name}-seed{seed}"
      cell = {"model": start.name, **spec["cell"], "seed": seed, "steps": steps,
              "lr": config.train.learning_rate * spec["learning_rate_scale"]}  # fmt: skip
      failed = not (folder / "evaluation.json").exists()
      at_end = {} if failed else columns_of(config, folder, lambda folder=folder: language_model.load(str(folder)))
      for line in read_jsonl(folder / WATCH):
        told = at_start if line["step"] == 0 else at_end if line["step"] == steps else {}
        why = "the run failed" if failed else "measured at the start and the end alone"
        missing = {column: why for column in config.diagnose.columns if column not in told}
        table.append({**cell, "step": line["step"], **of_look(line), **dict.fromkeys(missing), **told,
                      "missing": missing})  # fmt: skip
  return table


def of_look(line: Mapping) -> dict[str, float | None]:
  """The columns of one line of watch.jsonl: what it says of whole sentences; `b` = |SS - 50|; `gap`, the preference on
  what differs alone (log p(stereotype) - log p(anti-stereotype), nats a token), and its size; the distance."""
  value = lambda group: {name: found["value"] for name, found in line[group].items()}
  bias, gap = value("bias"), value("span")["preference"]
  return {**value("overall"), **bias, "b": abs(bias["ss"] - 50.0), "gap": gap, "gap_size": abs(gap),
          "distance": line["distance"]}  # fmt: skip


def columns_of(config: ConfigDict, folder: Path, load) -> dict[str, float]:
  """The benchmarks of `diagnose.columns` for one model, kept in the run's folder; `load()` gives the model."""
  path, asked = folder / "columns.json", {name: c.to_dict() for name, c in config.diagnose.columns.items()}
  kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  known = {name: entry["value"] for name, entry in kept.items() if entry["asked"] == asked.get(name)}
  if lacking := asked.keys() - known.keys():
    model = load()
    known |= {name: benchmark(model, **asked[name]) for name in sorted(lacking)}
    write_json(path, {name: {"asked": asked[name], "value": known[name]} for name in asked})
  return known


def benchmark(model, benchmark: str, data: str, metric: str, group: str = "overall", limit: int = 0) -> float:
  """One number of one benchmark; limit: the first so many examples, 0 = all."""
  task = registry.get(benchmark)
  examples = task.load(data)[: limit or None]
  estimates = task.reduce(examples, score(model, task.rows(examples)), draws=2).estimates
  if metric not in estimates.get(group, {}):
    raise UserError(f"`{benchmark}` has no `{metric}` of `{group}`; {did_you_mean(group, estimates)}")
  return estimates[group][metric].value


def cards(config: ConfigDict) -> Iterator[dict]:
  """What every corpus of the grid is made of."""
  train = load_data(config.data, config.watch.general).train
  pool = Pool(train.pool, train.overlapping)
  for objective in config.diagnose.objectives:
    for n in config.diagnose.sizes:
      yield from (make(pool, objective, n, seed)[1].to_json() for seed in config.seeds)


def write_table(workdir: Path, table: Sequence[Mapping]) -> None:
  """table.jsonl with the reasons of what is missing, and table.csv, where it is an empty cell."""
  replace(workdir / "table.jsonl", "".join(f"{json.dumps(row)}\n" for row in table).encode())
  names = list(dict.fromkeys(name for row in table for name in (*KEYS, *row) if name != "missing"))
  out = io.StringIO()
  writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
  writer.writeheader()
  writer.writerows(table)
  replace(workdir / "table.csv", out.getvalue().encode())


def findings(table: Sequence[Mapping], about: Mapping, failed: Sequence[str] = ()) -> dict[str, Any]:
  """Every statistic of the report, as plain data. about: the config's `diagnose` section; failed: variants' names."""
  performance, bias, draws = about["performance"], about["bias"], about["draws"]
  trained = [row for row in table if row["step"] > 0]
  fair = [row for row in table if row["objective"] in CDA]
  given = ((), ("f_sel",), ("distance",))
  correlations = [diagnosis.correlate(trained, performance, "f_all", z, kind, draws=draws)
                  for kind in ("pearson", "spearman") for z in given]  # fmt: skip
  correlations += [diagnosis.correlate(trained, performance, "f_sel", ("f_all",), draws=draws)]
  controls = [{"column": column, "one": one, "other": other,
               "estimate": _plain(found := diagnosis.paired_ends(table, column, one, other))[0], "pairs": found[1]}
              for column in ("f_all", performance, "gap")
              for one, other in (("two_sided", "unswapped"), ("unswapped", "random"))]  # fmt: skip
  tolerance = diagnosis.noise(diagnosis.where(table, objective="random", remedy="none"), "f_all")
  free = None if tolerance is None else diagnosis.free_share(fair, about["delta"], tolerance)
  runs = len(diagnosis.runs(table))
  return {
    "about": dict(about), "runs": runs, "points": len(table),
    "models": sorted({row["model"] for row in table}),
    "failed": list(failed),
    "power": {"runs_for_r_055": diagnosis.runs_needed(0.55),
              "smallest_spearman_p": diagnosis.smallest_spearman_p(runs)},
    "correlations": _plain(correlations), "controls": controls,
    "slopes": _plain(diagnosis.slopes(fair, "f_sel", "f_all")),
    "tolerance": tolerance, "free": free,
    "matched": [{**_plain(found), "verdict": found.test and found.test.verdict}
                for found in diagnosis.matched(fair, bias, about["level"], about["margins"])],
    "sizes": _plain(diagnosis.smallest_n(diagnosis.where(fair, remedy="none"), bias, about["target"])),
  }  # fmt: skip


def _plain(value: Any) -> Any:
  """Dataclasses, inside lists and tuples too, as what JSON has; a number that is not finite becomes None."""
  if dataclasses.is_dataclass(value):
    return _plain(dataclasses.asdict(value))
  if isinstance(value, Mapping):
    return {str(key): _plain(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
