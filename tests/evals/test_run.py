"""`evaluate` on a tiny model: one command prints both scorings, and its JSON holds what the table was made from."""

from __future__ import annotations

import json

from rich.console import Console

from jaxbias.data import sources
from jaxbias.evals import run, stereoset


def test_evaluate_prints_both_scorings_and_keeps_every_score(make_gguf, cache, tmp_path):
  out = tmp_path / "found" / "scores.json"
  table = run.stereoset(str(make_gguf()), "builtin", None, 6, out)
  console = Console(width=140, record=True)
  console.print(table)
  printed = console.export_text()
  found = json.loads(out.read_text())
  assert found["examples"] == 6 and found["of"] == 480 and "the first 6 of 480 triples" in printed
  triples = sources.load("builtin").train.triples[:6]
  assert list(found["scores"]) == [triple.id for triple in triples]
  for scoring in stereoset.SCORINGS:
    again = stereoset.reduce(triples, stereoset.sentence_scores(triples, found["scores"], scoring)).estimates["overall"]
    assert found["estimates"][scoring]["overall"]["ss"]["value"] == again["ss"].value
    assert f"{again['ss'].value:.2f}" in printed and scoring in printed
