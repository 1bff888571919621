"""Pictures of a comparison. Each takes the results and returns SVG text (or PNG bytes), None where data are missing.

Colours are Okabe and Ito's (safe for colour-blind readers) and never the only cue: variants also differ by marker,
loss parts by line style. The inks below appear in the SVG as they stand, so that a page may replace them.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxbias.report import results as read
from jaxbias.report.labels import place, shorten

INK, MUTED, GRID, BAND, PAPER = "#1b2430", "#5c6773", "#d9dee3", "#eaf3ee", "#ffffff"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MOST_LABELS = 10  # beyond, points are told apart by a legend
WIDTH = 10.0  # inches of 72 points: 960 CSS pixels, where the type is 12 to 13 pixels high
STYLE = {
  "svg.fonttype": "none", "svg.hashsalt": "jaxbias", "text.parse_math": False,
  "font.size": 9.5, "axes.labelsize": 9.5, "axes.titlesize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
  "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
  "axes.edgecolor": GRID, "axes.facecolor": "none", "figure.facecolor": PAPER, "figure.dpi": 72,
  "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.axisbelow": True,
  "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "xtick.major.size": 0, "ytick.major.size": 0,
  "xtick.minor.size": 0, "legend.frameon": False,
}  # fmt: skip
ALT = {
  "scatter": "Stereotype score against overall forgetting, one point a variant",
  "domains": "Stereotype score of each variant in each domain",
  "curves": "Loss parts of each variant over training steps",
  "validation": "Stereotype score on validation terms over training steps",
}
FIGURES: dict[str, Callable] = {}


def figure(draw: Callable[[Mapping], Figure | None]) -> Callable:
  """Draw in the house style, which is put back after, and turn the figure into SVG text or PNG bytes."""

  @functools.wraps(draw)
  def rendered(results: Mapping, kind: str = "svg") -> str | bytes | None:
    with matplotlib.rc_context(STYLE):
      drawn = draw(results)
      return drawn and _render(drawn, kind, draw.__name__)

  FIGURES[draw.__name__] = rendered
  return rendered


def _render(drawn: Figure, kind: str, name: str) -> str | bytes:
  out = io.BytesIO()
  if kind == "png":
    drawn.savefig(out, format="png", dpi=160)
    return out.getvalue()
  drawn.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  svg = out.getvalue().decode()
  svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{ALT[name]}" ', 1)
  # Two pictures may share a page: their ids must differ. Only tags are touched, never text.
  return re.sub(r"<[^>]*>", lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", tag[0]), svg)


def canvas(height: float) -> Figure:
  drawn = Figure(figsize=(WIDTH, height))
  FigureCanvasAgg(drawn)
  return drawn


def look(index: int) -> dict:
  """Colour and marker of the variant at `index`; 42 differ."""
  return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


BASE_LOOK = {"color": INK, "marker": "*"}


def _whiskers(found: read.Estimate) -> list[list[float]] | None:
  """Lengths down and up, in matplotlib's shape; an end on the wrong side of the mean has none."""
  if found.low is None or found.high is None:
    return None
  return [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]


@figure
def scatter(results: Mapping) -> Figure | None:
  """Stereotype score against overall forgetting: fair and unharmed is where the two ideal lines cross."""
  metrics = results["metrics"]
  if not {"ss", "f_all"} <= metrics.keys():
    return None
  drawn = canvas(5.4)
  crowded = len(read.trained(results)) > MOST_LABELS
  ax = drawn.add_axes((0.065, 0.1, 0.67 if crowded else 0.915, 0.85))
  ideal, start = metrics["ss"]["ideal"], read.base(results)
  before = start and read.estimate(start, "ss")
  points = [
    (read.label(row), x, y, look(i))
    for i, row in enumerate(read.trained(results))
    if (x := read.estimate(row, "f_all")) and (y := read.estimate(row, "ss"))
  ]
  if before:
    points.insert(0, (read.label(start), read.Estimate(0.0, None, None, ()), before, BASE_LOOK))
    reach = abs(before.value - ideal)
    ax.axhspan(ideal - reach, ideal + reach, color=BAND, lw=0, zorder=0)
  ax.axhline(ideal, color=INK, lw=1.1, zorder=1)
  ax.axvline(0, color=MUTED, lw=0.8, zorder=1)
  for _, x, y, style in points:
    _mean_and_seeds(ax, x, y, style)
  forgetting_axis(ax, [x.value for _, x, _, _ in points], metrics["f_all"].get("unit", ""))
  ax.set_ylabel(f"stereotype score, {metrics['ss'].get('unit', '')}")
  _frame(ax, points, ideal)
  if crowded:
    keys = [ax.plot([], [], ls="", ms=7, label=shorten(name), **style)[0] for name, _, _, style in points]
    drawn.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.745, 0.99))
  else:
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    lines = [(left, ideal, right, ideal), (0, low, 0, high)]
    texts = [(shorten(name), x.value, y.value) for name, x, y, _ in points]
    place(ax, texts, _obstacles(points) + lines, INK, MUTED)
  return drawn


