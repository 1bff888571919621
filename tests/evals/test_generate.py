"""Continuations. What is written with a cache has to be what one uncached pass over the finished text would choose at
every position: by induction the two decodings are then the same, token for token.

  python -m tests.evals.test_generate OUT      # what the test of eight devices runs, with XLA_FLAGS set
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_array_equal

from jaxbias.data.rows import Prompt
from jaxbias.data.tokens import load_tokenizer
from jaxbias.errors import UserError
from jaxbias.evals import generate as module
from jaxbias.evals.generate import answers, generate
from jaxbias.evals.sampling import Sampling, choose
from jaxbias.losses.logprobs import logits
from jaxbias.mesh import make_mesh
from jaxbias.models import language_model
from jaxbias.models.checkpoints import load_params, read_config
from jaxbias.models.families import model_config
from jaxbias.models.language_model import LanguageModel, layout_for
from jaxbias.models.lora import LoraConfig, init_lora, lora_scale
from jaxbias.models.transformer import Transformer, abstract_variables, head
from tests.conftest import llama_tensors
from tests.evals.drawing import rules

ROOT = Path(__file__).parents[2]
FOLDERS = ROOT / "tests" / "oracles" / "models"
DECODERS = ("gpt2", "gpt_neox", "llama", "olmo2", "opt", "phi3", "qwen2", "qwen3")
WINDOWED = ("gemma2", "gemma3", "mistral")  # their own windows would not bind in texts this short
NEW = 24
PROMPTS = [[5], [9, 8, 7, 6, 5], list(range(20, 32)), [3, 150, 44] * 5 + [17, 18]]
MIXED = [
  Sampling(NEW), Sampling(NEW, temperature=1.3, seed=7), Sampling(NEW, temperature=2.0, top_k=20, top_p=0.9),
  Sampling(NEW, temperature=0.7, top_p=0.8, repetition_penalty=1.4),
]  # fmt: skip


class Words:
  """Stands for a tokenizer where text does not matter."""

  def decode(self, ids) -> str:
    return "".join(f" {i}" for i in ids)


def oracle(name: str, mesh=None, dtype: str = "float32", **changes) -> LanguageModel:
  """A tiny model of a family, without an end of text unless `changes` of its ModelConfig name one."""
  mesh = mesh or make_mesh({"data": 1}, jax.devices()[:1])
  config = dataclasses.replace(model_config(read_config(FOLDERS / name)).with_dtype(dtype), **{"eos_ids": ()} | changes)
  transformer = Transformer(config, mesh=mesh)
  boxed = abstract_variables(transformer)
  abstract = nn.unbox(boxed)
  layout = layout_for(config, mesh)
  shardings = layout.shardings(abstract, nn.get_partition_spec(boxed))
  params = load_params(FOLDERS / name, config, abstract, shardings, dtype)
  louder = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)  # or the tiny models repeat one token
  return LanguageModel(name, config, transformer, louder, Words(), "", layout)


def windows(name: str, size: int) -> dict:
  """Every window of the family's layers narrowed to `size`; in a family without any, all layers get one."""
  kinds = model_config(read_config(FOLDERS / name)).kinds
  some = any(kind.window for kind in kinds)
  return {"kinds": tuple(dataclasses.replace(k, window=size if k.window or not some else None) for k in kinds)}


def long_rope(name: str) -> dict:
  rope = model_config(read_config(FOLDERS / name)).ropes[0]
  return {"ropes": (dataclasses.replace(rope, long_inverse=tuple(x / 3 for x in rope.inverse), original_positions=4),)}


@functools.partial(jax.jit, static_argnums=0)
def every_logit(transformer, variables, tokens, segment):
  position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = transformer.apply(variables, tokens, segment, position)
  return logits(hidden, head(variables["params"], transformer.config))


choices = jax.jit(jax.vmap(lambda logits_V, seen_V, rule, step: choose(
  logits_V[None], seen_V[None], jax.tree.map(lambda x: x[None], rule), step)[0]))


