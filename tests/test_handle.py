"""`jaxbias.load`: its methods against the oracles, and the example in docs/models.md as a reader would run it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tokenizers import Tokenizer, models, pre_tokenizers

import jaxbias
from jaxbias.errors import UserError

ROOT = Path(__file__).parents[1]
FOLDERS = ROOT / "tests" / "oracles" / "models"


@pytest.fixture
def folder(request, tmp_path, cache) -> Path:
  """An oracle's model with a tokenizer of 199 words."""
  folder = Path(shutil.copytree(FOLDERS / request.param, tmp_path / request.param))
  backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(199)}, unk_token="w3"))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}))
  return folder


@pytest.mark.parametrize("folder", ["qwen3", "bert"], indirect=True)
def test_logits_and_hidden_states_are_hugging_faces(folder):
  model = jaxbias.load(str(folder), dtype="float32")
  with np.load(folder / "io.npz") as stored:
    io = dict(stored)
  real = io["mask"].astype(bool)
  assert_allclose(model.logits(io["input_ids"], io["mask"])[real], io["logits"][real], rtol=1e-4, atol=2e-5)
  states = model.hidden_states(io["input_ids"], io["mask"])
  assert len(states) == model.config.num_layers + 1
  for i, state in enumerate(states):
    assert_allclose(state[real], io[f"hidden_{i}"][real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_padding_on_either_side_changes_nothing(folder):
  model = jaxbias.load(str(folder), dtype="float32")
  tokens, mask = model.encode(["w5 w6 w7", "w9"])
  assert tokens.tolist() == [[1, 5, 6, 7], [1, 9, 0, 0]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
  right, left = model.logits(tokens, mask)[1, :2], model.logits([[0, 0, 1, 9]], [[0, 0, 1, 1]])[0, 2:]
  assert_allclose(left, right, atol=1e-5)
  assert_allclose(model.logits([[1, 9]])[0], right, atol=1e-5)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_scores_and_continuations_follow_from_the_logits(folder):
  model = jaxbias.load(str(folder), dtype="float32")
  logits = np.asarray(model.logits([[1, 5, 6]]), np.float64)[0]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  (found,) = model.score([{"id": 7, "context": "w5", "options": ["w6"]}])["7"]
  assert found[1] == 1
  assert_allclose(found[0], log_p[1, 6], atol=1e-5)
  (text,) = model.generate(["w5 w6"], max_tokens=1)
  assert text.strip() == f"w{log_p[2].argmax()}"


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_bad_shapes_get_one_line(folder):
  model = jaxbias.load(str(folder), dtype="float32")
  with pytest.raises(UserError, match=r"both have to be \[texts, tokens\]"):
    model.logits([1, 2, 3])
  with pytest.raises(UserError, match="129 tokens; gpt2 has 128 positions"):
    model.logits(np.ones((1, 129), int))
  with pytest.raises(UserError, match="sampling.temperature"):
    model.generate(["w5"], temperature=-1)


def test_the_example_in_the_docs_runs(smollm2, capsys):
  page = (ROOT / "docs" / "models.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
  names: dict = {}
  exec(compile(code, "docs/models.md", "exec"), names)
  assert names["logits"].shape == (*names["tokens"].shape, names["model"].config.vocab_size)
  assert len(names["states"]) == 31 and names["she"] > names["he"]
  assert "Paris" in capsys.readouterr().out
