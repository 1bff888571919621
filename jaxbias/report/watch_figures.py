"""Pictures of what was seen while runs trained, drawn where `results.json` has `watch`: {variant: {seed: lines}}."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from jaxbias.report import results as read
from jaxbias.report.figures import (
  ALT,
  BASE_LOOK,
  COLORS,
  DASHES,
  INK,
  MUTED,
  PAPER,
  canvas,
  figure,
  forgetting_axis,
  look,
  seeds_and_mean,
)
from jaxbias.report.labels import shorten

SECTIONS = {
  "forgetting_path": (
    "Forgetting against bias along the runs",
    "Each line is a run from the base model (star) on, a dot for each look, the larger mark at its end; the seeds of a "
    "variant have lines of one colour. To the side is forgetting, up or down is bias; on the texts of watch.split.",
  ),
  "gradient_conflict": (
    "Where the parts of a loss pull",
    "Cosine between the gradients of two loss parts, on the weights that train and the same batches at every look. "
    "Below 0 one part undoes what the other does. Thick: mean over seeds; thin: single seeds.",
  ),
}
ALT |= {
  "forgetting_path": "Stereotype score against overall forgetting, along each run from the base model on",
  "gradient_conflict": "Cosines between the gradients of each variant's loss parts over training steps",
}


def _watched(results: Mapping) -> list[tuple[Mapping, Mapping[str, list]]]:
  """(row, {seed: lines}) of the variants that were looked at, in the order of the table."""
  found = results.get("watch") or {}
  return [(row, found[row["name"]]) for row in read.trained(results) if any(found.get(row["name"], {}).values())]


def _value(line: Mapping, group: str, metric: str) -> float | None:
  return read.finite(((line.get(group) or {}).get(metric) or {}).get("value"))


@figure
def forgetting_path(results: Mapping) -> Figure | None:
  """Stereotype score against overall forgetting along each run, from the base model on."""
  index = {row["name"]: i for i, row in enumerate(read.trained(results))}
  runs = [(row, points) for row, seeds in _watched(results) for lines in seeds.values() if (points := _points(lines))]
  if not runs:
    return None
  ideal = (results["metrics"].get("ss") or {}).get("ideal", 50.0)
  drawn = canvas(5.0)
  ax = drawn.subplots()
  ax.axhline(ideal, color=INK, lw=1.1, zorder=1)
  ax.axvline(0, color=MUTED, lw=0.8, zorder=1)
  keys = {}
  for row, points in runs:
    style, (x, y) = look(index[row["name"]]), np.transpose(points)
    ax.plot(x, y, lw=1.4, alpha=0.85, color=style["color"], zorder=2)
    ax.plot(x[:-1], y[:-1], ls="", ms=3.5, alpha=0.85, **style, zorder=3)
    key = ax.plot(x[-1], y[-1], ls="", ms=9, mec=PAPER, mew=0.8, **style, zorder=4)[0]
    keys.setdefault(shorten(read.label(row)), key)
  starts = {points[0] for _, points in runs if points[0][0] == 0.0}
  for x, y in starts:  # one, as all runs start from the same model
    keys = {"base model": ax.plot(x, y, ls="", ms=13, mec=PAPER, mew=0.8, **BASE_LOOK, zorder=5)[0]} | keys
  # Looks lie along a path, whose end is far from its first ones as a rule.
  forgetting_axis(ax, [x for _, points in runs for x, _ in points], "nats/token", far=12)
  ax.margins(0.06)
  ax.set_ylabel(f"stereotype score, % (line: ideal {ideal:g})")
  drawn.legend(keys.values(), keys.keys(), loc="outside right upper")
  drawn.set_layout_engine("constrained")
  return drawn


def _points(lines: list) -> list[tuple[float, float]]:
  found = ((_value(line, "overall", "f_all"), _value(line, "bias", "ss")) for line in lines)
  return [(x, y) for x, y in found if x is not None and y is not None]


@figure
def gradient_conflict(results: Mapping) -> Figure | None:
  """Cosines between the gradients of each variant's loss parts over its steps; a variant of one part has none."""
  cosines = lambda line: (line.get("gradients") or {}).get("cosine") or {}
  shown = [(row, seeds) for row, seeds in _watched(results)
           if any(cosines(line) for lines in seeds.values() for line in lines)]  # fmt: skip
  if not shown:
    return None
  pairs = list(dict.fromkeys(pair for _, seeds in shown for lines in seeds.values() for line in lines
                             for pair in cosines(line)))  # fmt: skip
  wide = min(3, len(shown))
  high = math.ceil(len(shown) / wide)
  drawn = canvas(0.75 + 2.2 * high)
  panels = drawn.subplots(high, wide, squeeze=False, sharex=True, sharey=True).ravel()
  keys = {}
  for ax, (row, seeds) in zip(panels, shown, strict=False):
    ax.set_title(shorten(read.label(row), 34))
    ax.axhline(0, color=MUTED, lw=0.9, zorder=1)
    for i, pair in enumerate(pairs):
      style = {"color": COLORS[i % len(COLORS)], "ls": DASHES[i % len(DASHES)], "marker": ".", "ms": 6}
      if line := seeds_and_mean(ax, seeds, lambda at, pair=pair: cosines(at).get(pair), style):
        keys.setdefault(pair.replace(" | ", " and "), line)
  steps = sorted({line["step"] for _, seeds in shown for lines in seeds.values() for line in lines})
  for place, ax in enumerate(panels):
    ax.set_visible(place < len(shown))
    ax.tick_params(labelbottom=place + wide >= len(shown))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if len(steps) > 2 and steps[-1] >= 4 * steps[len(steps) // 2]:  # looks at log-spaced steps
      ax.set_xscale("symlog", linthresh=1, linscale=0.4)
      ax.xaxis.set_major_locator(FixedLocator(steps))
      ax.xaxis.set_minor_locator(FixedLocator([]))
      ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  drawn.supxlabel("step", fontsize=9.5)
  drawn.supylabel("cosine of gradients", fontsize=9.5)
  drawn.legend(keys.values(), keys.keys(), loc="outside upper left", ncols=6, handlelength=2.6)
  drawn.set_layout_engine("constrained", hspace=0.08, wspace=0.04)
  return drawn
