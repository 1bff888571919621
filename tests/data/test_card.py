"""The data card: what it counts against what is there, and what it says of overlap and of texts that are cut."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jaxbias.data import card, roles, sources
from jaxbias.data.corpora import overlaps_with
from jaxbias.data.roles import with_roles
from jaxbias.data.rows import Passage
from jaxbias.data.tokens import Tokenizer, tokenizer_of_metadata
from jaxbias.methods import recipe
from tests.conftest import BYTE_LEVEL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  return Tokenizer(tokenizer_of_metadata(metadata, "tiny"), 1, 2, 2, len(BYTE_LEVEL["tokens"]), "")


@pytest.fixture(scope="module")
def builtin():
  return dataclasses.replace(sources.load("builtin"), files={"a|b.jsonl": "0" * 64})


def passages(*texts: str) -> tuple[Passage, ...]:
  return tuple(Passage(f"p{i}", text, 0, "ab"[i % 2]) for i, text in enumerate(texts))


def test_counts_tokens_and_overlap(builtin, tokenizer):
  held_out = builtin.test.texts[0].text
  read = passages(f"It says: {held_out}", "12" * 9, "the cat", "12")
  made = card.make(builtin, "test", {"npo": {"retain": read}, "sft": {"retain": read[:2]}}, tokenizer, 8)
  first, second = made["texts"]
  lengths = [len(tokenizer.encode(p.text)) for p in read]
  assert first["variants"] == ["npo"] and second["variants"] == ["sft"] and second["texts"] == 2
  assert first["tokens"] == {"sum": sum(lengths), "mean": np.mean(lengths), "p50": np.median(lengths),
                             "p95": np.percentile(lengths, 95), "max": max(lengths), "cut": 2}  # fmt: skip
  assert first["overlapping_ids"] == ["p0"] and first["overlapping"] == 1 and first["domains"] == {"a": 2, "b": 2}
  assert made["splits"]["test"]["triples"] == len(builtin.test.triples) and made["files"] == dict(builtin.files)
  assert sum(made["splits"]["train"]["domains"].values()) == made["splits"]["train"]["triples"]
  assert json.loads(json.dumps(made)) == made


def test_overlap_is_thirteen_words_or_all_of_a_short_text():
  words = [f"w{i}" for i in range(20)]
  overlaps = overlaps_with([" ".join(words), "a b c", ""])
  assert overlaps("x " + " ".join(words[3:16])) and not overlaps("x " + " ".join(words[3:15]))
  assert overlaps("so A, b: c!") and not overlaps("a b d c")


def test_variants_share_an_entry_and_large_roles_are_sampled(builtin, tokenizer, tmp_path, monkeypatch):
  rows = [{"text": f"{'12' * (i % 3 + 1)} {i}" if i % 4 else ""} for i in range(80)]
  path = tmp_path / "r.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  monkeypatch.setattr(roles, "IN_MEMORY", 10)
  monkeypatch.setattr(card, "CHECKED", 15)
  data = with_roles(builtin, {"general": f"2 * {path} + builtin"})
  read = {name: {"general": recipe(name, {})(data.train, 0).general} for name in ("npo", "biasunlearn")}
  made = card.make(data, "test", read, tokenizer, 0)
  (entry,) = made["texts"]
  assert entry["variants"] == ["npo", "biasunlearn"] and entry["checked"] == 15 and entry["tokens"]["cut"] == 0
  assert entry["texts"] == 60 + len(builtin.train.texts)
  mine, theirs = made["sources"]["general"]
  assert mine["dropped"] == {"empty text": 20} and (mine["rows"], mine["used"], mine["weight"]) == (80, 60, 2.0)
  assert theirs["source"] == "builtin" and theirs["rows"] == len(builtin.train.texts)
  page = card.markdown(made)
  assert f"| general | {path} | 2 | 80 | 60 | empty text 20 |" in page and "of 15 checked" in page
  assert all(line.count("|") == page.splitlines()[i - 1].count("|") for i, line in enumerate(page.splitlines())
             if line.startswith("|") and page.splitlines()[i - 1].startswith("|"))  # fmt: skip


def test_what_is_left_out_is_counted_by_reason(tmp_path):
  sentences = lambda blank: [{"gold_label": label, "sentence": f"A{blank}{fill} x"} for label, fill in
                             (("stereotype", "b"), ("anti-stereotype", "c"), ("unrelated", "d"))]
  records = [{"id": f"{n}{before}", "bias_type": "race", "target": f"term{n}", "context": f"A{before}BLANK x",
              "sentences": sentences(before)} for n in range(12) for before in (" ", ".")]  # fmt: skip
  path = tmp_path / "s.json"
  path.write_text(json.dumps({"data": {"intrasentence": records, "intersentence": []}}))
  train = sources.load(path).train
  assert train.dropped == {"doubled or glued blank": 6} and len(train.triples) == 6
  assert sources.of_domains(sources.load(path), ("race",)).train.dropped == train.dropped
