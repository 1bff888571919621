"""The adapter for lm-evaluation-harness: the harness' own task code on local tasks, against its own HF class."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

pytest.importorskip("lm_eval")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxbias.data.rows import Choice, Prompt, Running  # noqa: E402
from jaxbias.errors import UserError  # noqa: E402
from jaxbias.evals.answers import answer  # noqa: E402
from jaxbias.evals.lm_eval import JaxbiasLM  # noqa: E402
from jaxbias.evals.task import CONTINUATIONS, TOKENS  # noqa: E402
from jaxbias.models import language_model  # noqa: E402
from tests.train import tiny_model  # noqa: E402

CHOICES = """
task: tiny_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: tiny_writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["the", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = ("tiny_choices", "tiny_rolling", "tiny_writing")


def documents() -> list[dict]:
  rng = np.random.default_rng(0)
  words = "the cat sat on a hat and 12 rats ran, but she. He? no: an old man's dog!".split()
  text = lambda n: " ".join(rng.choice(words, n))
  found = [{"question": text(6 + i) + " " * (i % 3), "options": [text(2), text(5), text(2)], "answer": i % 3,
            "text": text(30 + 20 * i)} for i in range(8)]  # fmt: skip
  found[0] |= {"question": "the cat sat " * 60, "options": ["on", "on a", "on the hat"]}  # past the window
  return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """A model that transformers reads as well, and three tasks over one local file."""
  folder = tmp_path_factory.mktemp("lm_eval")
  config = tiny_model(folder / "model", positions=128) / "config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
  (folder / "model" / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))  # fmt: skip
  (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents()))
  data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\ntest_split: test\n"
  (folder / "tasks").mkdir()
  for name, content in zip(TASKS, (CHOICES, ROLLING, WRITING), strict=True):
    (folder / "tasks" / f"{name}.yaml").write_text(content + data)
  return folder


@pytest.fixture(scope="module")
def ours(folder) -> JaxbiasLM:
  return JaxbiasLM(str(folder / "model"))


def harness(model, folder: Path) -> dict:
  manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
  return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)


def requests(*arguments) -> list[SimpleNamespace]:
  return [SimpleNamespace(args=one) for one in arguments]


def responses(found: dict, task: str) -> list:
  return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]


def test_the_harness_knows_it_by_name():
  from lm_eval.api.registry import get_model

  assert get_model("jaxbias") is JaxbiasLM


def test_the_harness_runs_its_tasks(ours, folder):
  found = harness(ours, folder)
  assert set(found["results"]) == set(TASKS) and found["config"]["model_sha"] == ours.model.fingerprint
  chosen = [np.argmax([score for score, _ in options]) for options in responses(found, "tiny_choices")]
  right = [chosen[i] == doc["answer"] for i, doc in enumerate(documents())]
  assert found["results"]["tiny_choices"]["acc,none"] == np.mean(right)
  assert all("the" not in text for (text,) in responses(found, "tiny_writing"))


def test_the_harness_own_hugging_face_class_says_the_same(ours, folder):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4)
  found, expected = harness(ours, folder), harness(theirs, folder)
  for one, other in zip(responses(found, "tiny_choices"), responses(expected, "tiny_choices"), strict=True):
    assert_allclose([score for score, _ in one], [score for score, _ in other], atol=1e-3)  # nats
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
  assert_allclose(np.ravel(responses(found, "tiny_rolling")).astype(float),
                  np.ravel(responses(expected, "tiny_rolling")).astype(float), rtol=1e-5)  # fmt: skip
  assert responses(found, "tiny_writing") == responses(expected, "tiny_writing")
  for task in TASKS:
    metrics = {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
    assert metrics
    for name, value in metrics.items():
      assert_allclose(value, expected["results"][task][name], rtol=1e-4, err_msg=name)


def test_scores_are_those_of_our_engine_where_the_conventions_agree(ours):
  """One token a character, nearly, so that text joined and text apart have the same tokens."""
  context, options = "qz", ("x!", "x?", "x!")
  found = ours.loglikelihood(requests(*((context, option) for option in options)))
  context_ids = ours.model.tokenizer.encode(context)
  alone = [(None, context_ids, ours.model.tokenizer.encode(option)) for option in options]
  for one, (_, ids, option) in zip(found, alone, strict=True):
    assert_allclose(one[0], ours._loglikelihood_tokens([(None, ids, option)])[0][0], atol=1e-5)
  said = answer(ours.model, [Choice("r", "", ("qzx!",))], TOKENS).by_id["r"][0]
  score, greedy = ours.loglikelihood(requests(("", "qzx!")))[0]
  assert_allclose(score, said.logprob.sum(), rtol=1e-5)
  assert greedy == said.greedy.all()


def test_rolling_is_our_running_text(ours):
  text = "the cat sat on a hat " * 30
  (total,) = ours.loglikelihood_rolling(requests((text,)))
  assert_allclose(total, answer(ours.model, [Running("r", text)]).by_id["r"][0][0], rtol=1e-5)
  assert ours.loglikelihood_rolling(requests(("",))) == [0.0]


def test_spaces_at_the_end_of_a_context_move(ours):
  one, other = ours.loglikelihood(requests(("a hat  ", "cat"), ("a hat", "  cat")))
  assert one == other


def test_greedy_is_what_generation_writes(ours):
  (text,) = ours.generate_until(requests(("a cat", {"max_gen_toks": 6})))
  ids = ours.tok_encode("a cat")
  (prompt, sampling) = ours._prompt("a cat", {"max_gen_toks": 6})
  assert prompt == ids and sampling.temperature == 0 and sampling.max_tokens == 6
  with_start = answer(ours.model, [Prompt("p", "a cat", 6)], CONTINUATIONS)
  assert isinstance(text, str) and "p" in with_start.by_id
  tokens = ours.model.tokenizer.encode(text)
  if ours.model.tokenizer.decode(tokens) == text and len(tokens) == 6:
    assert ours._loglikelihood_tokens([(None, ids, tokens)])[0][1]


def test_what_is_not_supported(ours):
  with pytest.raises(UserError, match="`num_beams` is not supported"):
    ours.generate_until(requests(("a", {"num_beams": 3})))
  with pytest.raises(UserError, match="128 positions"):
    ours.generate_until(requests(("a", {"max_gen_toks": 128})))
  with pytest.raises(UserError, match="a continuation has 0 tokens"):
    ours._loglikelihood_tokens([(None, [1], [])])
  masked = SimpleNamespace(name="m", config=SimpleNamespace(causal=False))
  with pytest.raises(UserError, match="m is a masked language model"):
    JaxbiasLM(masked)


def test_the_arguments_that_the_harness_passes(folder):
  made = JaxbiasLM.create_from_arg_string(f"pretrained={folder / 'model'},dtype=bfloat16,max_length=64",
                                          {"batch_size": 8, "max_batch_size": None, "device": "cpu"})  # fmt: skip
  assert made.max_length == 64 and made.model.config.dtype == "bfloat16"
  assert isinstance(made.model, language_model.LanguageModel)
