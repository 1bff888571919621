"""Pictures of neural collapse: what they show, and when there is nothing to show."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from jaxbias.report import collapse_figures
from jaxbias.report.collapse_figures import SHOWN, collapse_curves, collapse_layers, save


def rows(models=("0", "100", "400"), sites=("layer_0", "layer_1", "head_input"), steps=True, interval=True) -> dict:
  out = []
  for m, model in enumerate(models):
    for s, site in enumerate(sites):
      for group in ("overall", "male", "female", "male - female"):
        for k, metric in enumerate((*SHOWN, "log_riesz")):
          value = 0.1 * m + 0.01 * s + k
          row = {"model": model, "site": site, "classes": "gender", "group": group, "metric": metric, "value": value}
          ends = {"low": value - 0.1, "high": value + 0.1} if interval else {"low": None, "high": None}
          out.append(row | ends | ({"step": int(model)} if steps else {}))
  return {"collapse": out}


def texts(svg: str) -> list[str]:
  ET.fromstring(svg)  # well formed
  return re.findall(r"<text[^>]*>(.*?)</text>", re.sub(r"</?tspan[^>]*>", "", svg), re.DOTALL)


@pytest.mark.parametrize("how", [{}, {"interval": False}, {"steps": False, "models": ("before", "after")}])
def test_curves_have_a_panel_a_statistic_and_a_line_a_group(how):
  shown = texts(collapse_curves(rows(**how)))
  assert {title for title, _ in SHOWN.values()} <= set(shown) and {"overall", "male", "female"} <= set(shown)
  assert "male - female" not in shown and ("step" if how.get("steps", True) else "after") in shown
  assert any("at head_input" in text for text in shown)


def test_layers_have_a_figure_each():
  shown = texts(collapse_layers(rows()))
  assert {"layer_0", "layer_1", "head_input", "step 0", "step 400"} <= set(shown) and "step 100" not in shown
  assert shown.count("0.01") >= 1 and "5.22" in shown  # agreement at the head's input, last model


def test_pictures_are_png_too_and_draw_nothing_from_nothing():
  assert collapse_layers(rows(models=("a",), steps=False), "png")[:4] == b"\x89PNG"
  assert collapse_curves(rows(models=("a",), steps=False)) is None
  assert collapse_layers(rows(sites=("head_input",))) is None
  assert collapse_curves({}) is None and collapse_figures.collapse_layers({"collapse": []}) is None


def test_each_list_of_classes_has_its_own_files(tmp_path):
  few = rows(models=("a",), sites=("layer_0", "head_input"), steps=False)["collapse"]
  other = [row | {"classes": "lists/my words.txt", "site": "head_input"} for row in few[:7]]
  assert [path.name for path in save([*few, *other], tmp_path)] == ["collapse_layers-gender.svg"]
  assert {path.suffix for path in tmp_path.iterdir()} == {".svg", ".png"}
