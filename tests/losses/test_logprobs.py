"""The only place that touches the vocabulary: right in value and gradient, and never all of it at once."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.losses import logprobs
from jaxbias.losses.logprobs import (
  adjusted_kl,
  cross_entropy,
  forward_kl,
  gather_positions,
  reverse_kl,
  token_logprobs,
  token_statistics,
)  # fmt: skip
from jaxbias.losses.registry import parse
from jaxbias.models.lora import LoraConfig, init_lora
from jaxbias.models.transformer import Head, Transformer, abstract_variables
from jaxbias.train.step import make_train_step
from jaxbias.types import Batch, TrainState
from tests.models import tiny_config

V, D, B, P = 37, 8, 3, 8




def arrays(seed: int = 0, size: float = 1.0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  normal = lambda *shape: (size * rng.standard_normal(shape)).astype(np.float32)
  return {
    "hidden": normal(B, P, D), "head": normal(V, D), "target": rng.integers(0, V, (B, P)),
    "ref_hidden": normal(B, P, D), "ref_head": normal(V, D), "g": rng.standard_normal((B, P)).astype(np.float32),
    "less": np.float32(3.0),
  }  # fmt: skip


def log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def pulled_back(slope_BPV: np.ndarray, x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Derivatives with respect to hidden and head of sum(g * f), where slope is df / dlogits. float64."""
  weighted = x["g"][..., None] * slope_BPV
  return weighted @ x["head"], np.einsum("bpv,bpd->vd", weighted, x["hidden"])


TO_REFERENCE = ("ref_hidden", "ref_head")
READS = {
  token_logprobs: ("target",), forward_kl: TO_REFERENCE, reverse_kl: TO_REFERENCE, cross_entropy: TO_REFERENCE,
  adjusted_kl: (*TO_REFERENCE, "target", "less"),
}  # fmt: skip


def ours(function, x: dict[str, np.ndarray]):
  """Value, and the derivatives of sum(g * value) with respect to hidden and head."""
  return value_and_pullback(function, logprobs.CHUNK, x["hidden"], x["head"], x["g"], *(x[n] for n in READS[function]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_pullback(function, chunk, hidden, head, g, *rest):
  assert chunk == logprobs.CHUNK  # an argument so that another chunk is another program
  rest = [Head(x) if name == "ref_head" else x for name, x in zip(READS[function], rest, strict=True)]
  value, pull = jax.vjp(lambda h, w: function(h, Head(w), *rest), hidden, head)
  return value, *pull(g)


CHUNKS = pytest.mark.parametrize("chunk", [512, 12, 5, 1])  # 1, 2, 8 pieces, and one position at a time


@CHUNKS
def test_token_logprobs_and_both_gradients_are_those_of_log_softmax(monkeypatch, chunk):
  monkeypatch.setattr(logprobs, "CHUNK", chunk)
  x = arrays()
  exact = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in x.items()}
  log_p = log_softmax(exact["hidden"] @ exact["head"].T)
  one_hot = np.eye(V)[x["target"]]
  value, to_hidden, to_head = ours(token_logprobs, x)
  assert value.dtype == jnp.float32
  assert_allclose(value, (log_p * one_hot).sum(-1), rtol=1e-5, atol=1e-5)
  for found, expected in zip((to_hidden, to_head), pulled_back(one_hot - np.exp(log_p), exact), strict=True):
    assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@CHUNKS
def test_forward_kl_and_both_gradients_are_those_of_log_softmax(monkeypatch, chunk):
  monkeypatch.setattr(logprobs, "CHUNK", chunk)
  x = arrays(seed=1)
  exact = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in x.items()}
  log_q = log_softmax(exact["hidden"] @ exact["head"].T)
  log_p = log_softmax(exact["ref_hidden"] @ exact["ref_head"].T)
  value, to_hidden, to_head = ours(forward_kl, x)
  assert value.dtype == jnp.float32
  assert_allclose(value, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-5)
  for found, expected in zip((to_hidden, to_head), pulled_back(np.exp(log_q) - np.exp(log_p), exact), strict=True):
    assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("bias,softcap", [(True, None), (False, 2.0), (True, 2.0)])
