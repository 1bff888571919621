"""Losses on pairs of sentences: InfoNCE, SupCon, counterfactual logit pairing, and their gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.losses.context import LossContext
from jaxbias.losses.logprobs import js_divergence
from jaxbias.losses.registry import LOSSES
from jaxbias.losses.sentence_pairs import twin_positions
from jaxbias.models.transformer import Head
from jaxbias.types import Batch
from tests.losses.calls import call
from tests.losses.groups import D, context, same_states, texts


def value(name: str, ctx: LossContext, **settings) -> jax.Array:
  return call(name, ctx, **settings).metric.value()


def paired(chosen: np.ndarray, others: np.ndarray, logprobs=None, shuffle: bool = False) -> LossContext:
  """Texts of one state each; row i of `chosen` has row i of `others` for its twin."""
  n = len(chosen)
  states, roles = np.concatenate([chosen, others]), np.repeat([1, 0], n)
  pair, group = np.r_[n : 2 * n, 0:n], np.tile(np.arange(n), 2)
  if shuffle:
    order = np.random.default_rng(0).permutation(2 * n)
    states, roles, group, pair = states[order], roles[order], group[order], np.argsort(order)[pair[order]]
  S = 2 * n
  row = lambda x: jnp.asarray(x, jnp.int32).reshape(2, n)
  zeros = jnp.zeros((2, n), jnp.int32)
  segment = row(np.tile(np.arange(1, n + 1), 2))
  batch = Batch(tokens=zeros, segment=segment, position=zeros, score_at=row(np.tile(np.arange(n), 2)), target=zeros,
                score_segment=segment, role=row(roles), pair=row(pair), group=row(group),
                polarity=jnp.full((2, n), -1), row=row(np.arange(S)))  # fmt: skip
  logprob = jnp.zeros((2, n)) if logprobs is None else jnp.asarray(logprobs, jnp.float32).reshape(2, n)
  hidden = jnp.asarray(states, jnp.float32).reshape(2, n, -1)
  return LossContext(batch, logprob, hidden_BTD=hidden, head=Head(jnp.eye(hidden.shape[-1])))


def test_infonce_and_supcon_of_sentences_that_are_all_alike():
  alike = paired(np.ones((4, D)), np.ones((4, D)))
  assert_allclose(value("infonce", alike), np.log(4), rtol=1e-5)
  assert_allclose(value("supcon", alike), np.log(2 * 4 - 1), rtol=1e-5)
  ctx = context([same_states(texts((3, 2), (2, 1)))])
  assert_allclose(value("supcon", ctx), np.log(8 - 1), rtol=1e-5)


def test_supcon_is_a_loop_over_anchors():
  every = texts((3, 2), (2, 1), (1, 1))
  ctx = context([every[:4], every[4:]])
  for pool, of in (("mean", lambda h: h.mean(0)), ("last", lambda h: h[-1]), ("first", lambda h: h[0])):
    r = np.array([of(t.hidden) for t in every])
    r /= np.linalg.norm(r, axis=1, keepdims=True)
    s, losses = np.exp(r @ r.T / 0.3), []
    for i, anchor in enumerate(every):
      partners = [j for j, t in enumerate(every) if j != i and t.positive and t.group == anchor.group]
      if anchor.positive and partners:
        losses.append(-np.mean([np.log(s[i, j] / (s[i].sum() - s[i, i])) for j in partners]))
    assert_allclose(value("supcon", ctx, temperature=0.3, pool=pool), np.mean(losses), rtol=1e-4)


def test_a_pair_alone_or_none_costs_nothing():
  one = paired(np.ones((1, D)), -np.ones((1, D)))
  assert_allclose(value("infonce", one), 0.0, atol=1e-6)
  none = dataclasses.replace(one, batch=one.batch.replace(pair=-jnp.ones_like(one.batch.pair)))
  for loss in ("infonce", "clp"):
    of = lambda h, loss=loss: value(loss, dataclasses.replace(none, hidden_BTD=h))
    found, slope = jax.value_and_grad(of)(none.hidden_BTD)
    assert found == 0.0 and not slope.any()


# Counterfactual logit pairing


def test_jensen_shannon_is_zero_at_equality_symmetric_and_at_most_log_two():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(3 * rng.normal(size=(2, 3, D)), jnp.float32) for _ in range(2))
  head = Head(jnp.asarray(rng.normal(size=(7, D)), jnp.float32))
  log = lambda x: jax.nn.log_softmax(x @ head.matrix.T)
  p, q = np.exp(log(a), dtype=np.float64), np.exp(log(b), dtype=np.float64)
  m = (p + q) / 2
  expected = 0.5 * ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1))
  assert_allclose(js_divergence(a, b, head), expected, rtol=1e-4, atol=1e-6)
  assert_allclose(js_divergence(b, a, head), expected, rtol=1e-4, atol=1e-6)
  assert_allclose(js_divergence(a, a, head), 0.0, atol=1e-6)
  far = 1e3 * jnp.eye(D)[None, :2]
  assert_allclose(js_divergence(far[:, :1], far[:, 1:], Head(jnp.eye(D))), np.log(2), rtol=1e-6)


def test_the_gradient_of_jensen_shannon_reaches_both_twins_and_the_head():
  rng = np.random.default_rng(1)
  point = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, D), (2, 3, D), (7, D)))
  of = lambda at: (js_divergence(at[0], at[1], Head(at[2])) * jnp.arange(6.0).reshape(2, 3)).sum()

  def dense(at):
    log_p, log_q = (jax.nn.log_softmax(at[i] @ at[2].T) for i in (0, 1))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    js = 0.5 * (jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)).sum(-1)
    return (js * jnp.arange(6.0).reshape(2, 3)).sum()

  for ours, plain in zip(jax.grad(of)(point), jax.grad(dense)(point), strict=True):
    assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_log_odds_of_twins():
  ctx = paired(np.ones((3, D)), np.ones((3, D)), logprobs=[-1.0, -2.0, -3.0, -2.0, -2.0, -7.0])
  assert_allclose(value("clp", ctx, form="log_odds"), (1 + 0 + 16) / 3, rtol=1e-6)


def test_positions_are_paired_from_the_end_of_the_answer():
  """Twins whose answers are one token apart in length: what follows the exchanged word is compared, word by word."""
  score_segment = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
  batch = Batch(tokens=None, segment=None, position=None, score_at=None, target=jnp.zeros((1, 8), jnp.int32),
                score_segment=score_segment, role=jnp.array([[1, 0]]), pair=jnp.array([[1, 0]]))  # fmt: skip
  both = jnp.ones((1, 2), bool)
  at, there = twin_positions(batch, both)
  assert_array_equal(there, [[1, 1, 1, 0, 1, 1, 1, 0]])
  assert_array_equal(at[0][np.asarray(there[0])], [4, 5, 6, 0, 1, 2])
  assert_array_equal(twin_positions(batch, batch.role == 1)[1], [[1, 1, 1, 0, 0, 0, 0, 0]])


def test_logit_pairing_reads_twins_across_packed_rows():
  rng = np.random.default_rng(2)
  a, b = rng.normal(size=(2, 3, D))
  plain = np.mean(js_divergence(jnp.asarray(a[None], jnp.float32), jnp.asarray(b[None], jnp.float32), Head(jnp.eye(D))))
  for shuffle in (False, True):
    assert_allclose(value("clp", paired(a, b, shuffle=shuffle)), plain, rtol=1e-5)
  same = paired(a, a)
  of = lambda h: value("clp", dataclasses.replace(same, hidden_BTD=h))
  found, slope = jax.value_and_grad(of)(same.hidden_BTD)
  assert_allclose(found, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)


# Gradients of the losses on pairs


@pytest.mark.parametrize("name,settings", [
  ("infonce", {}), ("infonce", {"pool": "last"}), ("supcon", {}), ("clp", {"form": "js"}),
  ("clp", {"form": "log_odds"}), ("group_ce", {}), ("group_ce", {"denominator": "batch_all"}),
])  # fmt: skip
def test_gradients_on_pairs_are_the_finite_differences(name, settings):
  rng = np.random.default_rng(7)
  ctx = paired(*rng.normal(size=(2, 4, D)), logprobs=-rng.exponential(size=8))
  settings = settings | ({"temperature": 0.5} if LOSSES[name].coefficients else {})

  def of(at):
    return value(name, dataclasses.replace(ctx, hidden_BTD=at[0], logprob_BP=at[1], head=Head(at[2])), **settings)

  point = (ctx.hidden_BTD, ctx.logprob_BP, ctx.head.matrix)
  slope = jax.jit(jax.grad(of))(point)
  direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), point)
  step = jax.jit(lambda h: of(jax.tree.map(lambda x, d: x + h * d, point, direction)))
  along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)))
  assert abs(along) > 1e-3
  assert_allclose((step(5e-3) - step(-5e-3)) / 1e-2, along, rtol=5e-3, atol=1e-4)
