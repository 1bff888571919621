from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console

from jaxbias.errors import UserError
from jaxbias.report import figures, write
from jaxbias.report.headline import headline
from jaxbias.report.html import duration, html
from jaxbias.report.results import Estimate, load
from jaxbias.report.tables import best, markdown, tables, terminal
from tests.report import HOSTILE, METRICS, estimate, row


def plain(results, width=200):
  out = io.StringIO()
  Console(file=out, width=width).print(terminal(results))
  return out.getvalue()


def lines(text, start):
  return next(line for line in text.splitlines() if line.startswith(start))


# --- reading -----------------------------------------------------------------------------------------------------


def test_load_takes_the_file_or_its_folder(tmp_path, results):
  (tmp_path / "results.json").write_text(json.dumps(results))
  assert load(tmp_path) == load(tmp_path / "results.json") == results


@pytest.mark.parametrize(
  ("text", "said"),
  [
    (None, "there is no"),
    ('{"schema": 1,\n "title": "cut', "is not JSON: line 2"),
    ("[1, 2]", "no `schema`"),
    ('{"schema": 2}', "has schema 2"),
    ('{"schema": 1, "title": "t"}', "lacks `model`"),
  ],
)
def test_load_says_what_is_wrong(tmp_path, text, said):
  if text is not None:
    (tmp_path / "results.json").write_text(text)
  with pytest.raises(UserError, match=re.escape(said)):
    load(tmp_path)


@pytest.mark.parametrize(
  ("path", "value", "said"),
  [
    (("metrics", "lms", "better"), "up", "`metrics.lms.better` must be one of"),
    (("metrics", "ss", "ideal"), None, "`metrics.ss` has no `ideal`"),
    (("rows", 0), {"label": "no name"}, "`rows[0]` has no `name`"),
    (("rows",), {}, "`rows` must be a list"),
  ],
)
def test_load_checks_what_the_tables_rely_on(tmp_path, results, path, value, said):
  inner = results
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  (tmp_path / "results.json").write_text(json.dumps(results))
  with pytest.raises(UserError, match=re.escape(said)):
    load(tmp_path)


def test_reading_a_run_needs_no_jax():
  code = "import sys, jaxbias.report.write; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- tables ------------------------------------------------------------------------------------------------------


def test_base_comes_first_and_headers_say_unit_ideal_and_direction(results):
  table = tables(results)[0]
  assert table.labels == ("base model", "SFT", "gradient ascent", "NPO")
  assert [column.aim for column in table.columns] == [
    "% → 50", "% ↑ 100", "nats/token ↓ 0", "nats/token ↑", "nats/token",
  ]  # fmt: skip


def test_every_value_is_there_at_its_rounding(results):
  drawn = {"markdown": markdown(results).replace("**", ""), "html": html(results), "terminal": plain(results)}
  for kind, text in drawn.items():
    for each in results["rows"]:
      for metric, found in each["estimates"].items():
        digits = 1 if METRICS[metric]["unit"] == "%" else 3
        value, low, high = (f"{found[key]:z.{digits}f}" for key in ("value", "low", "high"))
        assert value in text, (kind, each["name"], metric)
        if found["low"] != found["high"]:
          assert f"[{low}, {high}]" in text, (kind, each["name"], metric)
  assert "95 % bootstrap over target terms, 2000 draws" in drawn["markdown"]
  assert "2 seeds" in drawn["markdown"]
  assert lines(drawn["markdown"], "| NPO") == (
    "| NPO | 50.0 [48.8, 51.3] | 86.0 [84.0, 88.0] | +0.000 [-0.010, 0.010] "
    "| +0.600 [0.590, 0.610] | +0.300 [0.290, 0.310] |"
  )


def test_best_follows_the_direction_and_only_among_trained_variants(results):
  bold = {column.label: [cell.best for cell in column.cells] for column in tables(results)[0].columns}
  assert bold["SS"] == [False, False, True, True]  # 50.0 as printed, from either side
  assert bold["LMS"] == [False, True, False, False]
  assert bold["F_all"] == [False, False, False, True]  # the base's 0 takes no part
  assert bold["F_st"] == [False, False, True, False]
  assert bold["shift"] == [False, False, False, False]  # no direction
  assert "**88.2** [86.2, 90.2]" in markdown(results)
  assert "*88.2" in plain(results)


@pytest.mark.parametrize(
  ("values", "better", "winners"),
  [
    ([48.0, 53.0, None], "ideal", {0}),
    ([48.0, 52.0, 53.0], "ideal", {0, 1}),
    ([1.0, 2.0, None], "higher", {1}),
    ([1.0, -2.0, None], "lower", {1}),
    ([1.0, None, None], "lower", set()),
    ([7.01, 7.02, 7.03], "higher", set()),
    ([None, None, None], "ideal", set()),
    ([1.0, 2.0, 3.0], "none", set()),
  ],
)
def test_best(values, better, winners):
  found = [None if value is None else Estimate(value, None, None, ()) for value in values]
  assert best(found, {"unit": "%", "ideal": 50.0, "better": better}) == winners


def test_domains_have_their_own_table(results):
  table = tables(results)[1]
  assert [column.label for column in table.columns] == ["gender", "race"]
  assert str(table.columns[1].cells[1]) == "55.0 [46.0, 64.0]"


@pytest.mark.parametrize("missing", [None, {}, {"value": None, "reason": "no general text"}, {"value": float("nan")}])
def test_missing_metrics_are_not_available(results, missing):
  results["rows"][0]["estimates"]["f_all"] = missing
  assert str(tables(results)[0].columns[2].cells[1]) == "n/a"
  assert ("SFT has no F_all: no general text." in markdown(results)) == bool(missing and "reason" in missing)
  assert "SFT" not in figures.scatter(results)
  html(results), plain(results)


