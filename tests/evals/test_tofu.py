"""TOFU's table by hand, with and without the files it can do without; the real files; malformed ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.rows import Choice, Prompt
from jaxbias.errors import UserError
from jaxbias.evals import tofu
from jaxbias.evals.task import TokenScores

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/tofu"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="TOFU's files are not beside the repository")
FULL, LIKELIHOOD, FULL_EOS, LIKELIHOOD_EOS = tofu.TASKS
WITH = {"question": "Who?", "answer": "She did", "paraphrased_answer": "It was she", "perturbed_answer": ["He", "They"]}
WITHOUT = {"question": "Where?", "answer": "Here", "perturbed_answer": ["There", "Yonder"]}
RECORDS = {"forget01_perturbed.json": [WITH] * 2, "retain_perturbed.json": [WITH],
           "real_authors_perturbed.json": [WITHOUT], "world_facts_perturbed.json": [WITHOUT] * 2}  # fmt: skip


def folder(tmp_path, **change) -> Path:
  for name, records in (RECORDS | change).items():
    (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
  return tmp_path


def tokens(*logprob: float, greedy: bool = True) -> TokenScores:
  value_N = np.array(logprob)
  return TokenScores(value_N, np.full(len(value_N), greedy), np.zeros(len(value_N)), np.ones(len(value_N)))


def answers(questions, losses=(1.0, 2.0, 3.0, 5.0), text="she did it") -> dict:
  """The same losses for every question: its answer, its paraphrase where it has one, its wrong answers."""
  found = {}
  for q in questions:
    chosen = losses if len(q.options) == 4 else (losses[0], *losses[2:])
    found[q.id] = [tokens(-value, -value) for value in chosen[:len(q.options)]]
    found[f"{q.id}/greedy"] = [text]
  return found


def test_what_is_asked(tmp_path):
  questions = FULL.load(str(folder(tmp_path)))
  rows = FULL.rows(questions)
  assert [row.id for row in rows[:2]] == ["forget/1", "forget/2"] and len(rows) == 12
  assert rows[0] == Choice("forget/1", "Question: Who?\nAnswer:", (" She did", " It was she", " He", " They"))
  assert rows[3].options == (" Here", " There", " Yonder")
  assert rows[6] == Prompt("forget/1/greedy", "Question: Who?\nAnswer:", 200, stop=("\n",))
  assert LIKELIHOOD.rows(questions) == rows[:6]


def test_the_table_by_hand(tmp_path):
  questions = FULL.load(str(folder(tmp_path)))
  result = FULL.reduce(questions, answers(questions))
  found = {name: estimate.value for name, estimate in result.estimates["overall"].items()}
  ratio = np.exp(-4.0 + 2.0)  # wrong answers 3 and 5 against the paraphrase 2
  kept = np.exp(-4.0 + 1.0)  # against the answer itself
  normalised = np.exp(-1) / (np.exp(-1) + np.exp(-3) + np.exp(-5))
  # ROUGE: "she did it" holds both words of "She did" and none of "Here".
  expected = {
    "forget_truth_ratio": ratio, "forget_probability": np.exp(-1), "retain_truth_ratio": 1 - ratio,
    "retain_probability": np.exp(-1), "real_authors_probability": normalised, "world_facts_truth_ratio": 1 - kept,
    "forget_rouge_l_recall_unstemmed": 1.0, "world_facts_rouge_l_recall_unstemmed": 0.0,
    "model_utility_unstemmed": 0.0, "exact_memorization": 1.0, "extraction_strength": 1.0,
  }  # fmt: skip
  assert_allclose([found[name] for name in expected], list(expected.values()), atol=1e-9)
  assert not [name for name in found if name.startswith(("auc", "privacy", "forget_quality"))]
  assert found.keys() <= FULL.benchmark.metrics.keys()
  found = FULL.reduce(questions, answers(questions, text="here she did")).estimates["overall"]
  nine = [np.exp(-1), 1 - ratio, 1.0] + [normalised, 1 - kept, 1.0] * 2
  assert_allclose(found["model_utility_unstemmed"].value, 9 / np.sum(1 / np.array(nine)), rtol=1e-9)
  assert "model_utility_unstemmed" not in LIKELIHOOD.reduce(questions, {
    name: value for name, value in answers(questions).items() if "greedy" not in name}).estimates["overall"]


def test_a_retain_model_and_a_holdout_add_quality_and_attacks(tmp_path):
  path = folder(tmp_path, **{"holdout01.json": [WITHOUT] * 3})
  questions = LIKELIHOOD.load(str(path))
  held = [q.id for q in questions if q.set == "holdout"]
  assert held == ["holdout/1", "holdout/2", "holdout/3"] and len(LIKELIHOOD.rows(questions)[-1].options) == 1
  retained = answers(questions, losses=(2.5, 2.0, 3.0, 5.0))
  (path / "retain_model.json").write_text(json.dumps(tofu.as_retain_model(questions, retained)))
  questions = LIKELIHOOD.load(str(path))
  given = answers(questions)
  for identity, value in zip(held, (0.5, 1.0, 4.0), strict=True):
    given[identity] = [tokens(-value, -value)]
  given = {row.id: given[row.id] for row in LIKELIHOOD.rows(questions)}
  result = LIKELIHOOD.reduce(questions, given)
  found = {name: estimate.value for name, estimate in result.estimates["overall"].items()}
  assert found["forget_quality"] == 1.0 and found["log10_forget_quality"] == 0.0  # the same ratios as the retain model
  # The forgotten ones lose 1; of the held-out 0.5 is below, 1 ties, 4 is above.
  assert_allclose([found["auc_loss"], found["auc_min_k"], found["auc_reference"]], 0.5)
  assert_allclose(found["privacy_leak"], 0.0, atol=1e-9)  # the retain model's AUC is 0.5 as well: all tie
  assert_allclose(result.items["holdout_reference"], [-2.0, -1.5, 1.5])
  assert set(found) == set(LIKELIHOOD.benchmark.metrics)


def test_the_end_of_text_token_counts_in_losses_alone(tmp_path):
  """By hand: every answer is two tokens and the end of text; the means are of three."""
  path = folder(tmp_path, **{"holdout01.json": [WITHOUT]})
  questions = LIKELIHOOD_EOS.load(str(path))
  asked = LIKELIHOOD_EOS.rows(questions)
  assert all(row.ended for row in asked) and not any(row.ended for row in LIKELIHOOD.rows(questions))
  assert FULL_EOS.rows(questions)[: len(asked)] == asked
  with_end = TokenScores(np.array([-1.0, -2.0, -6.0]), np.array([True, True, False]), np.zeros(3), np.ones(3))
  wrong = tokens(-4.0, -5.0, -9.0)  # 6 with its end, 4.5 without
  given = {q.id: [with_end] * (len(q.options) - len(q.wrong)) + [wrong] * len(q.wrong) for q in questions}
  without = {name: [TokenScores(*(x[:-1] for x in vars(option).values())) for option in options]
             for name, options in given.items()}
  found, plain = (task.reduce(questions, values).items for task, values in
                  ((LIKELIHOOD_EOS, given), (LIKELIHOOD, without)))
  assert_allclose(found["forget_loss"], 3.0)
  assert_allclose(plain["forget_loss"], 1.5)
  assert_allclose(found["forget_probability"], np.exp(-3.0))
  assert_allclose(found["forget_ratio"], np.exp(-6.0 + 3.0), rtol=1e-6)
  assert_allclose(found["forget_zlib"], 2 * plain["forget_zlib"])
  for measure in ("exact_memorization", "extraction_strength", "min_k", "min_k_plus_plus"):
    assert_allclose(found[f"forget_{measure}"], plain[f"forget_{measure}"])
  assert_allclose([found["forget_exact_memorization"][0], found["forget_min_k"][0]], [1.0, 2.0])
  for task in (FULL, FULL_EOS, LIKELIHOOD, LIKELIHOOD_EOS):
    counted = "an" if task.name.endswith("_eos") else "no"
    assert task.benchmark.source.endswith(f"the end-of-text token is {counted} answer token")


def test_a_retain_models_file_belongs_to_one_rule(tmp_path):
  path = folder(tmp_path)
  questions = LIKELIHOOD_EOS.load(str(path))
  given = {q.id: [tokens(-1.0, -2.0, -6.0)] * len(q.options) for q in questions}
  (path / "retain_model.json").write_text(json.dumps(tofu.as_retain_model(questions, given, ended=True)))
  assert LIKELIHOOD_EOS.load(str(path))[0].retained["loss"] == 3.0
  with pytest.raises(UserError, match="retain_model.json was made with the end-of-text token .* answers to `tofu`"):
    LIKELIHOOD.load(str(path))


def test_authors_are_drawn_where_twenty_questions_are_about_each(tmp_path):
  path = folder(tmp_path, **{"retain_perturbed.json": [WITH] * 40})
  clusters = {name: {q.cluster for q in FULL.load(str(path)) if q.set == name} for name in tofu.FILES}
  assert {name: len(found) for name, found in clusters.items()} == {
    "forget": 2, "retain": 2, "real_authors": 1, "world_facts": 2}  # fmt: skip


def test_the_auc_and_its_interval_are_those_of_a_plain_loop():
  rng = np.random.default_rng(0)
  value = {"holdout_loss": rng.normal(0.8, 1, size=30), "forget_loss": rng.normal(size=50)}
  cluster = {"holdout": [f"h{i // 3}" for i in range(30)], "forget": [f"f{i // 5}" for i in range(50)]}
  found = tofu._auc("loss", value, cluster, {"draws": 3000})
  loop, drawn = np.random.default_rng(1), []
  for _ in range(1500):
    held, forgotten = (np.concatenate([value[f"{name}_loss"][np.array(cluster[name]) == c] for c in
                                       loop.choice(np.unique(cluster[name]), size=10)]) for name in cluster)
    drawn.append(np.mean(held[:, None] > forgotten))
  assert_allclose(found.value, np.mean(value["holdout_loss"][:, None] > value["forget_loss"]))
  assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]), atol=0.02)


@pytest.mark.parametrize(("file", "record", "said"), [
  ("forget01_perturbed.json", {"question": "?", "answer": "a", "perturbed_answer": ["b"]},
   "forget01_perturbed.json line 1: `paraphrased_answer` is missing."),
  ("world_facts_perturbed.json", {"question": "?", "answer": "a"},
   "world_facts_perturbed.json line 1: `perturbed_answer` is missing."),
  ("real_authors_perturbed.json", WITHOUT | {"perturbed_answer": "b"},
   "real_authors_perturbed.json line 1: `perturbed_answer` has to be a list."),
  ("retain_perturbed.json", WITH | {"question": ""}, "retain_perturbed.json line 1: `question` is empty."),
])  # fmt: skip
def test_malformed_files(tmp_path, file, record, said):
  with pytest.raises(UserError) as caught:
    FULL.load(str(folder(tmp_path, **{file: [record]})))
  assert said in str(caught.value)


def test_missing_and_too_many_files(tmp_path):
  with pytest.raises(UserError, match=r"holds no file forget\*_perturbed.json, one is needed."):
    FULL.load(str(tmp_path))
  path = folder(tmp_path, **{"forget10_perturbed.json": [WITH] * 3})
  with pytest.raises(UserError, match="holds 2 files .* name one of forget01_perturbed.json, forget10_perturbed.json"):
    FULL.load(str(path))


def test_a_retain_models_file_has_to_fit(tmp_path):
  path = folder(tmp_path)
  (path / "retain_model.json").write_text(json.dumps({"truth_ratio": {"forget/1": 0.5}, "loss": {}}))
  with pytest.raises(UserError, match=r"retain_model.json: `truth_ratio` lacks 1 ids, `forget/2` first."):
    FULL.load(str(path))
  (path / "retain_model.json").write_text(json.dumps({"truth_ratio": {"forget/1": "x"}, "loss": {}}))
  with pytest.raises(UserError, match="`truth_ratio` of `forget/1` has to be a number"):
    FULL.load(str(path))


def test_missing_answers_are_named(tmp_path):
  questions = FULL.load(str(folder(tmp_path)))
  with pytest.raises(UserError, match="the answers lack 6 of 6 ids, `forget/1` first."):
    FULL.reduce(questions, {})


@needs_data
def test_the_real_files():
  questions = FULL.load(str(DATA / "forget01_perturbed.json"))
  assert [sum(q.set == name for q in questions) for name in tofu.FILES] == [400, 400, 100, 117]
  assert len({q.cluster for q in questions if q.set == "forget"}) == 20
  rng = np.random.default_rng(0)
  given = {}
  for row in LIKELIHOOD.rows(questions):
    given[row.id] = [tokens(*-rng.exponential(size=6), greedy=False) for _ in row.options]
  found = LIKELIHOOD.reduce(questions, given).estimates["overall"]
  assert all(estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9 for estimate in found.values())
  assert found["extraction_strength"].value == pytest.approx(1 / 6)
