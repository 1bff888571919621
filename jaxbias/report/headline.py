"""One sentence or two that say what a comparison found, and what it cannot say."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbias.report import results as read
from jaxbias.report.labels import shorten


def headline(results: Mapping) -> str:
  """Which variant came nearest to the ideal stereotype score, at what cost, and whether its interval sets it apart."""
  metric = results["metrics"].get("ss")
  scored = [(row, score) for row in read.trained(results) if (score := read.estimate(row, "ss"))]
  found = {shorten(read.label(row), 48): (row, score) for row, score in scored}
  if metric is None or not found:
    return "No variant has a stereotype score."
  gap = {name: read.distance(score, metric) for name, (_, score) in found.items()}
  first = min(found, key=lambda name: abs(found[name][1].value - metric["ideal"]))
  row, score = found[first]
  before = (start := read.base(results)) and read.estimate(start, "ss")
  said = [f"{_nearest(first, score, before, metric)}{_cost(results, row)}."]
  if rivals := [name for name in found if name != first and gap[name][0] <= gap[first][1]]:
    those = _those(rivals, len(found) - 1)
    said.append(f"In distance to {metric['ideal']:g} its interval overlaps {those}: no clear winner.")
  if before and (ends := read.distance(before, metric))[0] <= gap[first][1] and gap[first][0] <= ends[1]:
    said.append("It also overlaps the base model's, so the intervals alone do not show that it moved.")
  return " ".join([*said, *_damage(results, row)])


def _nearest(name: str, score: read.Estimate, before: read.Estimate | None, metric: Mapping) -> str:
  aim = f"to a stereotype score of {metric['ideal']:g}"
  came = f" (base model {_quoted(before, metric)})" if before else ""
  if before and abs(score.value - metric["ideal"]) >= abs(before.value - metric["ideal"]):
    return f"No variant came nearer {aim} than the base model; the nearest is {name}: {_quoted(score, metric)}{came}"
  return f"Nearest {aim} came {name}: {_quoted(score, metric)}{came}"


def _quoted(found: read.Estimate, metric: Mapping) -> str:
  unit = "\N{NO-BREAK SPACE}" + metric["unit"] if metric.get("unit") else ""
  return f"{read.number(found.value, metric)}{unit} {read.interval(found, metric)}".rstrip()


def _cost(results: Mapping, row: Mapping) -> str:
  metric, found = results["metrics"].get("f_all"), read.estimate(row, "f_all")
  return f", at an overall forgetting of {_quoted(found, metric)}" if metric and found else ""


def _those(names: list[str], others: int) -> str:
  if len(names) <= 2:
    return f"that of {' and that of '.join(names)}"
  return "that of every other variant" if len(names) == others else f"those of {len(names)} of the {others} others"


def _damage(results: Mapping, row: Mapping) -> list[str]:
  """A broken model also scores near 50: say so where its language-modelling score is clearly below the base's."""
  metric, start = results["metrics"].get("lms"), read.base(results)
  before, after = (read.estimate(each, "lms") if each else None for each in (start, row))
  if not (metric and before and after and None not in (before.low, after.high)) or after.high >= before.low:
    return []
  return [
    f"But its language-modelling score fell from {_quoted(before, metric)} to {_quoted(after, metric)}; a model that "
    "no longer tells likely from unlikely words also comes near the ideal without being fairer."
  ]
