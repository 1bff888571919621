"""`groups`: negatives that the config's own model writes, beside those that need none."""

from __future__ import annotations

import dataclasses

from jaxbias import groups
from jaxbias.config import defaults
from jaxbias.data import sources
from jaxbias.data.groups import read_groups
from tests.train import tiny_model


def test_the_models_negatives_come_from_it_and_go_through_a_file(tmp_path, monkeypatch):
  builtin = sources.load("builtin")
  first, others = builtin.train.triples[:6], builtin.train.triples[-2:]
  assert {triple.domain for triple in first} == {"gender"} and "gender" not in {triple.domain for triple in others}
  few = dataclasses.replace(builtin, train=dataclasses.replace(builtin.train, triples=first + others))
  monkeypatch.setattr(sources, "load", lambda *_: few)
  config = defaults()
  config.model = str(tiny_model(tmp_path / "model"))
  path = tmp_path / "groups.jsonl"
  config.data.groups, config.data.domains = str(path), ("gender",)  # this file is not there yet
  card = groups.write(config, path)
  assert path.with_suffix(".md").read_text() == card.markdown()
  made = read_groups(path)
  assert [group.id for group in made] == [triple.id for triple in first]
  assert card.made["mask_ent"] == card.made["regen_ent"] == 6 and card.made["low_confidence"] > 0
  triples = {triple.id: triple for triple in first}
  for group in made:
    triple = triples[group.id]
    texts = {kind: [m.text for m in group.negatives if m.kind == kind] for kind in ("stereotype", "low_confidence")}
    assert texts["stereotype"] == [triple.stereotype] and group.positives[0].text == triple.anti_stereotype
    beginning = triple.anti_stereotype[: triple.prefix].rstrip()
    assert all(text.startswith(beginning) and len(text) > len(beginning) for text in texts["low_confidence"])
  kept = sum(len(group.positives) + len(group.negatives) for group in made)
  assert kept == sum(card.kept.values()), "the card counts what is in the file"