def assert_uncached_chooses(model, prompts, found, samplings, adapters=None, ids=None):
  """Every token of `found` is what `choose` takes from uncached logits behind the tokens before it."""
  texts = [[*prompt, *continuation.tokens] for prompt, continuation in zip(prompts, found, strict=True)]
  S, V = max(map(len, texts)), model.config.vocab_size
  tokens, segment = np.zeros((len(texts), S), np.int32), np.zeros((len(texts), S), np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)], segment[row, : len(text)] = text, 1
  every = every_logit(model.module, {"params": model.params, **(adapters or {})}, tokens, segment)
  places = [(row, step) for row, continuation in enumerate(found) for step in range(len(continuation.tokens))]
  row, step = np.array(places).T
  at = np.array([len(prompts[r]) for r in row]) + step
  seen = np.zeros((len(places), V), bool)
  for i, (r, end) in enumerate(zip(row, at, strict=True)):
    seen[i, texts[r][:end]] = True
  numbers = [module._number(ids[r] if ids else str(r)) for r in row]
  chosen = choices(every[row, at - 1], seen, rules([samplings[r] for r in row], numbers), step)
  assert_array_equal(chosen, tokens[row, at])


@pytest.mark.parametrize("name,changes", [
  *((name, {}) for name in DECODERS),
  *((name, windows(name, 6)) for name in WINDOWED),
  ("phi3", long_rope("phi3")),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))  # fmt: skip
def test_cached_decoding_is_uncached_decoding(name, changes):
  model = oracle(name, **changes)
  prompts = [[*range(40, 45), *prompt] for prompt in PROMPTS] if "ropes" in changes else PROMPTS
  found = generate(model, prompts, MIXED)
  assert [len(continuation.tokens) for continuation in found] == [NEW] * len(prompts)
  assert min(len(set(continuation.tokens)) for continuation in found[1:]) > 5, "they repeat themselves: a weak test"
  assert_uncached_chooses(model, prompts, found, MIXED)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
  return oracle("llama")


def tokens_of(found) -> list[tuple[int, ...]]:
  return [continuation.tokens for continuation in found]


def test_a_row_does_not_depend_on_its_batch_or_its_place_there(llama):
  ids = ["a", "b", "c", "d"]
  together = tokens_of(generate(llama, PROMPTS, MIXED, ids=ids))
  alone = [tokens_of(generate(llama, [p], s, ids=[i]))[0] for p, s, i in zip(PROMPTS, MIXED, ids, strict=True)]
  order = [2, 0, 3, 1]
  pick = lambda values: [values[i] for i in order]
  assert together == alone
  assert pick(together) == tokens_of(generate(llama, pick(PROMPTS), pick(MIXED), ids=pick(ids)))


def test_seeds_and_ids_decide_what_is_drawn(llama):
  warm = lambda **changes: Sampling(NEW, temperature=1.5, **changes)
  draw = lambda sampling, **how: tokens_of(generate(llama, [PROMPTS[1]] * 4, sampling, **how))
  first = draw(warm())
  assert len(set(first)) == 4, "the ids differ"
  assert first == draw(warm()) != draw(warm(seed=1))
  assert len(set(draw(warm(), ids=["same"] * 4))) == 1
  assert len(set(draw(Sampling(NEW)))) == 1


def test_settings_are_traced(llama):
  _, decode = module.programs(llama.module, llama.mesh)
  generate(llama, PROMPTS, MIXED)
  compiled = decode._cache_size()
  changed = [dataclasses.replace(s, temperature=0.9, top_k=3, top_p=0.5, max_tokens=NEW - 5, seed=9) for s in MIXED]
  found = generate(llama, [prompt[::-1] for prompt in PROMPTS], changed)
  assert {len(continuation.tokens) for continuation in found} == {NEW - 5}
  assert decode._cache_size() == compiled


