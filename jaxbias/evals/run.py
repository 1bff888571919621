"""`evaluate` and `score` as the command line runs them: load, score with progress, reduce, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from jaxbias import provenance
from jaxbias.data import sources
from jaxbias.data.rows import Choice, Triple
from jaxbias.errors import UserError
from jaxbias.evals import stereoset as benchmark
from jaxbias.evals.scoring import Scores, encode, score
from jaxbias.files import write_json
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.progress import Tracker


def score_rows(source: str, rows: Sequence[Choice], out: Path, dtype: str | None) -> None:
  """Write {id: [[sum, tokens], ...]} for `rows`, in their order."""
  model = language_model.load(source, dtype)
  write_json(out, _scored(model, rows))


def stereoset(source: str, data: str, dtype: str | None, limit: int | None, out: Path | None) -> Table:
  """SS, LMS and ICAT of the intrasentence task under both scorings, overall and per domain."""
  triples = _triples(data)
  total, triples = len(triples), triples[:limit]
  if not triples:
    raise UserError(f"--limit={limit} leaves no example to evaluate.")
  model = language_model.load(source, dtype)
  scores = _scored(model, benchmark.rows(triples))
  found = {
    scoring: benchmark.reduce(triples, benchmark.sentence_scores(triples, scores, scoring)).estimates
    for scoring in benchmark.SCORINGS
  }
  subset = f", the first {len(triples):,} of {total:,} triples" if len(triples) < total else f", {total:,} triples"
  if out:
    write_json(out, {
      "benchmark": benchmark.BENCHMARK.name, "metrics": benchmark.BENCHMARK.describe(), "data": data,
      "examples": len(triples), "of": total, "model": {"source": source, "fingerprint": model.fingerprint},
      "tokenizer": model.tokenizer.fingerprint, "dtype": model.config.dtype, "versions": provenance.versions(),
      "estimates": {scoring: {group: {name: dataclasses.asdict(value) for name, value in estimates.items()}
                              for group, estimates in groups.items()} for scoring, groups in found.items()},
      "scores": scores,
    })  # fmt: skip
  return _table(f"StereoSet intrasentence, {source} in {model.config.dtype}{subset}", found)


def _triples(data: str) -> Sequence[Triple]:
  if data == "builtin":
    loaded = sources.load("builtin")
    return (*loaded.train.triples, *loaded.validation.triples, *loaded.test.triples)
  return sources.stereoset_triples(data)


def _scored(model: LanguageModel, rows: Sequence[Choice]) -> Scores:
  encoded = encode(rows, model.tokenizer, model.config.max_positions)
  with Tracker("scoring", 1.0) as tracker:
    tracker.phase("score", len(rows), 1.0)
    return score(model, encoded, advance=tracker.advance)


def _table(title: str, found: dict) -> Table:
  table = Table(title=title, caption="in brackets: 95 % bootstrap over target terms", title_justify="left")
  for column in ("scoring", "domain", "SS % -> 50", "LMS % up", "ICAT % up"):
    table.add_column(column, justify="left" if column in ("scoring", "domain") else "right")
  show = lambda e: f"{e.value:.2f}" + (rf" \[{e.low:.1f}, {e.high:.1f}]" if e.low is not None else "")
  for scoring, groups in found.items():
    for group, estimates in groups.items():
      table.add_row(scoring, group, *(show(estimates[name]) for name in ("ss", "lms", "icat")))
    table.add_section()
  return table

