"""`evaluate` and `score` as the command line runs them: read, ask with progress, reduce, write."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxbias import distributed, provenance
from jaxbias.data import fields
from jaxbias.data.rows import Choice, Prompt
from jaxbias.errors import UserError
from jaxbias.evals import answers, datafiles, generation, registry, show
from jaxbias.evals.metrics import Result
from jaxbias.evals.scoring import encode, score
from jaxbias.evals.task import EITHER, EMBEDDINGS, Task
from jaxbias.files import write_json
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.progress import Tracker

SCHEMA = 2
MOST = 20  # rows that an error names


@dataclasses.dataclass
class Measured:
  """A benchmark on its way: what was read, what the model said, what came out."""

  task: Task
  source: str
  read: Sequence[Any]
  of: int  # examples that the data hold
  reading: fields.Reading
  kept: Sequence[Any] = ()
  rows: tuple = ()
  told: dict[str, Any] = dataclasses.field(default_factory=dict)
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  truncated: int = 0
  padding: float = 0.0
  seconds: float = 0.0
  answers_in: str = ""
  result: Result | None = None

  @property
  def subset(self) -> str | None:
    return show.subset(len(self.read), self.of)

  @property
  def refused(self) -> list[str]:
    """Why rows could not be asked, each with the place where to look."""
    return [f"{self.source}: {why if identity in why else f'row {identity}: {why}'}"
            for identity, why in self.failed.items()]

  @property
  def about(self) -> str:
    lost = len(self.read) - len(self.kept) + len(self.reading.malformed)
    parts = [self.subset or f"{self.of:,} example{'s' * (self.of != 1)}", f"{lost} left out" if lost else "",
             f"{self.truncated} cut on the left" if self.truncated else ""]
    return ", ".join(filter(None, parts))


def evaluate(
  source: str,
  names: Sequence[str],
  data: Sequence[str],
  *,
  dtype: str | None = None,
  limit: int | None = None,
  truncate: str | None = None,
  scorer: str | None = None,
  out: Path | None = None,
  command: str = "",
) -> tuple[list[Table], list[str]]:
  """Tables of the benchmarks `names` for one model, and what was wrong with rows that had to be left out.

  data: sources as `datafiles.sources` reads them. `out` is written anew after each benchmark, by the first process
  alone. Raises UserError for what cannot be begun: a name, data or a model that is not there, or a model that a
  benchmark cannot ask.
  """
  tasks = _tasks(names, scorer)
  if out and out.is_dir():
    raise UserError(f"{out} is a folder; --out has to be a file.")
  sources = datafiles.sources([task.name for task in tasks], data)
  found = [_read(task, sources[task.name], limit) for task in tasks]
  model = language_model.load(source, dtype)
  for task in tasks:
    _check(task, model)
  wrong: dict[str, None] = {}
  cost = sum(_cost(row) for row in _distinct(found)) or 1.0
  with Tracker("evaluate", cost, quiet=not distributed.first()) as tracker:
    asker = Asker(model, truncate, tracker)
    for measured in found:
      try:
        asker.measure(measured)
        refused = measured.refused
      except UserError as error:
        refused = [f"{measured.task.name}: {error}"]
      wrong |= dict.fromkeys([*measured.reading.malformed, *refused])
      if out and distributed.first():
        write_json(out, _plain(_record(source, model, asker, [m for m in found if m.result], command, list(wrong))))
  title = f"{model.name} in {model.config.dtype}"
  return show.tables(title, [(m.task, m.about, m.result) for m in found if m.result]), list(wrong)


def failure(wrong: Sequence[str], out: Path | None) -> UserError:
  """What the command ends with where something had to be left out."""
  more = [f"and {len(wrong) - MOST} more{f', all in {out}' if out else ''}."] if len(wrong) > MOST else []
  count = f"{len(wrong)} row{'s' * (len(wrong) != 1)} or benchmark{'s' * (len(wrong) != 1)}"
  return UserError("\n  ".join([f"{count} had to be left out, all others are scored:", *wrong[:MOST], *more]))


def _tasks(names: Sequence[str], scorer: str | None) -> list[Task]:
  tasks = [registry.get(name) for name in dict.fromkeys(names)]
  if not scorer:
    return tasks
  texts = {task.name for task in generation.TASKS}
  if not texts & {task.name for task in tasks}:
    raise UserError(f"--scorer is for what a model writes; it goes with {', '.join(sorted(texts))}.")
  return [generation.with_scorer(task, scorer) if task.name in texts else task for task in tasks]


def _read(task: Task, source: str, limit: int | None) -> Measured:
  if source == "builtin" and registry.family_of(task.name) != "stereoset":
    raise UserError(f"there is no built-in data for `{task.name}`; it reads: {show.expected(task)}")
  with fields.tolerant() as reading:
    try:
      examples = task.load(datafiles.local(source))
    except UserError:
      if reading.malformed:  # of all its rows: the first says more than "no rows"
        raise UserError(reading.malformed[0]) from None
      raise
  if not examples and reading.malformed:
    raise UserError(reading.malformed[0])
  if not examples[:limit]:
    raise UserError(f"--limit={limit} leaves no example to evaluate.")
  return Measured(task, source, examples[:limit], len(examples), reading)


def _check(task: Task, model: LanguageModel) -> None:
  kind = "causal" if model.config.causal else "masked"
  if task.models not in (kind, EITHER):
    others = [other.name for other in registry.members()[registry.family_of(task.name)] if other.models != task.models]
    instead = f"; {kind} models have {', '.join(others)}" if others else ""
    raise UserError(f"`{task.name}` is for {task.models} language models, and {model.name} is a {kind} one{instead}.")


class Asker:
  """Asks a model each row once, however many benchmarks read the answer."""

  def __init__(self, model: LanguageModel, truncate: str | None, tracker: Tracker):
    self.model, self.truncate, self.tracker = model, truncate, tracker
    self.known: dict[tuple, Any] = {}  # (ask, bos, row): its answer
    self.failed: dict[tuple, str] = {}
    self.first: dict[tuple, Measured] = {}  # who asked just these rows first

  def measure(self, m: Measured) -> None:
    """Fill in `m`. Examples with a row that the model cannot be asked are left out, and the others reduced."""
    began = time.monotonic()
    m.kept = self._askable(m)
    while m.kept:
      m.rows = tuple(m.task.rows(m.kept))
      m.told, failed = self._ask(m)
      m.failed |= failed
      if not failed:
        break
      m.kept = [example for example in m.kept if not failed.keys() & {row.id for row in m.task.rows([example])}]
    if not m.kept:
      raise UserError(f"the model can be asked none of the rows; {m.refused[0]}")
    first = self.first.setdefault((m.task.ask, m.task.bos, m.rows), m)
    m.answers_in, m.truncated, m.padding = first.task.name, first.truncated, first.padding
    m.result = m.task.reduce(m.kept, m.told)
    m.seconds = time.monotonic() - began

  def _askable(self, m: Measured) -> Sequence[Any]:
    try:
      m.task.rows(m.read)
      return m.read
    except UserError:
      kept = []
      for example in m.read:
        try:
          m.task.rows([example])
          kept.append(example)
        except UserError as error:
          m.failed[_identity(example)] = str(error)
      return kept

  def _ask(self, m: Measured) -> tuple[dict[str, Any], dict[str, str]]:
    key = lambda row: (m.task.ask, m.task.bos, row)
    new = [row for row in dict.fromkeys(m.rows) if key(row) not in self.known and key(row) not in self.failed]
    if new:
      self.tracker.phase(m.task.name, len(new), sum(map(_cost, new)))
      said = answers.answer(self.model, new, m.task.ask, bos=m.task.bos, truncate=self.truncate,
                            advance=self.tracker.advance)  # fmt: skip
      self.known |= {key(row): said.by_id[row.id] for row in new if row.id in said.by_id}
      self.failed |= {key(row): said.failed[row.id] for row in new if row.id in said.failed}
      m.truncated, m.padding = m.truncated + said.truncated, said.padding
    return ({row.id: self.known[key(row)] for row in m.rows if key(row) in self.known},
            {row.id: self.failed[key(row)] for row in m.rows if key(row) in self.failed})


def _distinct(found: Sequence[Measured]) -> set:
  rows = set()
  for m in found:
    try:
      rows |= {(m.task.ask, m.task.bos, row) for row in m.task.rows(m.read)}
    except UserError:  # it will be named when it is asked
      pass
  return {row for *_, row in rows}


def _cost(row: Any) -> float:
  """Characters that are read; a written token costs about as much as forty of them."""
  if isinstance(row, Prompt):
    return len(row.text) + 40.0 * row.samples * row.max_tokens
  return float(sum(map(len, (getattr(row, "context", getattr(row, "text", "")), *getattr(row, "options", ())))))


def _identity(example: Any) -> str:
  return str(getattr(example, "id", None) or getattr(example, "name", example))


def _record(source: str, model: LanguageModel, asker: Asker, found: Sequence[Measured], command: str,
            wrong: Sequence[str]) -> dict:
  return {
    "schema": SCHEMA, "command": command, "created": provenance.now(),
    "model": {"source": source, "name": model.name, "fingerprint": model.fingerprint,
              "parameters": model.num_parameters},
    "tokenizer": model.tokenizer.fingerprint, "dtype": model.config.dtype, "truncate": asker.truncate,
    "versions": provenance.versions(), "git": provenance.git(), "hardware": provenance.hardware(),
    "benchmarks": {m.task.name: _of_benchmark(m) for m in found},
    "answers": {m.task.name: m.told for m in found if m.answers_in == m.task.name and m.task.ask != EMBEDDINGS},
    "left_out": list(wrong),
  }  # fmt: skip


def _of_benchmark(m: Measured) -> dict:
  benchmark = m.task.benchmark
  return {
    "benchmark": benchmark.name, "source": benchmark.source, "metrics": benchmark.describe(),
    "cluster": benchmark.cluster, "asks": m.task.ask, "models": m.task.models, "bos": m.task.bos,
    "data": m.source, "files": m.reading.files, "examples": len(m.kept), "of": m.of, "subset": m.subset,
    "rows": len(m.rows), "truncated": m.truncated, "padding": m.padding, "seconds": m.seconds,
    "malformed": m.reading.malformed, "failed": m.failed,
    "estimates": {group: {name: dataclasses.asdict(value) for name, value in estimates.items()}
                  for group, estimates in m.result.estimates.items()},
    "ids": list(map(_identity, m.kept)), "items": m.result.items, "answers_in": m.answers_in,
  }  # fmt: skip


def _plain(value: Any) -> Any:
  """As JSON has it: what is not finite becomes null, and an axis of one model goes."""
  if isinstance(value, np.ndarray):
    value = value[0] if value.ndim == 2 and len(value) == 1 else value
    return _plain(value.tolist())
  if isinstance(value, np.generic):
    return _plain(value.item())
  if dataclasses.is_dataclass(value):
    return _plain(vars(value))
  if isinstance(value, Mapping):
    return {str(key): _plain(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def score_rows(source: str, rows: Sequence[Choice], out: Path, dtype: str | None) -> None:
  """Write {id: [[sum, tokens], ...]} for `rows`, in their order; the first process does."""
  model = language_model.load(source, dtype)
  encoded = encode(rows, model.tokenizer, model.config.max_positions)
  with Tracker("scoring", 1.0, quiet=not distributed.first()) as tracker:
    tracker.phase("score", len(rows), 1.0)
    scores = score(model, encoded, advance=tracker.advance)
  if distributed.first():
    write_json(out, scores)
