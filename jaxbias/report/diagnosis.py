"""The report of a diagnosis: what its findings say of the paper's four claims, where they disagree, and a picture.

Reads files alone: findings.json and table.jsonl of the work folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jaxbias.files import replace
from jaxbias.report.figures import ALT, BASE_LOOK, INK, MUTED, canvas, figure, look
from jaxbias.report.labels import shorten

ALT["forgetting_bias"] = "Bias against overall forgetting along every run, from the start model on"
CLAIMS = (
  ("C1", "downstream performance goes down with overall forgetting"),
  ("C2", "forgetting stereotypes raises overall forgetting"),
  ("C3", "remedies against forgetting lower neither overall forgetting nor the loss of performance, at the same bias"),
  ("C4", "a fair model takes much data"),
)
NOTHING = "not measured"
RUN = ("model", "objective", "remedy", "n", "seed")


def write(workdir: Path) -> Path:
  """Write report.md and figures/ beside the findings, and return the report's path."""
  found = json.loads((workdir / "findings.json").read_text(encoding="utf-8"))
  table = [json.loads(line) for line in (workdir / "table.jsonl").read_text(encoding="utf-8").splitlines()]
  picture = {"table": table, "bias": found["about"]["bias"]}
  for kind in ("svg", "png"):
    drawn = forgetting_bias(picture, kind)
    replace(workdir / "figures" / f"forgetting_bias.{kind}", drawn.encode() if kind == "svg" else drawn)
  path = workdir / "report.md"
  replace(path, markdown(found, table).encode())
  return path


def markdown(found: Mapping, table: Sequence[Mapping]) -> str:
  """The whole page."""
  about = found["about"]
  said = {"C1": claim_1(found), "C2": claim_2(found), "C3": claim_3(found), "C4": claim_4(found)}
  lines = ["# Fairness, forgetting, performance: a diagnosis", ""]
  lines += [f"{found['runs']} runs, {found['points']} checkpoints, of {', '.join(found['models'])}. Bias is "
            f"`{about['bias']}`. The claims are those of Liu et al. 2025 (arXiv 2509.21456), whose equations, sizes "
            "and figures could not be had: what is measured here is a reconstruction, and no number below is theirs.",
            ""]  # fmt: skip
  lines += ["| claim | here | because |", "|---|---|---|"]
  lines += [f"| {name}: {claim} | **{said[name][0]}** | {said[name][1]} |" for name, claim in CLAIMS]
  lines += ["", "![bias against overall forgetting](figures/forgetting_bias.svg)", ""]
  if found["failed"]:
    lines += [f"Failed, and missing below: {', '.join(found['failed'])}.", ""]
  sections = (("Ends of the runs, means over seeds", ends(table, about)), ("C1: correlations", correlations(found)),
              ("Controls", controls(found)), ("C2: along each run", slopes(found)),
              ("C3: remedies at the same bias", remedies(found)), ("C4: data", sizes(found)))  # fmt: skip
  for title, section in sections:
    lines += [f"## {title}", "", section, ""]
  power = found["power"]
  lines += ["## What so few runs can show", "",
            f"An r of 0.55 is significant from {power['runs_for_r_055']} independent runs on; with {found['runs']} "
            f"runs the smallest two-sided p of a rank correlation is {power['smallest_spearman_p']:.2g}. Checkpoints "
            "of one run drift together, so intervals draw whole runs. Not to find a difference between two remedies is "
            "no equivalence; that has a test of its own, with margins "
            f"{', '.join(f'{name} +-{margin:g}' for name, margin in about['margins'].items())}.", ""]  # fmt: skip
  return "\n".join(lines)


def claim_1(found: Mapping) -> tuple[str, str]:
  """By the interval of Pearson's r of performance and f_all."""
  first = found["correlations"][0]
  estimate = first["estimate"]
  if estimate is None:
    return NOTHING, first["reason"]
  verdict = "undecided"
  if estimate["low"] is not None:
    verdict = "agrees" if estimate["high"] < 0 else "disagrees" if estimate["low"] > 0 else "undecided"
  return verdict, f"r = {_interval(estimate)} over {first['points']} points of {first['runs']} runs"


