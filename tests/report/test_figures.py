"""Pictures of a comparison: whole, told apart, the same each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from jaxbias.report import figures
from jaxbias.report.html import html
from jaxbias.report.labels import shorten
from tests.report import row


def test_figures_are_xml_and_share_no_id(results):
  results["curves"]["sft"]["0"][1]["validation"] = {"ss": 57.0}
  ids = []
  drawn = {name: svg for name, draw in figures.FIGURES.items() if (svg := draw(results))}
  assert {"scatter", "domains", "curves", "validation"} <= drawn.keys()
  for name, svg in drawn.items():
    tree = ElementTree.fromstring(svg)
    mine = [element.get("id") for element in tree.iter() if element.get("id")]
    ids += mine
    for element in tree.iter():
      for value in element.attrib.values():
        for target in re.findall(r"url\(#(.*?)\)|^#(.*)", value):
          assert "".join(target) in mine, name
  assert len(ids) == len(set(ids))


def test_scatter_has_base_point_labels_and_ideal(results):
  svg = figures.scatter(results)
  words = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
  assert {"base model", "SFT", "NPO", "gradient ascent", "ideal 50"} <= set(words)
  results["rows"] = results["rows"][1:2]
  assert "base model" in figures.scatter(results)  # nothing trained yet


def test_scatter_names_points_in_a_legend_when_there_are_many(results):
  results["rows"] += [row(f"v{i}", f"variant {i}", 50 + i / 3, 80, i / 90, 0.1, 0.1) for i in range(20)]
  words = [e.text for e in ElementTree.fromstring(figures.scatter(results)).iter("{http://www.w3.org/2000/svg}text")]
  assert {f"variant {i}" for i in range(20)} <= set(words)
  assert len({tuple(figures.look(i).values()) for i in range(42)}) == 42
  html(results)


def test_figures_without_their_data_are_left_out(results):
  del results["metrics"]["f_all"], results["curves"]
  for each in results["rows"]:
    del each["domains"]
  assert all(draw(results) is None for draw in figures.FIGURES.values())
  assert "<svg" not in html(results)


def test_figures_are_the_same_each_time_and_png_when_asked(results):
  assert figures.domains(results) == figures.domains(results)
  assert figures.domains(results, "png").startswith(b"\x89PNG")


def test_long_names_keep_head_and_tail():
  assert shorten("npo") == "npo"
  assert shorten("NPO with a very long name, beta=0.1", 21) == "NPO with a ve…eta=0.1"
