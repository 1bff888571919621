"""One self-contained page: inline style, inline SVG, nothing fetched, every word from the file escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape

from jaxbias.data import card
from jaxbias.report import figures as pictures
from jaxbias.report import results as read
from jaxbias.report import watch_figures
from jaxbias.report.headline import headline
from jaxbias.report.style import STYLE
from jaxbias.report.tables import Cell, Table, notes, tables

SECTIONS = {
  "scatter": (
    "Fairness against forgetting",
    "Large points: means over seeds with intervals; small ones: single seeds. The aim is the crossing of the two ideal "
    "lines: unbiased (height) with nothing else lost (left).",
  ),
  "domains": (None, "Stereotype score by domain, before (dotted line, star) and after training."),
  "curves": ("Training", "Parts of each loss over the steps. Thick: mean over seeds; thin: single seeds."),
  "validation": (None, "Stereotype score on the validation terms while training."),
  **watch_figures.SECTIONS,
}
NOTE = (
  "<h2>A note on content</h2><p>The test items contain stereotypes about people, some of them offensive. They are here "
  "to be measured; nobody endorses them. A stereotype score near its ideal says that a model does not prefer these "
  "stereotypes in these sentences; it does not show that the model is free of bias.</p>"
)
AIMS = {
  "ideal": "{ideal:g} is ideal",
  "higher": "higher is better",
  "lower": "lower is better",
  "none": "no better direction",
}


def html(results: Mapping, svgs: Mapping[str, str | None] | None = None) -> str:
  """The report as one HTML page. `svgs`: pictures by name where they are drawn already."""
  svgs = svgs or {name: draw(results) for name, draw in pictures.FIGURES.items()}
  overall, *split = [_table(table, results) for table in tables(results)]
  said = "".join(f"<li>{escape(note)}</li>" for note in notes(results))
  body = [
    f"<h1>{escape(str(results['title']))}</h1>",
    f"<p>{escape(_what_was_run(results))}</p>",
    f'<p class="found">{escape(headline(results))}</p>',
    f'<h2>Results on the test split</h2>{overall}<ul class="small">{said}</ul>',
    _picture("scatter", svgs),
    f"<h2>By domain</h2>{''.join(split)}{_picture('domains', svgs)}" if split else "",
    _picture("curves", svgs),
    _picture("validation", svgs),
    *(_picture(name, svgs) for name in watch_figures.SECTIONS),
    _objectives(results),
    _data(results),
    _how_to_read(results),
    _provenance(results),
    NOTE,
  ]
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(str(results['title']))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
    + "\n".join(filter(None, body))
    + "\n</main>\n</body>\n</html>\n"
  )


def _what_was_run(results: Mapping) -> str:
  """Model, data, seeds, steps and time in a few sentences; what the file does not say is left out."""
  model, data, variants = results["model"], results["data"], len(read.trained(results))
  size = ""
  if model.get("parameters"):
    trainable = f", {_millions(model['trainable'])} of them trainable" if model.get("trainable") else ""
    size = f" ({_millions(model['parameters'])} parameters{trainable})"
  seeds = results["seeds"]
  said = [
    f"{model.get('source', 'The model')}{size} was trained with {_count(variants, 'objective')}, "
    f"{_count(results['steps'], 'step')} each, {'seed' if len(seeds) == 1 else 'seeds'} {_and(map(str, seeds))}."
  ]
  counts = data.get("counts") or {}
  sizes = [f"{name}: {_and(f'{n:,} {what}' for what, n in split.items())}" for name, split in counts.items()]
  said.append(f"Data: {data.get('name', 'unnamed')}" + (f" ({'; '.join(sizes)})." if sizes else "."))
  where = f" on {results['hardware']}" if results.get("hardware") else ""
  if (seconds := read.finite(results.get("wall_seconds"))) is not None:
    said.append(f"It took {duration(seconds)}{where}.")
  return " ".join(said)


def _millions(count: float) -> str:
  return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _count(number: int, what: str) -> str:
  return f"{number:,} {what}{'' if number == 1 else 's'}"


def _and(words: Iterable[str]) -> str:
  *most, last = [*words] or [""]
  return f"{', '.join(most)} and {last}" if most else last


def duration(seconds: float) -> str:
  """`7 min 13 s`; hours without seconds."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes >= 60:
    return f"{minutes // 60} h {minutes % 60} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _table(table: Table, results: Mapping) -> str:
  heads = "".join(
    f'<th scope="col"><span title="{escape(str(column.metric.get("help", "")))}">{escape(column.label)}</span>'
    f"<small>{escape(column.aim)}</small></th>"
    for column in table.columns
  )
  rows = []
  for index, (name, row) in enumerate(zip(table.labels, read.rows(results), strict=True)):
    cells = "".join(_cell(column.cells[index]) for column in table.columns)
    kind = "base" if row["name"] == "base" else "variant"
    rows.append(f'<tr class="{kind}"><td>{escape(name)}</td>{cells}</tr>')
  return (
    f'<div class="wide"><table><thead><tr><th scope="col">model</th>{heads}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def _cell(cell: Cell) -> str:
  if not cell.interval and cell.note:
    return f'<td class="none" title="{escape(cell.note)}">{escape(cell.value)}</td>'
  value = f"<b>{escape(cell.value)}</b>" if cell.best else escape(cell.value)
  return f"<td>{value}{f'<small>{escape(cell.interval)}</small>' if cell.interval else ''}</td>"


def _picture(name: str, svgs: Mapping[str, str | None]) -> str:
  """A figure with its caption; the page's own inks in place of the fixed ones, so that it follows a dark theme."""
  if not (svg := svgs.get(name)):
    return ""
  heading, caption = SECTIONS[name]
  for ink in ("ink", "muted", "grid", "band", "paper"):
    svg = re.sub(rf"(?<=: ){getattr(pictures, ink.upper())}(?=[;\"])", f"var(--{ink})", svg)
  title = f"<h2>{escape(heading)}</h2>" if heading else ""
  return f'{title}<figure><div class="wide">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _objectives(results: Mapping) -> str:
  """What each variant minimised and what that cost."""
  rows = [row for row in read.trained(results) if row.get("losses") or row.get("train")]
  if not rows:
    return ""
  lines = []
  for row in rows:
    losses = " + ".join(_loss(name, settings) for name, settings in (row.get("losses") or {}).items())
    train = row.get("train") or {}
    seconds = ", ".join(map(duration, _each(train.get("seconds"))))
    tokens = ", ".join(f"{count:,}" for count in dict.fromkeys(_each(train.get("tokens"))))
    lines.append(
      f'<tr><td>{escape(read.label(row))}</td><td class="left">{escape(losses)}</td>'
      f"<td>{escape(seconds)}</td><td>{escape(tokens)}</td></tr>"
    )
  return (
    '<h2>Objectives and budget</h2><div class="wide"><table><thead><tr><th scope="col">model</th>'
    '<th scope="col" class="left">loss</th><th scope="col">time<small>each seed</small></th>'
    '<th scope="col">tokens<small>each seed</small></th></tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )


def _data(results: Mapping) -> str:
  """The card of what was read; nothing for results that were written without one."""
  if not (found := results["data"].get("card")):
    return ""
  row = lambda cells, tag: "<tr>" + "".join(f'<{tag} class="left">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"
  parts = [f'<p>{escape(title)}</p><div class="wide"><table><thead>{row(head, "th")}</thead>'
           f'<tbody>{"".join(row(cells, "td") for cells in rows)}</tbody></table></div>'
           for title, head, rows in card.tables(found)]  # fmt: skip
  return f"<h2>Data</h2>{''.join(parts)}<p>{escape(card.notes(found))}</p>"


def _each(seeds: object) -> list:
  """One number for all seeds, a list with one for each, or nothing: always a list."""
  return seeds if isinstance(seeds, list) else [] if seeds is None else [seeds]


def _loss(name: str, settings: Mapping) -> str:
  """`0.5 npo on forget (beta 0.1)`."""
  rest = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("weight", "on"))
  weight, rows = settings.get("weight", ""), f"on {settings['on']}" if "on" in settings else ""
  return " ".join(filter(None, (str(weight), name, rows, f"({rest})" if rest else "")))


def _how_to_read(results: Mapping) -> str:
  lines = []
  for name, metric in results["metrics"].items():
    aim = AIMS[metric["better"]].format(ideal=metric.get("ideal"))
    if metric["better"] in ("higher", "lower") and read.finite(metric.get("ideal")) is not None:
      aim += f", ideally {metric['ideal']:g}"
    said = str(metric.get("help") or "").strip().rstrip(".")
    aim = f"In {metric['unit']}, {aim}." if metric.get("unit") else f"{aim.capitalize()}."
    text = f"{said[:1].upper()}{said[1:]}. {aim}" if said else aim
    lines.append(f"<dt>{escape(metric.get('label', name))}</dt><dd>{escape(text)}</dd>")
  return f"<h2>How to read this</h2><dl>{''.join(lines)}</dl>"


def _provenance(results: Mapping) -> str:
  git = results.get("git")
  dirty = " with uncommitted changes" if git and git.get("dirty") else ""
  commit = f"{git.get('commit')}{dirty}" if git else "not a git checkout"
  facts = {
    "Config": results["config_hash"],
    "Model": ", ".join(str(results["model"][key]) for key in ("source", "fingerprint") if results["model"].get(key)),
    "Data": ", ".join(str(results["data"][key]) for key in ("name", "fingerprint") if results["data"].get(key)),
    "Git commit": commit,
    "Versions": ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()),
    "Hardware": results.get("hardware"),
    "Written": results.get("created"),
  }
  lines = "".join(f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items() if fact)
  command = f"<pre>{escape(results['command'])}</pre>" if results.get("command") else ""
  return f"<h2>Provenance</h2>{command}<dl>{lines}</dl>"
