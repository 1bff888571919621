"""Results as tables for a terminal, and the list of benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from jaxbias.evals.metrics import Direction, Estimate, Result
from jaxbias.evals.task import Task

COLUMNS = 7  # metrics beside each other; more of them go below each other
TOWARDS = {"higher": "up", "lower": "down", "none": ""}


def label(metric: str, direction: Direction) -> str:
  """`ss % -> 50`, `lms % up`, `p`."""
  towards = f"-> {direction.ideal:g}" if direction.better == "ideal" else TOWARDS[direction.better]
  return " ".join(filter(None, (metric, direction.unit, towards)))


def number(estimate: Estimate, unit: str) -> str:
  value, bound = ("{:.2f}", "{:.1f}") if unit == "%" else ("{:.4g}", "{:.3g}")
  if estimate.low is None:
    return value.format(estimate.value)
  return f"{value.format(estimate.value)} [{bound.format(estimate.low)}, {bound.format(estimate.high)}]"


def subset(kept: int, of: int) -> str | None:
  """How to say that these are not all."""
  return f"the first {kept:,} of {of:,} examples" if kept < of else None


def tables(title: str, found: Sequence[tuple[Task, str, Result]]) -> list[Table]:
  """found: (task, what its figures are of, result). Neighbours with the same metrics of the same share a table."""
  alike = lambda one: (list(one[0].benchmark.metrics.items()), one[0].benchmark.cluster, one[1])
  return [_table(f"{title}, {of}", [(task, result) for task, _, result in members])
          for (*_, of), members in itertools.groupby(found, key=alike)]


def _table(title: str, found: Sequence[tuple[Task, Result]]) -> Table:
  benchmark = found[0][0].benchmark
  many = len(benchmark.metrics) > COLUMNS
  table = Table(title=escape(title), title_justify="left",
                caption=f"in brackets: 95 % bootstrap; drawn: {benchmark.cluster}")  # fmt: skip
  labels = {name: label(name, direction) for name, direction in benchmark.metrics.items()}
  for column in ("benchmark", "group", *(("metric", "") if many else ())):
    table.add_column(column, no_wrap=column == "benchmark", overflow="fold")
  for column in () if many else labels.values():
    table.add_column(column, justify="right")
  for task, result in found:
    for group, estimates in result.estimates.items():
      shown = {name: escape(number(estimates[name], direction.unit)) if name in estimates else ""
               for name, direction in benchmark.metrics.items()}
      for cells in [(labels[name], text) for name, text in shown.items() if text] if many else [shown.values()]:
        table.add_row(task.name, escape(group), *cells)
    table.add_section()
  return table


def listing(families: Mapping[str, Iterable[Task]]) -> Table:
  """What each benchmark asks of which models, which data it reads, and which way its metrics are better."""
  table = Table(caption="-> x: the nearer the better; up, down: higher, lower is better", show_lines=True)
  for column in ("benchmark", "asks for", "models", "data", "metrics"):
    table.add_column(column)
  for found in families.values():
    alike: dict[tuple, list[str]] = {}
    for task in found:
      metrics = ", ".join(label(*metric) for metric in task.benchmark.metrics.items())
      alike.setdefault((task.ask, task.models, expected(task), metrics), []).append(task.name)
    for cells, names in alike.items():
      table.add_row("\n".join(names), *map(escape, cells))
  return table


def expected(task: Task) -> str:
  """Which data the task reads: the first line of what its `load` says of itself."""
  return (getattr(task.load, "func", task.load).__doc__ or "").strip().partition("\n")[0]
