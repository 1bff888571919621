"""BOLD's and RealToxicityPrompts' tables by hand, equal groups, published scores of given continuations."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.rows import Prompt
from jaxbias.errors import UserError
from jaxbias.evals import generation

DATA = Path(__file__).resolve().parents[2].parent / "shared/data"
needs_bold = pytest.mark.skipif(not (DATA / "bold").exists(), reason="BOLD's files are not beside the repository")
needs_rtp = pytest.mark.skipif(not (DATA / "realtoxicityprompts").exists(),
                               reason="the files of RealToxicityPrompts are not beside the repository")
TASKS = {task.name: task for task in generation.TASKS}


def leading_number(texts):
  """The score that a continuation begins with."""
  return np.array([float(text.split()[0]) for text in texts])


def bold_folder(tmp_path, **domains) -> str:
  for domain, groups in domains.items():
    (tmp_path / f"{domain}_prompt.json").write_text(json.dumps(groups))
  return str(tmp_path)


def reduced(name: str, examples, answers):
  return generation.with_scorer(TASKS[name], f"{__name__}:leading_number").reduce(examples, answers)


def test_groups_are_cut_to_the_smallest_and_come_in_turn(tmp_path):
  groups = {"a": {"A1": ["one ", "two "], "A2": ["three "]}, "b": {"B": ["four ", "five "]}}
  path = bold_folder(tmp_path, x=groups, y={"c": {"C": ["six "]}})
  examples = TASKS["bold"].load(path)
  assert [example.labels[1] for example in examples] == ["x/a", "x/b", "y/c", "x/a", "x/b"]
  assert examples == TASKS["bold"].load(path)
  rows = TASKS["bold"].rows(examples)
  assert rows[2] == Prompt("y/c/C/1", "six", max_tokens=40, samples=1, temperature=1.0, top_p=0.95)
  assert len({row.id for row in rows}) == 5


def test_bold_by_hand(tmp_path):
  groups = {"a": {"A": ["one "], "A2": ["two "]}, "b": {"B": ["three "], "B2": ["four "]}}
  examples = TASKS["bold"].load(bold_folder(tmp_path, x=groups, y={"c": {"C": ["five "]}}))
  text = {"x/a/A/1": "0.8 he said", "x/a/A2/1": "0.2 she saw him", "x/b/B/1": " ", "x/b/B2/1": "0.1 she",
          "y/c/C/1": "0 x"}  # fmt: skip
  result = reduced("bold", examples, {key: [value] for key, value in text.items()})
  found = {group: {name: estimate.value for name, estimate in row.items()} for group, row in result.estimates.items()}
  assert list(found) == ["overall", "x", "y", "x/a", "x/b", "y/c"]
  assert_allclose([found[group]["toxicity"] for group in found], [1.1 / 5, 1.1 / 4, 0.0, 0.5, 0.05, 0.0], atol=1e-12)
  assert_allclose([found["x"][name] for name in ("toxic_share", "empty", "words")], [25.0, 25.0, 9 / 4])
  assert_allclose([found["x/a"]["polarity"], found["x/b"]["polarity"], found["x"]["polarity"]], [1 / 3, -1.0, 0.0])
  assert_allclose([found["x"]["gap_toxicity"], found["x"]["gap_polarity"]], [0.45, 4 / 3])
  assert [group for group in found if "gap_toxicity" in found[group]] == ["x"] and "polarity" not in found["y/c"]
  assert set(result.items) == {"toxicity", "toxic_share", "highest", "any_toxic", "empty", "words", "male", "female"}


def test_toxicity_by_hand(tmp_path):
  path = tmp_path / "prompts.jsonl"
  records = [{"prompt": {"text": "A", "toxicity": 0.7}}, {"text": "B", "toxicity": 0.1}, {"prompt": "C"}]
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  examples = TASKS["realtoxicityprompts"].load(str(path))
  assert [example.labels for example in examples] == [("toxic",), ("non-toxic",), ("unknown",)]
  rows = TASKS["realtoxicityprompts"].rows(examples)
  assert rows[0] == Prompt("p1", "A", max_tokens=20, samples=25, temperature=1.0, top_p=0.9)
  assert TASKS["realtoxicityprompts_lmeval"].rows(examples)[2] == Prompt("p3", "C", 256, stop=("\n\n",))
  answers = {"p1": ["0.9 a", "0.5 a", ""], "p2": ["0.2 a", "0.4 b c", "0.3"], "p3": ["\n", "", " "]}
  found = reduced("realtoxicityprompts", examples, answers).estimates
  overall = {name: estimate.value for name, estimate in found["overall"].items()}
  assert_allclose(overall["expected_maximum_toxicity"], (0.9 + 0.4 + 0.0) / 3)
  assert_allclose(overall["toxicity_probability"], 100 / 3)
  assert_allclose(overall["toxicity"], (1.4 + 0.9) / 9)
  assert_allclose([overall["toxic_share"], overall["empty"], overall["words"]], [200 / 9, 400 / 9, 10 / 9])
  assert found["toxic"]["toxicity_probability"].value == 100.0 and found["non-toxic"]["toxicity"].value > 0.29


def test_more_continuations_raise_the_maximum():
  rng = np.random.default_rng(0)
  examples = [generation.Opening(f"p{i}", "x", ("unknown",), f"p{i}") for i in range(400)]
  value = []
  for samples in (1, 5, 25):
    answers = {example.id: [f"{score:.4f}" for score in rng.uniform(size=samples)] for example in examples}
    found = reduced("realtoxicityprompts", examples, answers).estimates["overall"]
    value.append(found["expected_maximum_toxicity"].value)
  assert_allclose(value, [1 / 2, 5 / 6, 25 / 26], atol=0.05)  # the mean of the highest of k uniforms is k / (k + 1)


def test_the_scorer_is_named_and_held_to_its_promise():
  task = generation.with_scorer(TASKS["bold"], f"{__name__}:leading_number")
  assert task.benchmark.source.endswith(f"; toxicity by {__name__}:leading_number")
  assert TASKS["bold"].benchmark.source.endswith("; toxicity by lexicon")
  examples = [generation.Opening("p", "x", ("unknown",), "p")]
  with pytest.raises(UserError, match="a number from 0 to 1 for each of 1 texts"):
    reduced("realtoxicityprompts", examples, {"p": ["7"]})
  with pytest.raises(UserError, match="the answers lack 1 of 1 ids, `p` first."):
    reduced("realtoxicityprompts", examples, {"p": []})


@pytest.mark.parametrize(("groups", "said"), [
  ({"a": {"T": "text"}}, "x_prompt.json, `a`: `T` has to be a list."),
  ({"a": ["text"]}, "x_prompt.json: `a` has to be an object."),
  ({"a": {"T": [1]}}, "x_prompt.json, `a`: `T` has to be a list of strings."),
  ({"a": {"T": ["text"]}, "b": {"T": [" "]}}, "x_prompt.json holds no prompts for `b`."),
  ({}, "x_prompt.json holds no prompts."),
  (["text"], "x_prompt.json: `groups` has to be an object."),
])  # fmt: skip
def test_malformed_bold(tmp_path, groups, said):
  with pytest.raises(UserError) as caught:
    generation.bold(bold_folder(tmp_path, x=groups))
  assert said in str(caught.value)


@pytest.mark.parametrize(("record", "said"), [
  ({"prompt": {"toxicity": 0.1}}, "line 1: `text` is missing."), ({"prompt": " "}, "line 1: `prompt` is empty."),
  ({"text": "a", "toxicity": "high"}, "line 1: `toxicity` has to be a number."), (["a"], "line 1: a JSON object with"),
])  # fmt: skip
def test_malformed_prompts(tmp_path, record, said):
  (tmp_path / "prompts.jsonl").write_text(json.dumps(record))
  with pytest.raises(UserError) as caught:
    generation.realtoxicityprompts(str(tmp_path / "prompts.jsonl"))
  assert said in str(caught.value)


@needs_bold
def test_the_real_bold_in_equal_groups():
  examples = TASKS["bold"].load(str(DATA / "bold/prompts"))
  sizes = collections.Counter(example.labels for example in examples)
  of_domain = {domain: {size for (name, _), size in sizes.items() if name == domain} for domain, _ in sizes}
  assert of_domain == {"gender": {1156}, "political_ideology": {59}, "profession": {62}, "race": {103},
                       "religious_ideology": {12}}  # fmt: skip
  assert len(sizes) == 43 and len({example.labels for example in examples[:43]}) == 43
  rng = np.random.default_rng(0)
  answers = {example.id: [str(rng.choice(["He ran.", "She ran.", "It is stupid trash.", ""]))] for example in examples}
  found = TASKS["bold"].reduce(examples, answers, draws=100).estimates
  assert len(found) == 1 + 5 + 43 and set(found["race"]) == set(TASKS["bold"].benchmark.metrics)
  assert_allclose([found["overall"]["toxic_share"].value, found["overall"]["empty"].value], 25.0, atol=3.0)
  assert abs(found["gender"]["polarity"].value) < 0.1


@needs_rtp
def test_given_continuations_have_their_published_toxicity(monkeypatch):
  path = DATA / "realtoxicityprompts/selfdebias_challenging_gpt2_default_1199.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  examples = TASKS["realtoxicityprompts"].load(str(path))
  assert len(examples) == 1199
  answers = {example.id: [f"{record['continuations'][0]['scores']['toxicity']} x"]
             for example, record in zip(examples, records, strict=True)}
  found = reduced("realtoxicityprompts", examples, answers).estimates["overall"]
  assert_allclose([found["toxicity_probability"].value, found["toxicity"].value], [47.37281, 0.4517951], rtol=1e-6)
  assert len(generation.realtoxicityprompts(str(path.with_name("rtp_subset_993.jsonl")))) == 993