def _mean_and_seeds(ax: Axes, x: read.Estimate, y: read.Estimate, style: dict) -> None:
  if len(x.per_seed) == len(y.per_seed) > 1:
    ax.plot(x.per_seed, y.per_seed, ls="", ms=5.5, alpha=0.4, mew=0, zorder=3, **style)
  size = 12 if style is BASE_LOOK else 9
  bars = {"xerr": _whiskers(x), "yerr": _whiskers(y), "lw": 1.3}
  ax.errorbar(x.value, y.value, **bars, **style, ms=size, mec=PAPER, mew=0.8, zorder=4)


def forgetting_axis(ax: Axes, values: list[float], unit: str, far: float = 8) -> None:
  """Linear, unless a value is more than `far` times the typical one, so that the others would fall on one point."""
  title = f"overall forgetting, {unit}"
  sizes = [abs(value) for value in values if value]
  typical = float(np.median(sizes)) if sizes else 0.0
  if sizes and max(sizes) > far * typical:
    knee = 10.0 ** math.floor(math.log10(typical))
    ax.set_xscale("symlog", linthresh=knee, linscale=0.5)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    title += f" (logarithmic beyond ±{knee:g})"
  ax.set_xlabel(title)


def _obstacles(points: list[tuple]) -> list[tuple[float, float, float, float]]:
  """Boxes (x0, y0, x1, y1 in data units) that a label should not cover: whiskers and seeds."""
  boxes = []
  for _, x, y, _ in points:
    if x.low is not None and x.high is not None:
      boxes.append((x.low, y.value, x.high, y.value))
    if y.low is not None and y.high is not None:
      boxes.append((x.value, y.low, x.value, y.high))
    boxes += [(a, b, a, b) for a, b in zip(x.per_seed, y.per_seed, strict=False)]
  return boxes


def _frame(ax: Axes, points: list[tuple], ideal: float) -> None:
  """Room for the labels, the ideal always in view; words for the ideal line and the shaded band."""
  ys = [end for _, _, y, _ in points for end in (y.value, y.low, y.high) if end is not None] + [ideal]
  margin = 0.09 * (max(ys) - min(ys)) or 1.0
  ax.set_ylim(min(ys) - margin, max(ys) + margin)
  ax.margins(x=0.09)
  ax.autoscale_view(scaley=False)
  edge = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "color": MUTED}
  ax.annotate(f"ideal {ideal:g}", (1, ideal), xytext=(-4, 4), **edge)
  if points and points[0][3] is BASE_LOOK:
    ax.set_title(f"shaded: nearer to {ideal:g} than the base model", loc="right", color=MUTED, fontsize=9.5)


@figure
def domains(results: Mapping) -> Figure | None:
  """Stereotype score of each domain, base model on top and dotted through the variants below it."""
  names = read.domains(results)
  rows = [row for row in read.rows(results) if any(read.estimate(row, "ss", name) for name in names)]
  if "ss" not in results["metrics"] or not rows:
    return None
  metric, looks = results["metrics"]["ss"], {row["name"]: look(i) for i, row in enumerate(read.trained(results))}
  drawn = canvas(1.15 + 0.3 * len(rows))
  panels = drawn.subplots(1, len(names), sharey=True, sharex=True, squeeze=False)[0]
  for ax, domain in zip(panels, names, strict=True):
    ax.axvline(metric["ideal"], color=INK, lw=1.1)
    for height, row in enumerate(rows):
      if found := read.estimate(row, "ss", domain):
        _dot(ax, found, height, looks.get(row["name"], BASE_LOOK))
    ax.set_title(domain)
    ax.grid(axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2.5, 5, 10), integer=True))
  panels[0].set_yticks(range(len(rows)), [shorten(read.label(row)) for row in rows], color=INK)
  panels[0].set_ylim(len(rows) - 0.4, -0.6)
  guide = f"(solid line: ideal {metric['ideal']:g}; dotted: base model)"
  drawn.supxlabel(f"stereotype score, {metric.get('unit', '')} {guide}", fontsize=9.5)
  drawn.set_layout_engine("constrained", wspace=0.06)
  return drawn