def test_adapters_are_heard(llama):
  how = LoraConfig(rank=2)
  rng = np.random.default_rng(0)
  lora = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32),
                      init_lora(jax.random.key(0), llama.params, how))
  adapters = {"lora": lora, "lora_scale": lora_scale(how, llama.config.num_layers)}
  found = generate(llama, PROMPTS, MIXED, adapters)
  assert tokens_of(found) != tokens_of(generate(llama, PROMPTS, MIXED))
  assert_uncached_chooses(llama, PROMPTS, found, MIXED, adapters)


def test_bfloat16_says_what_it_says_again():
  model = oracle("qwen3", dtype="bfloat16")
  found = generate(model, PROMPTS, MIXED)
  assert tokens_of(found) == tokens_of(generate(model, PROMPTS, MIXED))
  assert {len(continuation.tokens) for continuation in found} == {NEW}


def test_an_end_of_text_ends_a_row_and_is_not_part_of_it(llama):
  whole = generate(llama, PROMPTS, MIXED)
  eos = whole[1].tokens[9]
  for before, now in zip(whole, generate(oracle("llama", eos_ids=(198, eos)), PROMPTS, MIXED), strict=True):
    end = before.tokens.index(eos) if eos in before.tokens else NEW
    assert now.tokens == before.tokens[:end] or 198 in before.tokens
    assert now.reason == ("eos" if len(now.tokens) < NEW else "length")


# Text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> LanguageModel:
  """The .gguf of conftest, whose tokenizer is byte-level."""
  from tests.conftest import make_gguf

  path = make_gguf.__wrapped__(tmp_path_factory.mktemp("tiny"))(tensors=llama_tensors(seed=3))
  return language_model.load(str(path), dtype="float32", mesh=make_mesh({"data": 1}, jax.devices()[:1]))


def split_pairs(tokenizer, found):
  """(row, i, text) of tokens i and i + 1, one ASCII character each, where the text stands for the first time."""
  for row, continuation in enumerate(found):
    letters = [tokenizer.decode([token]) for token in continuation.tokens]
    for i in range(18, len(letters) - 1):
      pair = letters[i] + letters[i + 1]
      if len(pair) == 2 and pair.isascii() and pair not in continuation.text[: len("".join(letters[:i])) + 1]:
        yield row, i, pair


def test_a_stop_string_may_lie_across_tokens_and_ends_the_text_before_it(tiny, monkeypatch):
  prompts = [[1, *tiny.tokenizer.encode(text)] for text in ("the cat", "a 12", "x")]
  free = Sampling(40, temperature=1.0)
  whole = generate(tiny, prompts, free)
  row, at, stop = next(split_pairs(tiny.tokenizer, whole))
  for look in (1, 7, 16, 40):
    monkeypatch.setattr(module, "STEPS_BETWEEN_LOOKS", look)
    found = generate(tiny, prompts, dataclasses.replace(free, stop=(stop, "never written")))
    assert found[row].reason == "stop" and found[row].tokens == whole[row].tokens[: at + 2]
    assert found[row].text == whole[row].text[: whole[row].text.index(stop)]
    for other in set(range(3)) - {row}:
      if stop not in whole[other].text:
        assert found[other] == whole[other]


@pytest.mark.parametrize("stop,text,tokens", [
  (("cat",), " the ", 5), ((" cat",), " the", 5), (("c", "cat"), " the ", 3), (("at", " the c"), "", 3),
  (("é",), " the cat", 7), (("dog",), " the caté", 7),
])  # fmt: skip
def test_what_is_complete_first_ends_a_text(tiny, stop, text, tokens):
  ids = [tiny.tokenizer.backend.token_to_id(piece) for piece in ("Ġthe", "Ġ", "c", "a", "t", "Ã", "©")]
  found = module._ending(tiny.tokenizer, module._Row([1], Sampling(stop=stop), 0, 0), ids, ())
  assert (found.text, len(found.tokens)) == (text, tokens)


