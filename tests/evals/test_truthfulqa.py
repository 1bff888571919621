"""MC1, MC2 and MC3 by hand, chance on the real questions, and what a malformed file is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import truthfulqa
from jaxbias.evals.truthfulqa import Question

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/truthfulqa"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="TruthfulQA's files are not beside the repository")
TASKS = {task.name: task for task in truthfulqa.TASKS}
RECORD = {"question": "Is it?", "mc1_targets": {"Yes.": 1, "No": 0},
          "mc2_targets": {"Yes.": 1, "Surely": 1, "No": 0}}  # fmt: skip


def written(tmp_path, records) -> str:
  path = tmp_path / "mc_task.json"
  path.write_text(json.dumps(records))
  return str(path)


def values(probability, variant="truthfulqa_mc_original") -> dict[str, float]:
  """One question of two true answers, the second best, and two false ones."""
  question = Question("q1", "?", ("a", "b", "c", "d"), (True, True, False, False), best=1)
  scores = {"q1": [[float(np.log(p)), 3] for p in probability]}
  found = TASKS[variant].reduce([question], scores).estimates["overall"]
  return {name: round(estimate.value, 6) for name, estimate in found.items()}


def test_by_hand():
  found = values([0.1, 0.4, 0.2, 0.3])  # best 0.4 beats 0.3; true mass 0.5 of 1.0; one of two true above 0.3
  assert found == {"mc1": 100.0, "mc2": 50.0, "mc3": 50.0, "mc1_chance": 33.333333, "mc2_chance": 50.0, "ties": 0.0}
  assert values([0.9, 0.2, 0.2, 0.3])["mc1"] == 0.0  # another true answer does not help
  assert_allclose(values([0.9, 0.2, 0.2, 0.3])["mc2"], 100 * 1.1 / 1.6, atol=1e-6)


def test_a_constant_scorer_gets_nothing_strictly_and_everything_by_argmax():
  assert [values([0.5] * 4)[name] for name in ("mc1", "mc2", "mc3", "ties")] == [0.0, 50.0, 0.0, 100.0]
  assert values([0.5] * 4, "truthfulqa_mc_lmeval")["mc1"] == 100.0


def test_sums_far_below_the_smallest_float_still_divide():
  question = Question("q1", "?", ("a", "b"), (True, False), best=0)
  found = TASKS["truthfulqa_mc_original"].reduce([question], {"q1": [[-5000.0, 9], [-5000.0 - np.log(3.0), 9]]})
  assert_allclose(found.estimates["overall"]["mc2"].value, 75.0)


def test_what_is_asked(tmp_path):
  path = written(tmp_path, [RECORD])
  task = TASKS["truthfulqa_mc_zero_shot"]
  (row,) = task.rows(task.load(path))
  assert (row.id, row.context, row.options) == ("q1", "Q: Is it?\nA:", (" Yes.", " Surely.", " No."))
  (tmp_path / "qa_primer.txt").write_text("Q: One?\nA: Two.\n")
  task = TASKS["truthfulqa_mc_lmeval"]
  (row,) = task.rows(task.load(path))
  assert row.context == "Q: One?\nA: Two.\n\nQ: Is it?\nA:" and row.options == (" Yes.", " Surely", " No")
  assert TASKS["truthfulqa_mc_original"].rows(task.load(path))[0].options == (" Yes.", " Surely.", " No.")


def test_without_the_primer_the_published_variants_say_where_it_belongs(tmp_path):
  with pytest.raises(UserError, match=r"qa_primer\.txt: there is no such file; .* truthfulqa_mc_zero_shot"):
    TASKS["truthfulqa_mc_original"].load(written(tmp_path, [RECORD]))


@pytest.mark.parametrize(("change", "said"), [
  ({"question": " "}, "question 2: `question` is empty."),
  ({"mc1_targets": {"No": 0}}, "question 2: `mc1_targets` needs one right answer that `mc2_targets` holds as true."),
  ({"mc1_targets": {"Maybe": 1}}, "question 2: `mc1_targets` needs one right answer"),
  ({"mc2_targets": {"Yes.": 1}}, "question 2: `mc2_targets` has no false answer."),
  ({"mc2_targets": {"Yes.": 2}}, "question 2: `mc2_targets` has to give 0 or 1 for each answer."),
  ({"mc2_targets": ["Yes."]}, "question 2: `mc2_targets` has to be an object."),
])  # fmt: skip
def test_malformed_questions(tmp_path, change, said):
  with pytest.raises(UserError) as caught:
    TASKS["truthfulqa_mc_zero_shot"].load(written(tmp_path, [RECORD, RECORD | change]))
  assert said in str(caught.value) and "mc_task.json" in str(caught.value)


def test_empty_answers_are_left_out(tmp_path):
  record = RECORD | {"mc2_targets": RECORD["mc2_targets"] | {"": 1}}
  assert truthfulqa.load(written(tmp_path, [record]), primed=False)[0].options == ("Yes.", "Surely", "No")


@needs_data
@pytest.mark.parametrize(("file", "questions", "chance"), [
  ("mc_task_v0_hf_817.json", 817, (22.61, 44.84)),
  ("mc_task_v1_817.json", 817, (22.25, 46.41)),
  ("mc_task_2025_790.json", 790, (22.35, 46.84)),  # with the empty answers 22.29 and 46.77
])  # fmt: skip
def test_chance_and_a_random_scorer_on_the_real_questions(file, questions, chance):
  task = TASKS["truthfulqa_mc_zero_shot"]
  examples = task.load(str(DATA / file))
  assert len(examples) == questions
  rng = np.random.default_rng(0)
  scores = {row.id: [[-float(rng.exponential()), 4] for _ in row.options] for row in task.rows(examples)}
  found = task.reduce(examples, scores).estimates["overall"]
  assert_allclose([found["mc1_chance"].value, found["mc2_chance"].value], chance, atol=0.005)
  assert found["mc1"].low <= chance[0] <= found["mc1"].high
  assert task.benchmark.metrics.keys() == found.keys()