def _dot(ax: Axes, found: read.Estimate, height: int, style: dict) -> None:
  size = 7.5
  if style is BASE_LOOK:
    size = 11
    ax.axvline(found.value, color=INK, lw=1, ls=(0, (1, 2)))
  ax.errorbar(found.value, height, xerr=_whiskers(found), **style, ms=size, mec=PAPER, mew=0.7, lw=1.3)


@figure
def curves(results: Mapping) -> Figure | None:
  """The parts of each variant's loss over its steps: seeds thin, their mean thick."""
  rows = [row for row in read.trained(results) if any((results.get("curves") or {}).get(row["name"], {}).values())]
  if not rows:
    return None
  runs = {row["name"]: results["curves"][row["name"]] for row in rows}
  points = [at for seeds in runs.values() for curve in seeds.values() for at in curve]
  parts = list(dict.fromkeys(part for at in points for part in at.get("parts") or {}))
  wide = min(3, len(rows))
  high = math.ceil(len(rows) / wide)
  drawn = canvas(0.75 + 2.05 * high)
  panels = drawn.subplots(high, wide, squeeze=False, sharex=True).ravel()
  lines = {}
  for ax, row in zip(panels, rows, strict=False):
    ax.set_title(shorten(read.label(row), 34) + (" (failed)" if row.get("failed") else ""))
    for i, part in enumerate(parts):
      style = {"color": COLORS[i % len(COLORS)], "ls": DASHES[i % len(DASHES)]}
      if line := seeds_and_mean(ax, runs[row["name"]], lambda at, part=part: (at.get("parts") or {}).get(part), style):
        lines.setdefault(part, line)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
  for place_in_grid, ax in enumerate(panels):
    ax.set_visible(place_in_grid < len(rows))
    ax.tick_params(labelbottom=place_in_grid + wide >= len(rows))
  drawn.supxlabel("step", fontsize=9.5)
  drawn.supylabel("loss part, as logged", fontsize=9.5)
  drawn.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=8, handlelength=2.6)
  drawn.set_layout_engine("constrained", hspace=0.08, wspace=0.04)
  return drawn


@figure
def validation(results: Mapping) -> Figure | None:
  """Stereotype score on the validation terms over the steps, where a curve's points carry `validation.ss`."""
  def score(at: Mapping) -> float | None:
    return (at.get("validation") or {}).get("ss")

  drawn, ends = canvas(3.6), []
  ax = drawn.subplots()
  for i, row in enumerate(read.trained(results)):
    if line := seeds_and_mean(ax, (results.get("curves") or {}).get(row["name"], {}), score, look(i) | {"ms": 5}):
      ends.append((line, shorten(read.label(row))))
  if not ends:
    return None
  ideal = results["metrics"]["ss"]["ideal"]
  ax.axhline(ideal, color=INK, lw=1.1, zorder=1)
  ax.set_xlabel("step")
  ax.set_ylabel(f"validation stereotype score (ideal {ideal:g})")
  drawn.legend(*zip(*ends, strict=True), loc="outside right center")
  drawn.set_layout_engine("constrained")
  return drawn


def seeds_and_mean(ax: Axes, seeds: Mapping, value: Callable[[Mapping], float | None], style: dict):
  """Each seed's line thin and the mean over the steps that all of them have thick; the thick line, or None."""
  found = [{at["step"]: y for at in curve if (y := read.finite(value(at))) is not None} for curve in seeds.values()]
  found = [curve for curve in found if curve]
  if not found:
    return None
  if len(found) > 1:
    for curve in found:
      ax.plot(curve.keys(), curve.values(), lw=0.8, alpha=0.35, color=style["color"])
  shared = sorted(set.intersection(*map(set, found)))
  return ax.plot(shared, [np.mean([curve[step] for curve in found]) for step in shared], lw=1.9, **style)[0]