def test_a_failed_variant_is_shown_as_failed(results):
  results["rows"][2] = {"name": "ga", "label": "gradient ascent", "failed": "the loss was not finite at step 12"}
  assert lines(markdown(results), "| gradient ascent (failed)").count("n/a") == len(METRICS)
  for text in (markdown(results), html(results), plain(results)):
    assert "gradient ascent failed: the loss was not finite at step 12." in text
  for draw in figures.FIGURES.values():
    draw(results)


def test_a_narrow_terminal_gets_bands_not_broken_numbers(results):
  text = plain(results, width=60)
  assert max(map(len, text.splitlines())) <= 60
  assert text.count("base model") > 2
  assert "[86.2, 90.2]" in text


# --- the headline ------------------------------------------------------------------------------------------------


def test_headline_says_that_overlapping_intervals_settle_nothing(results):
  said = headline(results).replace("\N{NO-BREAK SPACE}", " ")
  assert said.startswith("Nearest to a stereotype score of 50 came gradient ascent: 50.0 % [48.7, 51.2]")
  assert "overlaps that of NPO: no clear winner" in said
  assert "also overlaps the base" not in said
  assert "language-modelling score fell from 87.5 %" in said  # near 50 by being broken


def test_headline_compares_distances_not_sides(results):
  low, high = row("a", "A", 45.0, 88.0, 0.1, 0.1, 0.1), row("b", "B", 56.0, 88.0, 0.1, 0.1, 0.1)
  results["rows"] = [results["rows"][1], low, high]
  assert "overlaps that of B" in headline(results)  # 5 +/- 1.25 and 6 +/- 1.25 from the ideal
  assert "No variant came nearer" not in headline(results)


def test_headline_without_progress_or_scores(results):
  results["rows"] = [results["rows"][1], row("a", "A", 39.0 - 0.3, 88.0, 0.1, 0.1, 0.1)]
  assert headline(results).startswith("No variant came nearer to a stereotype score of 50 than the base model")
  assert "overlaps the base model's" in headline(results)
  results["rows"] = results["rows"][:1]
  assert headline(results) == "No variant has a stereotype score."


# --- the page ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
  """Tags that are open, and everything that would be fetched."""

  VOID = {"meta", "br"}

  def __init__(self):
    super().__init__()
    self.open, self.fetched, self.tags = [], [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.open += [tag] * (tag not in self.VOID)
    self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_page_is_whole_and_fetches_nothing(results):
  text = html(results)
  page = Page()
  page.feed(text)
  assert not page.open and not page.fetched
  assert not {"script", "link", "img", "iframe"} & page.tags
  assert "@import" not in text and "url(http" not in text
  for said in ("134.5 million", "7 min 13 s", "a1b2c3d4e5f6", "abc1234 with uncommitted changes", "12,345, 12,346",
               "0.5 npo on forget (beta 0.1)", "In %, 50 is ideal.", "offensive"):  # fmt: skip
    assert said in text


def test_hostile_names_stay_text_everywhere(results):
  results["title"] = results["command"] = results["interval"] = HOSTILE
  results["metrics"]["ss"] |= {"label": HOSTILE, "help": HOSTILE, "unit": HOSTILE}
  results["rows"][0] |= {"label": HOSTILE, "losses": {HOSTILE: {HOSTILE: HOSTILE}}}
  results["rows"][0]["domains"][HOSTILE] = {"ss": estimate(50.0, 1.0)}
  results["rows"][2]["failed"] = HOSTILE
  results["curves"]["sft"]["0"][0]["parts"] = {HOSTILE: 1.0}
  page = Page()
  page.feed(html(results))
  assert "script" not in page.tags
  assert "<script" not in markdown(results)
  assert r"\|" in lines(markdown(results), r"| &lt;script")
  assert HOSTILE in plain(results, width=400)
  for draw in figures.FIGURES.values():
    if svg := draw(results):
      assert not any("script" in element.tag for element in ElementTree.fromstring(svg).iter())


def test_page_of_the_least_that_a_file_may_hold(results):
  least = {key: results[key] for key in ("schema", "title", "config_hash", "interval", "metrics")}
  least |= {"model": {}, "data": {}, "seeds": [3], "steps": 1, "rows": [{"name": "base"}]}
  page = Page()
  page.feed(html(least))
  assert not page.open
  assert "not a git checkout" in html(least)
  assert "n/a" in plain(least) and "n/a" in markdown(least)


def test_durations():
  assert [duration(s) for s in (0.4, 59.6, 433.1, 7380)] == ["0 s", "1 min 0 s", "7 min 13 s", "2 h 3 min"]


# --- writing -----------------------------------------------------------------------------------------------------


def test_write_leaves_a_report_and_nothing_else(tmp_path, results):
  (tmp_path / "results.json").write_text(json.dumps(results))
  assert write.write(tmp_path) == tmp_path / "report.html"
  names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
  drawn = {f"figures/{name}.{kind}" for name in ("scatter", "domains", "curves") for kind in ("svg", "png")}
  assert names == {"results.json", "report.html", "table.md"} | drawn
  assert (tmp_path / "table.md").read_text() == markdown(results)


def test_a_failed_write_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch):
  target = tmp_path / "table.md"
  target.write_text("old")

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(UserError, match="could not be written: No space left"):
    write._replace(target, b"new")
  assert [path.name for path in tmp_path.iterdir()] == ["table.md"] and target.read_text() == "old"
