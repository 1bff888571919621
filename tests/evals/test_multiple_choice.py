"""Accuracy by hand, the layout of the files with its faults, and chance on the real subsets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import multiple_choice
from jaxbias.evals.multiple_choice import Question

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/capability/mcqa"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the multiple-choice files are not beside the repository")
TASKS = {task.name: task for task in multiple_choice.TASKS}
RECORD = {"question": "What is wet?", "options": "\nA. water\nB. a  dry stone ", "answer": "A. water"}


def load(tmp_path, *records) -> list[Question]:
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return multiple_choice.load(str(path))


def test_by_hand():
  questions = [Question("q1", "?", ("ab", "abcdef"), (False, True)), Question("q2", "?", ("é", "e"), (True, False)),
               Question("q3", "?", ("éé", "abc"), (True, False))]
  scores = {"q1": [[-2.0, 1], [-3.0, 3]], "q2": [[-2.0, 1], [-2.0, 1]], "q3": [[-6.0, 1], [-7.5, 1]]}
  # q1: the sum takes "ab", per character and byte -1.0 against -0.5 takes the other.
  # q2: sums tie and the first is taken, then each has one character, then -1.0 a byte (of two) beats -2.0.
  found = TASKS["piqa_cloze"].reduce(questions, scores)
  assert found.items["acc"].tolist() == [0.0, 100.0, 100.0]
  assert found.items["acc_norm"].tolist() == [100.0, 100.0, 0.0]  # q3: -3.0 a character against -2.5
  assert found.items["acc_bytes"].tolist() == [100.0, 100.0, 100.0]  # q3: -1.5 a byte against -2.5
  assert [found.estimates["overall"][name].value for name in ("chance", "ties")] == [50.0, pytest.approx(100 / 3)]


def test_what_is_asked(tmp_path):
  questions = load(tmp_path, RECORD)
  (row,) = TASKS["piqa_cloze"].rows(questions)
  assert (row.context, row.options) == ("Question: What is wet?\nAnswer:", (" water", " a dry stone"))
  assert TASKS["openbookqa_cloze"].rows(questions)[0].context == "What is wet?"


def test_faults_of_the_layout_are_mended(tmp_path):
  swallowed = {"question": "Which\nA. one\nB. two", "options": "\nC. three\nD. four?", "answer": "D. four"}
  numerals = {"question": "Which is so?\nI. this\nII. that", "options": "A. I\nB. II", "answer": "B. II"}
  twice = {"question": "Which?", "options": "A. x\nB. x\nC. y", "answer": "B. x"}
  first, second, third = load(tmp_path, swallowed, numerals, twice)
  assert (first.text, first.options, first.right) == ("Which", ("one", "two", "three", "four?"), (False,) * 3 + (True,))
  assert (second.text, second.options) == ("Which is so?\nI. this\nII. that", ("I", "II"))
  assert third.right == (True, True, False)


@pytest.mark.parametrize(("change", "said"), [
  ({"options": "A. water"}, "`options` has to be lines that begin with"),
  ({"options": "A. water\nC. stone"}, "`options` has to be lines that begin with"),
  ({"options": "A. water\nB. "}, "the question or one of its `options` is empty."),
  ({"answer": "C. water"}, "`answer` is not one of the `options`."),
  ({"answer": "B. water"}, "`answer` is not one of the `options`."),
  ({"answer": 1}, "`answer` has to be a string."),
  ({"question": ""}, "`question` is empty."),
])  # fmt: skip
def test_malformed_questions(tmp_path, change, said):
  with pytest.raises(UserError) as caught:
    load(tmp_path, RECORD, RECORD | change)
  assert "questions.jsonl line 2: " + said in str(caught.value)


@needs_data
@pytest.mark.parametrize(("file", "questions", "chance"), [
  ("piqa_validation_1500", 1500, 50.0), ("commonsenseqa_validation", 1221, 20.0983), ("openbookqa_test", 500, 25.0),
  ("mmlu_test_2850", 2850, 25.0),
])  # fmt: skip
def test_every_question_of_the_subsets_is_read_and_a_random_scorer_is_at_chance(file, questions, chance):
  examples = multiple_choice.load(str(DATA / f"{file}.jsonl"))
  assert len(examples) == questions
  rng = np.random.default_rng(0)
  scores = {row.id: [[-float(rng.exponential()), 2] for _ in row.options] for row in multiple_choice.rows(examples)}
  found = TASKS["piqa_cloze"].reduce(examples, scores).estimates["overall"]
  assert_allclose(found["chance"].value, chance, atol=1e-3)
  assert_allclose(found["acc"].value, chance, atol=4 * 100 * 0.5 / np.sqrt(questions))
