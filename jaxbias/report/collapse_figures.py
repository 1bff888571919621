"""Pictures of neural collapse: statistics over checkpoints, and layer by statistic.

Both take results whose `collapse` is the list of rows that `evals/collapse.py` makes, of one list of classes: {"model",
"site", "classes", "group", "metric", "value", "low", "high"}, with "step" where the models are checkpoints of a run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxbias.files import replace
from jaxbias.report.figures import ALT, DASHES, INK, MUTED, canvas, figure, look
from jaxbias.report.labels import shorten

ALT |= {
  "collapse_curves": "Neural-collapse statistics over checkpoints, one panel a statistic and one line a group of words",
  "collapse_layers": "Neural-collapse statistics of each layer, one column a statistic",
}
SHOWN = {  # metric: (what it is, the value when everything has collapsed)
  "cdnv": ("NC1: variance over distance", 0.0),
  "norm_cov": ("NC2: spread of norms", 0.0),
  "interference_std": ("NC2: spread of angles", 0.0),
  "similarity": ("NC3: similarity with weights", 1.0),
  "similarity_std": ("(U)NC3: its spread", 0.0),
  "agreement": ("NC4: agreement, %", 100.0),
}
LIGHT = 0.65  # of a column's range: darker cells have light figures


def _rows(results: Mapping, group: str | None = None) -> list[Mapping]:
  return [row for row in results.get("collapse") or () if row["metric"] in SHOWN and group in (None, row["group"])]


def _site(rows: Sequence[Mapping]) -> str:
  """Where curves are drawn: at the head's input, or where there is no such site at the last one."""
  sites = list(dict.fromkeys(row["site"] for row in rows))
  return "head_input" if "head_input" in sites else sites[-1]


@figure
def collapse_curves(results: Mapping) -> Figure | None:
  """Each statistic over steps (or models, in their order): a line a group, with its interval."""
  rows = [row for row in _rows(results) if " - " not in row["group"]]
  models = list(dict.fromkeys(row["model"] for row in rows))
  if len(models) < 2:
    return None
  rows = [row for row in rows if row["site"] == _site(rows)]
  steps = all("step" in row for row in rows)
  groups, metrics = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "metric"))
  metrics = [name for name in SHOWN if name in metrics]
  drawn = canvas(0.8 + 2.1 * -(-len(metrics) // 3))
  panels, lines = drawn.subplots(-(-len(metrics) // 3), 3, squeeze=False, sharex=True).ravel(), {}
  for ax, metric in zip(panels, metrics, strict=False):
    for i, group in enumerate(groups):
      chosen = [row for row in rows if (row["group"], row["metric"]) == (group, metric)]
      x = [row["step"] if steps else models.index(row["model"]) for row in chosen]
      lines.setdefault(group, _line(ax, x, chosen, i))
    ax.axhline(SHOWN[metric][1], color=INK, lw=0.9, zorder=1)
    ax.set_title(SHOWN[metric][0])
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if steps:
      ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
      ax.set_xticks(range(len(models)), [shorten(name, 18) for name in models], rotation=20, ha="right")
  for ax in panels[len(metrics) :]:
    ax.set_visible(False)
  drawn.supxlabel("step" if steps else "model", fontsize=9.5)
  drawn.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=6)
  drawn.text(0.99, 0.99, f"at {rows[0]['site']}; line: collapsed; shaded: 95 %", ha="right", va="top", color=MUTED)
  drawn.set_layout_engine("constrained", hspace=0.08, wspace=0.05)
  return drawn


def _line(ax: Axes, x: list[float], rows: Sequence[Mapping], number: int):
  style = look(number) | {"ls": DASHES[number % len(DASHES)]}
  low, high = ([row[end] for row in rows] for end in ("low", "high"))
  if None not in low:
    ax.fill_between(x, low, high, color=style["color"], alpha=0.14, lw=0)
  return ax.plot(x, [row["value"] for row in rows], lw=1.8, ms=5, **style)[0]


@figure
def collapse_layers(results: Mapping) -> Figure | None:
  """Layers below each other, a statistic a column: figures, and a tint by their place in the column's range. Of the
  first model, or side by side of the first and the last."""
  rows = _rows(results, "overall")
  sites, metrics = (list(dict.fromkeys(row[key] for row in rows)) for key in ("site", "metric"))
  if len(sites) < 2:
    return None
  metrics = [name for name in SHOWN if name in metrics]
  models = list(dict.fromkeys(row["model"] for row in rows))
  models = list(dict.fromkeys((models[0], models[-1])))
  value = {(row["model"], row["site"], row["metric"]): row["value"] for row in rows}
  tables = {model: np.array([[value.get((model, site, metric), np.nan) for metric in metrics] for site in sites])
            for model in models}  # fmt: skip
  low, high = np.nanmin(list(tables.values()), axis=(0, 1)), np.nanmax(list(tables.values()), axis=(0, 1))
  drawn = canvas(1.5 + 0.24 * len(sites))
  for ax, model in zip(drawn.subplots(1, len(models), squeeze=False, sharey=True)[0], models, strict=True):
    shade = (tables[model] - low) / np.where(high > low, high - low, 1.0)
    ax.imshow(shade, cmap="Blues", aspect="auto", vmin=0, vmax=1.15)
    for (y, x), number in np.ndenumerate(tables[model]):
      text = "" if np.isnan(number) else f"{number:.3g}"
      ax.text(x, y, text, ha="center", va="center", fontsize=8, color="#ffffff" if shade[y, x] > LIGHT else INK)
    ax.set_title(shorten(f"step {model}" if "step" in rows[0] else model, 50))
    ax.set_xticks(range(len(metrics)), [SHOWN[name][0].replace(" ", "\n", 2) for name in metrics], fontsize=7.5)
    ax.set_yticks(range(len(sites)), sites)
    ax.grid(False)
  drawn.supxlabel("darker: higher in its column (models share the scale)", fontsize=9, color=MUTED)
  drawn.set_layout_engine("constrained", wspace=0.03)
  return drawn


def save(rows: Sequence[Mapping], folder: Path) -> list[Path]:
  """Both pictures of every list of classes that has something to show, `NAME-CLASSES.svg` and `.png`; their paths."""
  out = []
  for classes in dict.fromkeys(row["classes"] for row in rows):
    results = {"collapse": [row for row in rows if row["classes"] == classes]}
    for draw in (collapse_curves, collapse_layers):
      if (svg := draw(results)) is not None:
        path = folder / f"{draw.__name__}-{re.sub(r'[^A-Za-z0-9]+', '-', Path(classes).stem)}.svg"
        replace(path, svg.encode())
        replace(path.with_suffix(".png"), draw(results, "png"))
        out.append(path)
  return out
