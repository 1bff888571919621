"""Every registered loss of likelihoods and preferences: its value at the reference, and its gradient.

A loss that is added to the registry is asked here for its value at the reference, and is then held to the rest.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.losses.logprobs import token_logprobs
from jaxbias.losses.registry import LOSSES
from tests.losses.texts import EVERY_LOSS, NAMES, V, context, text, texts, value, with_hidden

# At the reference


def at_reference(name: str) -> float:
  every = texts(at_reference=True)

  def mean(role, of):
    return np.mean([of(t) for t in every if t.role == role])

  def paired(of):
    """The mean of of(chosen, rejected) over the pairs, each given as log-probabilities of its tokens."""
    twins = [[next(t.logprob for t in every if (t.role, t.pair) == (role, n)) for role in ("retain", "forget")]
             for n in range(3)]  # fmt: skip
    return np.mean([of(*pair) for pair in twins])

  def adjusted(t):
    p = np.take_along_axis(softmax(t.hidden), t.target[:, None], -1)[:, 0]
    rest = 1 - p + p * np.exp(-10)
    return -10 * p * np.exp(-10) / rest - np.log(rest)

  def steered(t):
    u = np.asarray(jax.random.uniform(jax.random.key(0), (V,)))
    return np.mean((2 * t.hidden - 20 * u / np.linalg.norm(u)) ** 2)

  softplus = lambda x: np.logaddexp(0, x)
  less = lambda logp: np.log(1 - np.exp(logp) + 1e-6)
  odds = lambda logp: logp.mean() - less(logp.mean())
  known = {
    "sft": -mean("retain", lambda t: t.logprob.mean()),
    "ga": mean("forget", lambda t: t.logprob.mean()),
    "kl": 0.0,
    "npo": 2 / 0.1 * np.log(2),
    "simnpo": mean("forget", lambda t: 2 / 2.5 * softplus(2.5 * t.logprob.mean())),
    "unlikelihood": -mean("forget", lambda t: less(t.logprob).mean()),
    "wga": mean("forget", lambda t: (np.exp(t.logprob) * t.logprob).mean()),
    "satimp": mean("forget", lambda t: (np.exp(5 * t.logprob + less(t.logprob)) * t.logprob).mean()),
    "undial": np.concatenate([adjusted(t) for t in every if t.role == "forget"]).mean(),
    "rmu": mean("forget", steered),
    "rmu_retain": 0.0,
    "dpo": np.log(2),
    "simpo": paired(lambda won, lost: softplus(1.0 - 2.0 * (won.mean() - lost.mean()))),
    "orpo": paired(lambda won, lost: softplus(odds(lost) - odds(won))),
    "ram": paired(lambda won, lost: -won.sum() + 1e-4 * lost.sum()),
    "kto": 0.5,
  }
  assert name in known, f"say here what `{name}` is when the policy is the reference"
  return known[name]


def softmax(logits: np.ndarray) -> np.ndarray:
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@EVERY_LOSS
def test_the_value_at_the_reference(name):
  found = value(name, context([texts(at_reference=True)]))
  assert_allclose(found.value(), at_reference(name), rtol=3e-6, atol=1e-6)


# Gradients


HELD = {"wga": (1.0, 0.0), "satimp": (5.0, 1.0)}  # exponents of p and 1 - p in a weight that has no gradient


@pytest.mark.parametrize("name,settings", [
  *((name, {}) for name in NAMES if name not in HELD),
  *((name, {option: choice}) for name in NAMES if name not in HELD
    for option, choices in LOSSES[name].options.items() for choice in choices[1:]),
])  # fmt: skip
def test_the_gradient_is_the_finite_difference(name, settings):
  """Through log-softmax, along random directions of the logits of a model that is no longer the reference."""
  ctx = context([texts()[:4], texts()[4:]])
  B, P = ctx.logprob_BP.shape
  rng = np.random.default_rng(1)
  draw = lambda: jnp.asarray(rng.standard_normal((2, B, P, V)), jnp.float32)
  point, *directions = (draw() for _ in range(4))
  held = ctx.within("mismatched", ctx.batch.score_segment)  # KTO's reference point is a constant

  @jax.jit
  @jax.value_and_grad
  def loss(logits):
    scored = token_logprobs(logits[0], ctx.head, ctx.batch.target)
    moved = dataclasses.replace(with_hidden(ctx, logits[1]), logprob_BP=scored)
    return value(name, moved, **settings).value()

  _, slope = loss(point)
  h, size = 1e-2, 0.0
  for direction in directions:
    direction = jnp.where(held[..., None], 0.0, direction)
    ahead, behind = (loss(point + sign * h * direction)[0] for sign in (1, -1))
    along = jnp.vdot(slope, direction)
    size = max(size, abs(along))
    assert_allclose((ahead - behind) / (2 * h), along, rtol=3e-3, atol=2e-4)
  assert size > 3e-3, "a direction that shows something"


@pytest.mark.parametrize("name", HELD)
def test_a_held_weights_slope_is_the_weight_itself(name):
  """d/d log p of w log p with w held: w over the number of tokens and texts, whatever the slope of w."""
  a, b = HELD[name]
  ctx = context([[text("forget", [-0.2, -3.0]), text("forget", -1.5)]])
  slope = jax.grad(lambda x: value(name, dataclasses.replace(ctx, logprob_BP=x)).value())(ctx.logprob_BP)
  p = np.exp([-0.2, -3.0, -1.5])
  assert_allclose(slope[0], p**a * (1 - p) ** b / [4, 4, 2], rtol=1e-5)


def test_ktos_reference_point_has_no_gradient():
  ctx = context([texts()])
  slope = jax.grad(lambda x: value("kto", dataclasses.replace(ctx, logprob_BP=x)).value())(ctx.logprob_BP)
  held = ctx.within("mismatched", ctx.batch.score_segment)
  assert not slope[held].any() and slope[ctx.within("forget", ctx.batch.score_segment)].all()
