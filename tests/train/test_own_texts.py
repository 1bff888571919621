"""A run on texts of one's own, read and tokenised by the step: what it draws, and what its card says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxbias import compare as comparison
from jaxbias import config as configs
from jaxbias.data import roles
from jaxbias.errors import UserError
from jaxbias.report.html import html
from tests.train import Workplace, lines, read


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  texts = {"forget": [f"a cat {i}" for i in range(9)], "retain": [f"the hat {i} sat" for i in range(7)],
           "general": ["the cat " * 8 + str(i) for i in range(5)] + [""]}  # fmt: skip
  for role, of_role in texts.items():
    (folder / f"{role}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in of_role))
  return folder


def config(tiny, sources, *more):
  given = [f"--config.data.roles.{role}={sources / role}.jsonl?text=body" for role in ("forget", "retain", "general")]
  found, _ = configs.from_command_line([
    f"--config={tiny.config}", *given, "--config.compare=('npo',)", "--config.seeds=(0,)", "--config.train.steps=4",
    "--config.train.checkpoint_every=2", "--config.data.max_tokens=12", *more,
  ])  # fmt: skip
  return found


def test_in_memory_or_not_the_run_is_the_same_and_its_card_says_what_it_read(tiny, sources, tmp_path, monkeypatch):
  monkeypatch.setenv("JAXBIAS_CACHE", str(tiny.cache))
  step = "--config.train.reference=step"
  comparison.compare(config(tiny, sources, step), tmp_path / "small", "small")
  monkeypatch.setattr(roles, "IN_MEMORY", 0)
  with pytest.raises(UserError, match="set train.reference to step"):
    comparison.compare(config(tiny, sources), tmp_path / "cached", "cached")
  results = comparison.compare(config(tiny, sources, step), tmp_path / "large", "large")
  small, large = (lines(tmp_path / name / "npo-seed0" / "metrics.jsonl") for name in ("small", "large"))
  assert len(small) == 4 and [(r["loss"], r["tokens"]) for r in small] == [(r["loss"], r["tokens"]) for r in large]
  made = read(tmp_path / "large" / "data_card.json")
  by_role = {entry["role"]: entry for entry in made["texts"]}
  assert {role: entry["texts"] for role, entry in by_role.items()} == {"forget": 9, "retain": 7, "general": 5}
  assert by_role["general"]["tokens"]["cut"] == 5 and by_role["forget"]["tokens"]["cut"] == 0
  assert made["sources"]["general"][0]["dropped"] == {"empty text": 1}
  assert {str(sources / f"{role}.jsonl") for role in by_role} < made["files"].keys()
  assert made == results["data"]["card"] == read(tmp_path / "small" / "data_card.json")
  page, report = (tmp_path / "large" / "data_card.md").read_text(), html(results)
  assert "empty text 1" in page and "## Files (sha256)" in page
  assert "<h2>Data</h2>" in report and "empty text 1" in report and report.count("<table>") == report.count("</table>")
  assert np.isfinite(results["rows"][1]["estimates"]["ss"]["value"])


def test_a_source_that_cannot_be_used_stops_before_the_folder_is_claimed(tiny, sources, tmp_path):
  broken = config(tiny, sources, f"--config.data.roles.forget={sources}/forget.jsonl?text=bodi")
  with pytest.raises(UserError, match="data.roles.forget: .* has no column `bodi`; did you mean `body`?"):
    comparison.compare(broken, tmp_path / "run", "run")
  assert not (tmp_path / "run").exists()


def test_processes_that_read_different_files_do_not_start(tiny, sources, tmp_path, monkeypatch):
  monkeypatch.setattr(comparison.distributed, "from_first", lambda do: "what the first process read")
  with pytest.raises(UserError, match="reads other data than the first one"):
    comparison.compare(config(tiny, sources), tmp_path / "run", "run")