@pytest.mark.parametrize("function", READS)
def test_a_head_with_a_bias_or_a_cap_differentiates_as_written_out(function, bias, softcap):
  """Against JAX's own derivative of the same values with all logits at once."""
  x = arrays(seed=3)
  rng = np.random.default_rng(4)
  head = Head(jnp.asarray(x["head"]), jnp.asarray(rng.standard_normal(V), jnp.float32) if bias else None, softcap)
  ref = Head(jnp.asarray(x["ref_head"]), None, softcap)

  def all_logits(hidden, head):
    products = hidden @ head.matrix.T + (0.0 if head.bias is None else head.bias)
    return products if softcap is None else softcap * jnp.tanh(products / softcap)

  def written_out(hidden, head):
    log_q = jax.nn.log_softmax(all_logits(hidden, head))
    if function is token_logprobs:
      return jnp.take_along_axis(log_q, x["target"][..., None], -1)[..., 0]
    ref_logits = all_logits(x["ref_hidden"], ref)
    if function is adjusted_kl:
      ref_logits -= x["less"] * jax.nn.one_hot(x["target"], V)
    log_p = jax.nn.log_softmax(ref_logits)
    if function is reverse_kl:
      return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
    return (jnp.exp(log_p) * ((0.0 if function is cross_entropy else log_p) - log_q)).sum(-1)

  rest = [ref if name == "ref_head" else x[name] for name in READS[function]]
  total = lambda f: jax.jit(jax.value_and_grad(lambda h, w: (x["g"] * f(h, w)).sum(), argnums=(0, 1)))
  ours, theirs = (total(f)(x["hidden"], head) for f in (lambda h, w: function(h, w, *rest), written_out))
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)


@pytest.mark.parametrize("chunk", [1, 6, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_statistics_of_a_token_are_those_of_log_softmax(monkeypatch, chunk, softcap):
  monkeypatch.setattr(logprobs, "CHUNK", chunk)
  x = arrays()
  scores = (x["hidden"] @ x["head"].T).astype(np.float64)
  scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
  x["target"][0] = scores[0].argmax(-1)
  log_p = log_softmax(scores)
  p, mean = np.exp(log_p), (np.exp(log_p) * log_p).sum(-1)
  logprob, greedy, found_mean, std = token_statistics(x["hidden"], Head(x["head"], softcap=softcap), x["target"])
  assert_allclose(logprob, np.take_along_axis(log_p, x["target"][..., None], -1)[..., 0], atol=1e-5)
  assert_array_equal(greedy, log_p.argmax(-1) == x["target"])
  assert greedy[0].all() and not greedy.all()
  assert_allclose(found_mean, mean, atol=1e-5)
  assert_allclose(std, np.sqrt((p * log_p**2).sum(-1) - mean**2), atol=1e-5)


def test_statistics_of_a_certain_and_of_a_uniform_distribution():
  hidden, head = np.full((1, 2, 1), [[1e4], [0.0]], np.float32), np.array([[1.0], [-1.0], [-1.0]], np.float32)
  logprob, greedy, mean, std = token_statistics(hidden, Head(head), np.zeros((1, 2), np.int32))
  assert_allclose(logprob, [[0.0, -np.log(3)]], atol=1e-6)
  assert_allclose(mean, [[0.0, -np.log(3)]], atol=1e-6)
  assert_allclose(std, 0.0, atol=1e-6)
  assert greedy.all(), "of equals the first"


def test_no_gradient_flows_to_the_reference():
  x = arrays(seed=2)
  total = lambda r, w: forward_kl(x["hidden"], Head(x["head"]), r, Head(w)).sum()
  to_reference = jax.jit(jax.grad(total, argnums=(0, 1)))
  for leaf in to_reference(x["ref_hidden"], x["ref_head"]):
    assert not leaf.any()


def test_a_position_whose_loss_is_masked_moves_nothing():
  """Padding positions point anywhere; with a zero cotangent they reach neither the hidden state nor the head."""
  x = arrays(seed=3)
  masked = np.zeros((B, P), bool)
  masked[:, 5:] = True
  x["g"][masked] = 0.0
  noise = arrays(seed=4)
  noisy = x | {name: np.where(masked if x[name].ndim == 2 else masked[..., None], noise[name], x[name])
               for name in ("hidden", "ref_hidden", "target")}  # fmt: skip
  for function in READS:
    (_, hidden, head), (_, noisy_hidden, noisy_head) = ours(function, x), ours(function, noisy)
    assert not hidden[masked].any() and hidden[~masked].all()
    assert_array_equal(hidden, noisy_hidden)
    assert_allclose(head, noisy_head, atol=1e-6)


def test_far_apart_logits_stay_finite():
  x = arrays(seed=5, size=100.0)
  for function in READS:
    for leaf in ours(function, x):
      assert np.isfinite(leaf).all()


def test_bfloat16_inputs_give_float32_log_probabilities_and_gradients_of_their_own_type():
  x = arrays(seed=6)
  low = x | {name: x[name].astype(jnp.bfloat16) for name in ("hidden", "head", "ref_hidden", "ref_head")}
  rounded = {name: leaf.astype(x[name].dtype) for name, leaf in low.items()}
  for function in READS:
    (value, *grads), (exact, *exact_grads) = ours(function, low), ours(function, rounded)
    assert value.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    assert_allclose(value, exact, atol=1e-4)
    for found, expected in zip(grads, exact_grads, strict=True):
      assert np.abs(found.astype(jnp.float32) - expected).max() < 0.02 * np.abs(expected).max()


def test_a_hidden_state_read_twice_gets_both_gradients():
  x = jnp.asarray(arrays()["hidden"])
  at = jnp.array([[2, 2, 0], [7, 1, 1], [0, 0, 0]])
  picked = gather_positions(x, at)
  for b, p in np.ndindex(at.shape):
    assert_array_equal(picked[b, p], x[b, at[b, p]])
  counts = jax.grad(lambda x: gather_positions(x, at).sum())(x)[..., 0]
  assert_array_equal(counts, [[np.sum(at[b] == t) for t in range(P)] for b in range(B)])


# The compiled step. Sizes are such that V is told apart from every other size, and one chunk is a part of [B, P].

SIZES = {"V": 4096, "D": 16, "B": 4, "T": 64, "P": 48, "K": 40, "S": 3, "chunk": 64}


def compiled_step(losses: dict) -> str:
  V, D, B, T, P, K, S, _ = SIZES.values()
  module = Transformer(tiny_config(vocab_size=V, hidden_size=D, num_layers=2, max_positions=T))
  of = lambda dtype: lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  ints, floats = of(jnp.int32), of(jnp.float32)
  params = nn.unbox(abstract_variables(module))
  lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), params, LoraConfig(rank=2, targets=("q", "down"))))
  objective, coefficients = parse(losses)
  tx = optax.scale_by_adam()
  batch = Batch(
    tokens=ints(B, T), segment=ints(B, T), position=ints(B, T),
    score_at=ints(B, P), target=ints(B, P), score_segment=ints(B, P),
    role=ints(B, S), row=ints(B, S), pair=ints(B, S), ref_logprob=floats(B, P),
    kl_at=ints(B, K), kl_segment=ints(B, K), kl_target=ints(B, K), ref_hidden=floats(B, K, D),
  )  # fmt: skip
  lowered = make_train_step(module, objective, tx).lower(
    TrainState(ints(), lora, jax.eval_shape(tx.init, lora)), {"params": params, "lora_scale": {"scale": floats(2)}},
    batch, jax.tree.map(lambda _: floats(), {"learning_rate": 1.0, "losses": coefficients}),
  )  # fmt: skip
  return lowered.compile().as_text()


