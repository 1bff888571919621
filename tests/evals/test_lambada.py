"""The last word: how a passage is split, perplexity and accuracy by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import lambada
from jaxbias.evals.task import TokenScores

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/capability"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="LAMBADA's files are not beside the repository")
TASK = lambada.TASKS[0]


def word(*logprob: float, greedy: bool = True) -> list[TokenScores]:
  zero_N = np.zeros(len(logprob))
  return [TokenScores(np.array(logprob), np.array([True] * (len(logprob) - 1) + [greedy]), zero_N, zero_N)]


def test_by_hand(tmp_path):
  path = tmp_path / "passages.txt"
  path.write_text("the cat sat on the mat\n\nshe said  'yes'\n")
  passages = TASK.load(str(path))
  rows = TASK.rows(passages)
  assert [(row.context, row.options) for row in rows] == [("the cat sat on the", (" mat",)), ("she said ", (" 'yes'",))]
  found = TASK.reduce(passages, {"p1": word(-1.0), "p2": word(-2.0, -3.0, greedy=False)})
  assert_allclose(found.estimates["overall"]["perplexity"].value, np.exp(3.0))  # (1 + 5) / 2, tokens added up
  assert found.estimates["overall"]["acc"].value == 50.0  # one wrong token is a wrong word
  assert found.items["nll"].tolist() == [1.0, 5.0]


def test_malformed_passages(tmp_path):
  path = tmp_path / "passages.jsonl"
  for text, said in (("alone", "line 2: `text` needs a last word"), ("ends ", "line 2: `text` needs a last word"),
                     ("", "line 2: `text` is empty.")):
    path.write_text(json.dumps({"text": "two words"}) + "\n" + json.dumps({"text": text}))
    with pytest.raises(UserError, match=said):
      TASK.load(str(path))
  path.write_text("\n")
  with pytest.raises(UserError, match="holds no passages"):
    TASK.load(str(path))


def test_a_missing_answer_is_named():
  with pytest.raises(UserError, match="the answers lack 1 of 1 ids, `p1` first."):
    TASK.reduce([lambada.Choice("p1", "a", (" b",))], {})


@needs_data
def test_every_passage_of_both_files_is_read():
  assert len(TASK.load(str(DATA / "lambada_test_openai.jsonl"))) == 5153
  assert len(TASK.load(str(DATA / "lambada_development_plain_text.txt"))) == 4869
