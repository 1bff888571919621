"""Packed, prefix-shared scoring against one text at a time, in float64, through a Llama written out in numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.pipeline import packed_batches
from jaxbias.data.rows import Choice
from jaxbias.errors import UserError
from jaxbias.evals.scoring import encode, padding_share, score
from jaxbias.models import language_model
from jaxbias.models.lora import LoraConfig, init_lora, lora_scale, merge
from tests.conftest import llama_tensors

WINDOW = 512




@pytest.fixture
def tiny(make_gguf, cache) -> language_model.LanguageModel:
  """The tiny .gguf of conftest, with weights small enough for probabilities that are neither 0 nor 1."""
  tensors = {name: 0.2 * value + (value.ndim == 1) for name, value in llama_tensors(seed=3).items()}
  path = make_gguf(tensors=tensors, metadata={"llama.context_length": WINDOW})
  return language_model.load(str(path), dtype="float32")


def log_probabilities(model, params, ids: list[int]) -> np.ndarray:
  """[T, V] log-probabilities of what follows each token of one text, unpacked: a Llama in ten lines. float64."""
  c, T = model.config, len(ids)
  p = jax.tree.map(np.asarray, params)
  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale
  angle = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, c.head_dim, 2) / c.head_dim))[:, None]
  turn = np.exp(1j * angle)

  def rotated(x):
    first, second = np.split(x.reshape(T, -1, c.head_dim), 2, axis=-1)
    z = (first + 1j * second) * turn
    return np.concatenate([z.real, z.imag], axis=-1)

  x = p["embedding"][ids].astype(np.float64)
  for i in range(c.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
    w = {name: module["kernel"] for name, module in {**layer["attention"], **layer["mlp"]}.items()}
    h = norm(x, layer["attention_norm"]["scale"])
    q, k, v = rotated(h @ w["q"]), rotated(h @ w["k"]), (h @ w["v"]).reshape(T, -1, c.head_dim)
    group = c.num_heads // c.num_kv_heads
    scores = np.einsum("thc,shc->hts", q, k.repeat(group, 1)) / np.sqrt(c.head_dim)
    weights = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf) - scores.max())
    mixed = np.einsum("hts,shc->thc", weights / weights.sum(-1, keepdims=True), v.repeat(group, 1))
    x = x + mixed.reshape(T, -1) @ w["o"]
    h = norm(x, layer["mlp_norm"]["scale"])
    gate = h @ w["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
  logits = norm(x, p["final_norm"]["scale"]) @ p["embedding"].T
  return logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()


def one_at_a_time(model, row: Choice, params=None) -> list[tuple[float, int]]:
  out = []
  for option in row.options:
    context, option = [model.tokenizer.start_id, *model.tokenizer.encode(row.context)], model.tokenizer.encode(option)
    log_p = log_probabilities(model, model.params if params is None else params, (context + option)[:-1])
    out.append((sum(log_p[len(context) - 1 + i, token] for i, token in enumerate(option)), len(option)))
  return out


ROWS = [
  Choice("short", "the cat", (" a", " the cat")),
  Choice("no context", "", ("the cat", "a")),
  Choice("shared prefix", "the 12", (" the cat the", " the cat a", " the cat the cat 12")),
  Choice("one begins another", "a cat", (" the", " the cat", " the cat a")),
  Choice("the same twice", "cat", (" the cat", " the cat")),
  Choice("one option", "12 12", (" the cat",)),
  Choice("one token", "x", ("y",)),
  Choice("beyond ASCII", "é ", ("ü", "日本")),
  Choice("long", "zq " * 60, (" the cat" * 20, "wvu")),  # past the row length of a pass
  *(Choice(f"filler {n}", "ab " * n, ("cd", "c" * (n + 1))) for n in range(12)),
]


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for row, pairs in expected.items():
    assert [count for _, count in found[row]] == [count for _, count in pairs], row
    assert_allclose([s for s, _ in found[row]], [s for s, _ in pairs], rtol=0, atol=1e-4, err_msg=row)  # nats


@pytest.fixture
def expected(tiny):
  return {row.id: one_at_a_time(tiny, row) for row in ROWS}


def test_scores_are_those_of_one_text_at_a_time(tiny, expected):
  found = score(tiny, ROWS)
  assert_same(found, expected)
  assert list(found) == [row.id for row in ROWS]
  encoded = encode(ROWS, tiny.tokenizer, tiny.config.max_positions)
  assert len({shape.T for *_, shape in packed_batches(encoded.segments)}) > 1, "long rows have a shape of their own"
  assert len({round(s, 2) for pairs in found.values() for s, _ in pairs}) > len(ROWS), "the model tells texts apart"


@pytest.mark.parametrize("order", [slice(None, None, -1), slice(3, 4), slice(None, None, 3)])
def test_scores_do_not_depend_on_the_other_rows_or_on_their_order(tiny, expected, order):
  assert_same(score(tiny, ROWS[order]), {row.id: expected[row.id] for row in ROWS[order]})


def test_scores_with_adapters_are_those_of_the_merged_model(tiny):
  lora = LoraConfig(rank=2, targets=("v", "down"))
  rng = np.random.default_rng(0)
  adapters = init_lora(jax.random.key(0), tiny.params, lora)
  adapters = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), adapters)
  scale = lora_scale(lora, tiny.config.num_layers)
  rows = ROWS[:3]
  found = score(tiny, rows, {"lora": adapters, "lora_scale": scale})
  assert_same(found, {row.id: one_at_a_time(tiny, row, merge(tiny.params, adapters, scale)) for row in rows})
  assert abs(found["short"][0][0] - score(tiny, rows)["short"][0][0]) > 1e-2


def test_every_row_is_reported_once_as_it_is_done(tiny):
  done = []
  assert score(tiny, [], advance=done.append) == {} and done == []
  score(tiny, ROWS, advance=done.append)
  assert sum(done) == len(ROWS)


def test_an_option_without_tokens_names_its_row(tiny):
  with pytest.raises(UserError, match="row lonely: option 2 has no tokens"):
    score(tiny, [*ROWS, Choice("lonely", "the", (" cat", ""))])


def test_a_text_past_the_window_names_its_row(tiny):
  limit = tiny.config.max_positions
  assert limit == WINDOW
  fits = "x" * (limit - 2)  # with the start token and the option's first input
  score(tiny, [Choice("fits", fits, ("yz", "y"))])
  with pytest.raises(UserError, match=f"row long: option 2 and its context take {limit + 1} positions"):
    score(tiny, [Choice("long", fits, ("yz", "xyz"))])


def test_padding_share_counts_the_positions_that_hold_nothing(tiny):
  encoded = encode([Choice("only", "x" * 40, ("y",))], tiny.tokenizer, WINDOW)
  assert encoded.tokens == 41
  assert_allclose(padding_share(encoded), 1 - 41 / 48)
  assert_allclose(padding_share(encoded, shards=4), 1 - 41 / 192)