def float_arrays_over_vocabulary(program: str, V: int) -> dict[str, int]:
  """{type of every float array with an axis of V: how many numbers it holds for each word}."""
  found = {}
  for kind, sizes in re.findall(r"\b((?:bf|f)\d+)\[([\d,]+)\]", program):
    shape = [int(n) for n in sizes.split(",")]
    if V in shape or math.prod(shape) % V == 0 and math.prod(shape) > V * SIZES["D"]:  # a reshape may hide the axis
      found[f"{kind}[{sizes}]"] = math.prod(shape) // V
  return found


def products_with_vocabulary(program: str, V: int) -> int:
  """Matrix products with an axis of V in their result or in an operand."""
  shapes = dict(re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", program))
  products = re.findall(r"(%[\w.-]+) = \S+ dot\((%[\w.-]+), (%[\w.-]+)\)", program)
  assert products, "the compiled program's text has changed its form; this test reads it"
  return sum(any(str(V) in shapes[name].split(",") for name in names) for names in products)


@pytest.mark.parametrize("losses,products", [
  ({"npo": {}, "sft": {}, "dpo": {}}, 2),  # logits, and back to the hidden state from the same logits
  ({"npo": {}, "sft": {}, "kl": {}}, 5),  # and for the divergence: policy, reference, back
  ({"sft": {}, "kl": {"divergence": "reverse"}}, 5),
  ({"sft": {}, "kl": {"divergence": "cross_entropy"}, "undial": {}}, 8),
  ({"kto": {}, "simnpo": {}, "orpo": {}, "rmu": {}, "rmu_retain": {}}, 2),
])  # fmt: skip
def test_no_array_of_the_step_holds_all_positions_times_the_vocabulary(monkeypatch, losses, products):
  monkeypatch.setattr(logprobs, "CHUNK", SIZES["chunk"])
  program = compiled_step(losses)
  found = float_arrays_over_vocabulary(program, SIZES["V"])
  assert f"f32[{SIZES['V']},{SIZES['D']}]" in found, "the head itself must be seen, or this test is blind"
  assert max(found.values()) <= SIZES["chunk"] < SIZES["B"] * SIZES["K"], found
  assert products_with_vocabulary(program, SIZES["V"]) == products


def test_the_plain_way_would_be_caught():
  """The two readers above, on a loss that makes all logits at once."""
  V, D, B, T = (SIZES[name] for name in "VDBT")

  def loss(hidden, head, target):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), target[..., None], -1).sum()

  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"))]
  program = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
  assert max(float_arrays_over_vocabulary(program, V).values()) == B * T
  assert products_with_vocabulary(program, V) == 2