def test_answers_follow_their_rows(tiny):
  rows = [Prompt("greedy", "the cat", 8), Prompt("drawn", "the", 12, samples=3, temperature=1.0, top_p=0.9)]
  found = answers(tiny, rows)
  assert {key: len(texts) for key, texts in found.items()} == {"greedy": 1, "drawn": 3}
  assert len(set(found["drawn"])) == 3
  assert found == answers(tiny, rows[::-1]) != answers(tiny, rows, seed=1)


def test_smollm2_goes_on_as_its_uncached_argmax(smollm2, optimised):
  model = language_model.load("smollm2-135m-instruct", dtype="float32")
  texts = ("The capital of France is", "Water boils at a temperature of")
  prompts = [[model.tokenizer.start_id, *model.tokenizer.encode(text)] for text in texts]
  found = generate(model, prompts, Sampling(12))
  assert "Paris" in found[0].text
  assert_uncached_chooses(model, prompts, found, [Sampling(12)] * 2)
  assert load_tokenizer(smollm2.path).decode(found[1].tokens) == found[1].text


# What is refused


def test_a_prompt_has_to_fit_or_is_cut_on_its_left(llama):
  long = [i % 190 + 3 for i in range(120)]
  with pytest.raises(UserError, match="prompt q has 120 tokens and is to get 20 more; the model has 128 positions"):
    generate(llama, [long], Sampling(20), ids=["q"])
  cut, = generate(llama, [long], Sampling(20), truncate=True)
  assert cut.dropped == 11
  assert cut.tokens == generate(llama, [long[11:]], Sampling(20))[0].tokens
  with pytest.raises(UserError, match="128 positions"):
    generate(llama, [long], Sampling(300), truncate=True)


def test_what_cannot_be_continued_is_refused():
  with pytest.raises(UserError, match="bert is a masked language model"):
    generate(oracle("bert"), PROMPTS, Sampling())
  model = oracle("phi3", **long_rope("phi3"))
  with pytest.raises(UserError, match="grow past 4 tokens"):
    generate(model, [[1, 2, 3]], Sampling(3))
  with pytest.raises(UserError, match="prompt 1 has no tokens"):
    generate(model, [[1, 2, 3, 4, 5], []], Sampling(3))


@pytest.mark.parametrize("setting", [
  {"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0},
  {"stop": "text"}, {"stop": ("",)}, {"seed": -1},
])  # fmt: skip
def test_settings_out_of_range_are_named(setting):
  with pytest.raises(UserError, match=f"sampling.{next(iter(setting))} is"):
    Sampling(**setting)


# Eight devices


MESHES = {"one": {"data": 1}, "data": {"data": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
# In bfloat16 a sum over the pieces of a row would round otherwise; rows in one piece give the same tokens.
EIGHT = (("llama", "float32", ("data", "all")), ("gemma2", "bfloat16", ("data",)))


def worker(out: Path) -> None:
  found, settings = {}, [dataclasses.replace(sampling, max_tokens=10) for sampling in MIXED]
  for name, dtype, meshes in EIGHT:
    for mesh in ("one", *meshes):
      model = oracle(name, make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "one" else 8]), dtype)
      found[f"{name} {mesh}"] = tokens_of(generate(model, PROMPTS * 2 + PROMPTS[:1], settings * 2 + settings[:1]))
  out.write_text(json.dumps(found))


def test_eight_devices_write_what_one_writes(tmp_path):
  environment = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }  # fmt: skip
  command = [sys.executable, "-m", "tests.evals.test_generate", str(tmp_path / "out.json")]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "out.json").read_text())
  for name, _, meshes in EIGHT:
    assert len(set(map(tuple, found[f"{name} one"]))) > 4
    for mesh in meshes:
      assert found[f"{name} {mesh}"] == found[f"{name} one"], (name, mesh)


if __name__ == "__main__":
  worker(Path(sys.argv[1]))