def claim_2(found: Mapping) -> tuple[str, str]:
  """By the signs of the slopes, and by points that forgot stereotypes and nothing else."""
  known = [slope["slope"] for slope in found["slopes"] if slope["slope"] is not None]
  if not known:
    return NOTHING, "no run has two points"
  up = sum(slope > 0 for slope in known)
  because = f"F_all rises with F_sel along {up} of {len(known)} runs"
  if found["free"] is None:
    return "undecided", f"{because}; no seeds of a null run to take a tolerance from"
  chosen, free, _ = found["free"]
  delta, tolerance = found["about"]["delta"], found["tolerance"]
  because += f"; {free} of {chosen} points with F_sel > {delta:g} have F_all <= {tolerance:.3g}"
  share = up / len(known)
  return ("agrees" if share > 0.5 and 2 * free < chosen else "disagrees" if share < 0.5 else "undecided"), because


def claim_3(found: Mapping) -> tuple[str, str]:
  """A remedy that has less f_all than none at the same bias, significantly and by more than the margin, contradicts."""
  tests = [each for each in found["matched"] if each["test"] and each["column"] == "f_all"]
  if not tests:
    return NOTHING, "no remedy reached the bias in two seeds together with its twin"
  better = sorted({each["remedy"] for each in tests if each["verdict"] == "different" and each["test"]["mean"] < 0})
  same = sorted({each["remedy"] for each in tests if each["verdict"] in ("equivalent", "different, within the margin")
                 or (each["verdict"] == "different" and each["test"]["mean"] > 0)})  # fmt: skip
  open_ = sorted({each["remedy"] for each in tests} - {*better, *same})
  told = [f"less F_all: {', '.join(better)}" if better else "", f"no less: {', '.join(same)}" if same else "",
          f"undecided: {', '.join(open_)}" if open_ else ""]
  verdict = "disagrees" if better else "undecided" if open_ else "agrees"
  return verdict, "; ".join(filter(None, told))


def claim_4(found: Mapping) -> tuple[str, str]:
  """The smallest size tried suffices for some objective: it disagrees; only the largest does: it agrees. Where none
  does, nothing shows that more would."""
  sizes_ = found["sizes"]
  measured = [each for each in sizes_ if each["by_n"]]
  if not measured:
    return NOTHING, "; ".join(each["reason"] for each in sizes_)
  target, tried = found["about"]["target"], sorted({int(n) for each in measured for n in each["by_n"]})
  told = "; ".join(f"{each['objective']}: " + (f"n = {each['n']:,}" if each["n"] else f"none ({each['reason']})")
                   for each in measured)  # fmt: skip
  least = min(each["n"] or math.inf for each in measured)
  verdict = "disagrees" if least == tried[0] else "agrees" if least == tried[-1] else "undecided"
  verdict = verdict if len(tried) > 1 else "undecided"
  return verdict, f"smallest n with {found['about']['bias']} <= {target:g}, of {tried}: {told}"


def ends(table: Sequence[Mapping], about: Mapping) -> str:
  """A row for each cell of the grid."""
  columns = ("ss", "b", "gap", "lms", "f_all", "f_sel", "preference_shift", about["performance"], "distance")
  columns = tuple(column for column in dict.fromkeys(columns) if any(column in row for row in table))
  last: dict[tuple, dict[int, Mapping]] = {}
  starts = [row for row in table if row["step"] == 0]
  for row in table:
    seeds = last.setdefault(tuple(row[key] for key in RUN[:4]), {})
    if row["seed"] not in seeds or row["step"] >= seeds[row["seed"]]["step"]:
      seeds[row["seed"]] = row
  lines = [["objective", "remedy", "n", "seeds", *columns], ["---"] * (4 + len(columns))]
  if starts:
    lines.append(["start model", "", "", "", *(_mean(starts[:1], column) for column in columns)])
  for (_, objective, remedy, n), seeds in last.items():
    lines.append([objective, remedy, f"{n:,}", str(len(seeds)), *(_mean(seeds.values(), c) for c in columns)])
  return _table(lines)


def correlations(found: Mapping) -> str:
  lines = [["x", "y", "given", "kind", "r, 95 % of runs", "points", "runs", "left out"], ["---"] * 8]
  for each in found["correlations"]:
    estimate = each["estimate"]
    lines.append([each["x"], each["y"], ", ".join(each["given"]) or "-", each["kind"],
                  _interval(estimate) if estimate else NOTHING, str(each["points"]), str(each["runs"]),
                  each["reason"] or "-"])  # fmt: skip
  return _table(lines)


def controls(found: Mapping) -> str:
  text = ("`two_sided` - `unswapped` is the objective's own part, `unswapped` - `random` that of reading gendered text "
          "alone; at the runs' ends, paired over sizes and seeds, with Student's interval.\n\n")
  lines = [["column", "difference", "mean, 95 %", "pairs"], ["---"] * 4]
  for each in found["controls"]:
    value = _interval(each["estimate"]) if each["estimate"] else NOTHING
    lines.append([each["column"], f"{each['one']} - {each['other']}", value, str(each["pairs"])])
  return text + _table(lines)


