"""`python -m jaxbias collapse`: neural collapse of one or several models, loaded one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from jaxbias import distributed, provenance
from jaxbias.data import fields
from jaxbias.errors import UserError
from jaxbias.evals import show
from jaxbias.evals.collapse import BENCHMARK, Collapse, measure, prepare, read_texts
from jaxbias.files import write_json
from jaxbias.models import language_model
from jaxbias.progress import Tracker

LISTED = 1000  # classes whose own values are written

def run(sources: Sequence[str], data: str, classes: Sequence[str], *, sites: Sequence[str], passes: int, compat: bool,
        dtype: str | None = None, limit: int | None = None, out: Path | None = None, command: str = "",
        **asked) -> list[Collapse]:  # fmt: skip
  """Statistics of each of `sources` (a model, LABEL=MODEL, or STEP=MODEL: a checkpoint of a run), of each of `classes`.

  `asked`: further arguments of `collapse.prepare`. `out`/collapse.json is written anew after each model. Raises
  UserError for a source or data that are not there, and for models of different tokenizers.
  """
  with fields.tolerant() as reading:
    texts = read_texts(data)[:limit]
  if reading.malformed and not texts:
    raise UserError(reading.malformed[0])
  found, plans, about = [], {}, []
  with Tracker("collapse", float(len(sources) * len(classes)), quiet=not distributed.first()) as tracker:
    for source in sources:
      label, equals, path = ("", "", "") if Path(source).exists() else source.partition("=")
      model = language_model.load(path if equals else source, dtype)
      plans = plans or {name: prepare(model, texts, name, **asked) for name in classes}
      for name, plan in plans.items():
        tracker.phase(f"{label or source}, {name}", len(plan.fit) * passes + len(plan.held), 1.0)
        found += measure(model, plan, sites=sites, passes=passes, compat=compat, name=label if equals else None,
                         advance=tracker.advance)  # fmt: skip
      about.append({"source": source, "name": found[-1].model, "fingerprint": model.fingerprint})
      if out and distributed.first():
        write_json(out / "collapse.json", record(found, about, reading, data, command))
  return found


def rows(found: Sequence[Collapse]) -> list[dict]:
  """Tidy rows of all; where every model's name is a number it is the step of a checkpoint."""
  steps = all(one.model.isdigit() for one in found)
  return [row | ({"step": int(one.model)} if steps else {}) for one in found for row in one.rows()]


def record(found: Sequence[Collapse], models: list[dict], reading: fields.Reading, data: str, command: str) -> dict:
  return {
    "schema": 1, "command": command, "created": provenance.now(), "versions": provenance.versions(),
    "git": provenance.git(), "hardware": provenance.hardware(), "models": models, "data": data,
    "files": reading.files, "malformed": reading.malformed, "metrics": BENCHMARK.describe(),
    "source": BENCHMARK.source, "asked": {one.about["classes"]: one.about for one in found},
    "classes": {one.about["classes"]: one.classes for one in found if len(one.classes) <= LISTED},
    "collapse": rows(found), "items": list(map(_items, found)),
  }  # fmt: skip


def _items(one: Collapse) -> dict:
  """What is missing, and where there are no more than LISTED classes the value of each."""
  plain = lambda value_C: [float(x) if np.isfinite(x) else None for x in value_C]
  few = one.result.items if len(one.classes) <= LISTED else {}
  return {"model": one.model, "site": one.site, "classes": one.about["classes"], "missing": one.missing,
          "items": {name: plain(value_C) for name, value_C in few.items()}}  # fmt: skip


def tables(found: Sequence[Collapse]) -> list[Table]:
  """One a model and site: metrics below each other, groups side by side."""
  out = []
  for one in found:
    about, estimates = one.about, one.result.estimates
    title = (f"{one.model} at {one.site}: {about['seen']} of {about['of']} classes ({about['classes']}), "
             f"{about['samples']:,} samples; {about['pairing']}")  # fmt: skip
    table = Table(title=escape(title), title_justify="left", caption_justify="left",
                  caption=escape("\n".join(f"{name} is missing: {why}" for name, why in one.missing.items())
                                 or "in brackets: 95 % bootstrap; drawn: class"))  # fmt: skip
    for column in ("metric", *estimates):
      table.add_column(escape(column), justify="left" if column == "metric" else "right")
    for name, direction in BENCHMARK.metrics.items():
      cells = [show.number(row[name], direction.unit) if name in row else "" for row in estimates.values()]
      if any(cells):
        table.add_row(escape(show.label(name, direction)), *map(escape, cells))
    out.append(table)
  return out
