"""Tables of a comparison: one model of a table, drawn as Markdown and in the terminal (HTML has its own drawing)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from jaxbias.report import results as read

ARROWS = {"ideal": "→", "higher": "↑", "lower": "↓", "none": ""}
MISSING = "n/a"


@dataclass(frozen=True)
class Cell:
  value: str
  interval: str = ""
  best: bool = False
  note: str = ""

  def __str__(self) -> str:
    return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Column:
  label: str
  metric: Mapping
  cells: tuple[Cell, ...]

  @property
  def aim(self) -> str:
    """Unit, direction and ideal value: `% → 50`."""
    ideal = read.finite(self.metric.get("ideal"))
    aimed = self.metric["better"] != "none" and ideal is not None
    parts = (self.metric.get("unit", ""), ARROWS[self.metric["better"]], f"{ideal:g}" if aimed else "")
    return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Table:
  title: str
  labels: tuple[str, ...]
  columns: tuple[Column, ...]


def tables(results: Mapping) -> list[Table]:
  """All metrics over all items; then, where they were measured, the stereotype score of each domain."""
  rows = read.rows(results)
  labels = tuple(read.label(row) + (" (failed)" if row.get("failed") else "") for row in rows)
  metrics = results["metrics"]
  overall = tuple(_column(rows, metric.get("label", name), name, metric) for name, metric in metrics.items())
  drawn = [Table("All test items", labels, overall)]
  if "ss" in metrics and (domains := read.domains(results)):
    split = tuple(_column(rows, domain, "ss", metrics["ss"], domain) for domain in domains)
    drawn.append(Table(f"{metrics['ss'].get('label', 'SS')} by domain", labels, split))
  return drawn


def _column(rows: list[Mapping], label: str, name: str, metric: Mapping, domain: str | None = None) -> Column:
  found = [read.estimate(row, name, domain) for row in rows]
  contest = [None if row["name"] == "base" else estimate for row, estimate in zip(rows, found, strict=True)]
  winners = best(contest, metric)
  cells = []
  for index, (row, estimate) in enumerate(zip(rows, found, strict=True)):
    if estimate is None:
      cells.append(Cell(MISSING, note=row.get("failed") or read.reason(row, name) or ""))
      continue
    defined = row["name"] == "base" and estimate.low == estimate.high  # the base's own change: zero, not measured
    cells.append(
      Cell(
        read.number(estimate.value, metric),
        "" if defined else read.interval(estimate, metric),
        index in winners,
      )
    )
  return Column(label, metric, tuple(cells))


def best(estimates: list[read.Estimate | None], metric: Mapping) -> set[int]:
  """Places of the best value as printed (ties share it); none without a direction or where all are as good."""
  values = {i: float(read.number(found.value, metric)) for i, found in enumerate(estimates) if found}
  if metric["better"] == "none" or not values:
    return set()
  cost = {
    "ideal": lambda value: round(abs(value - metric["ideal"]), 6),
    "higher": lambda value: -value,
    "lower": lambda value: value,
  }[metric["better"]]
  least = min(map(cost, values.values()))
  winners = {i for i, value in values.items() if cost(value) == least}
  return winners if len(winners) < len(values) else set()


def notes(results: Mapping, mark: str = "Bold") -> list[str]:
  """What a reader must know beside the numbers: intervals, seeds, marking, and why something is missing."""
  seeds = len(results["seeds"])
  values = "Values come from 1 seed" if seeds == 1 else f"Values are means over {seeds} seeds"
  said = [f"{values}; in brackets: {results['interval']}."]
  if len(read.trained(results)) > 1:
    said.append(f"{mark}: the best trained variant in that column as printed, ties included; not a significance test.")
  for row in read.rows(results):
    if row.get("failed"):
      said.append(f"{read.label(row)} failed: {row['failed']}.".replace("..", "."))
      continue
    for name, metric in results["metrics"].items():
      if read.estimate(row, name) is None and (why := read.reason(row, name)):
        said.append(f"{read.label(row)} has no {metric.get('label', name)}: {why}.".replace("..", "."))
  return said


def markdown(results: Mapping) -> str:
  """Title, tables and notes as GitHub-flavoured Markdown."""
  blocks = [f"# {escape(results['title'])}"]
  for table in tables(results):
    blocks.append(f"## {escape(table.title)}")
    blocks.append("\n".join(_markdown_lines(table)))
  blocks.append("\n".join(f"- {escape(note)}" for note in notes(results)))
  return "\n\n".join(blocks) + "\n"


def _markdown_lines(table: Table) -> Iterator[str]:
  yield _line("model", *(escape(f"{column.label} {column.aim}") for column in table.columns))
  yield "| --- |" + " ---: |" * len(table.columns)
  for index, name in enumerate(table.labels):
    cells = [column.cells[index] for column in table.columns]
    yield _line(escape(name), *(f"**{cell.value}** {cell.interval}" if cell.best else str(cell) for cell in cells))


def _line(*entries: str) -> str:
  return f"| {' | '.join(entry.strip() for entry in entries)} |"


def escape(text: str) -> str:
  return re.sub(r"([|*`\[\\])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


@dataclass(frozen=True)
class _Fitted:
  """A table in as many bands as the width of the terminal asks for."""

  table: Table

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
    names = min(max(map(len, ("model", *self.table.labels))), max(12, options.max_width // 3))
    bands, used = [[]], names
    for column in self.table.columns:
      texts = [column.label, column.aim, *(text for cell in column.cells for text in ("*" + cell.value, cell.interval))]
      width = max(map(len, texts)) + 2
      if bands[-1] and used + width > options.max_width:
        bands.append([])
        used = names
      bands[-1].append(column)
      used += width
    for index, band in enumerate(bands):
      yield from [""] * (index > 0)
      yield self._band(band, names)

  def _band(self, columns: list[Column], names: int) -> RichTable:
    drawn = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    drawn.add_column(Text("model"), max_width=names)
    for column in columns:
      drawn.add_column(Text(f"{column.label}\n{column.aim}"), justify="right", no_wrap=True)
    for index, name in enumerate(self.table.labels):
      drawn.add_row(Text(name), *(_text(column.cells[index]) for column in columns))
    return drawn


def _text(cell: Cell) -> Text:
  style = "bold green" if cell.best else "dim" if cell.value == MISSING else ""
  return Text.assemble(("*" * cell.best + cell.value, style), (f"\n{cell.interval}", "dim"))


def terminal(results: Mapping) -> Group:
  """The same tables for `rich.print`; without a terminal rich writes plain text, best values keep their *."""
  blocks = [Text(str(results["title"]), style="bold")]
  for table in tables(results):
    blocks += [Text(f"\n{table.title}", style="italic"), _Fitted(table)]
  return Group(*blocks, Text(), *(Text(note, style="dim") for note in notes(results, "*")))