def slopes(found: Mapping) -> str:
  cells: dict[tuple, list[Mapping]] = {}
  for each in found["slopes"]:
    cells.setdefault(tuple(each["run"][1:4]), []).append(each)
  lines = [["objective", "remedy", "n", "slope of F_all on F_sel, each seed"], ["---"] * 4]
  for (objective, remedy, n), each in cells.items():
    told = [f"{one['slope']:.2f}" if one["slope"] is not None else one["reason"] for one in each]
    lines.append([objective, remedy, f"{n:,}", ", ".join(told)])
  tolerance = found["tolerance"]
  note = NOTHING if tolerance is None else f"{tolerance:.3g} nats a token"
  return _table(lines) + f"\n\nTolerance, 95th percentile between seeds of the runs on random text: {note}."


def remedies(found: Mapping) -> str:
  about = found["about"]
  if not found["matched"]:
    return "The grid has no remedy."
  lines = [["objective", "n", "remedy", "column", "remedy - none, 90 %", "p of equivalence", "p of no difference",
            "pairs", "verdict"], ["---"] * 9]  # fmt: skip
  for each in found["matched"]:
    test = each["test"]
    told = [f"{test['mean']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}]", f"{test['p']:.3g}",
            f"{test['p_zero']:.3g}", str(test["pairs"]), each["verdict"]] if test else [
              NOTHING, "-", "-", "-", each["reason"] or "fewer than two pairs"]  # fmt: skip
    lines.append([each["objective"], f"{each['n']:,}", each["remedy"], each["column"], *told])
  return f"Where a run's `{about['bias']}` first comes down to {about['level']:g}.\n\n" + _table(lines)


def sizes(found: Mapping) -> str:
  lines = [["objective", "smallest n", "bias by n", "note"], ["---"] * 4]
  for each in found["sizes"]:
    by_n = ", ".join(f"{int(n):,}: {value:.3g}" for n, value in each["by_n"].items())
    lines.append([each["objective"], f"{each['n']:,}" if each["n"] else "none", by_n or NOTHING, each["reason"] or "-"])
  return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(estimate: Mapping) -> str:
  if estimate["low"] is None:
    return f"{estimate['value']:.3f} (no interval)"
  return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _mean(rows, column: str) -> str:
  values = [row[column] for row in rows if row.get(column) is not None]
  return f"{sum(values) / len(values):.3f}" if values else "-"


@figure
def forgetting_bias(results: Mapping) -> Figure | None:
  """Each run's way from the start model, one colour a cell of the grid."""
  if "table" not in results:
    return None
  bias, runs = results["bias"], {}
  for row in sorted(results["table"], key=lambda row: row["step"]):
    if row.get("f_all") is not None and row.get(bias) is not None:
      runs.setdefault(tuple(row[key] for key in RUN), []).append(row)
  drawn = canvas(5.4)
  ax = drawn.add_axes((0.07, 0.1, 0.62, 0.85))
  cells = list(dict.fromkeys((key[1], key[2]) for key in runs))
  for key, rows in runs.items():
    style = look(cells.index((key[1], key[2])))
    x, y = [row["f_all"] for row in rows], [row[bias] for row in rows]
    ax.plot(x, y, color=style["color"], lw=0.8, alpha=0.5, zorder=2)
    ax.plot(x[-1:], y[-1:], ls="", ms=6, mew=0, zorder=3, **style)
  first = next(iter(runs.values()), [])
  if first and first[0]["step"] == 0:
    ax.plot([first[0]["f_all"]], [first[0][bias]], ls="", ms=13, mec="white", zorder=5, **BASE_LOOK)
  ax.axhline(0, color=INK, lw=1.1, zorder=1)
  ax.axvline(0, color=MUTED, lw=0.8, zorder=1)
  ax.set_xlabel("overall forgetting, nats/token")
  ax.set_ylabel(f"bias ({bias}; ideal 0)")
  keys = [ax.plot([], [], ls="", ms=13 if name == "start model" else 7, label=name, **style)[0] for name, style in
          [("start model", BASE_LOOK), *((shorten(objective if remedy == "none" else f"{objective}, {remedy}"), look(i))
                                         for i, (objective, remedy) in enumerate(cells))]]  # fmt: skip
  drawn.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.7, 0.97))
  return drawn
