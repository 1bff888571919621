"""The contrast of given representations: its closed forms, its derivative, and what may not change it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.losses.contrastive import Members, compare, log_share
from jaxbias.types import Metric

D = 6  # width


def group_of(positives: int, negatives: int) -> Members:
  positive = np.arange(positives + negatives) < positives
  return Members(jnp.zeros(len(positive), jnp.int32), jnp.asarray(positive), jnp.asarray(~positive))


def loss_of(r_ND, members: Members, temperature: float = 1.0) -> jax.Array:
  found = compare(jnp.asarray(r_ND, jnp.float32), members, temperature)
  return found.over_pairs(-found.log_p).value()


def axes(*numbers: int) -> np.ndarray:
  """Unit vectors along axes; -n points the other way."""
  return np.array([np.sign(n) * np.eye(D)[abs(n) - 1] for n in numbers])


@pytest.mark.parametrize("tau", [0.07, 1.0])
@pytest.mark.parametrize("p,n,expected", [(2, 0, 0.0), (2, 3, 1.386294), (3, 5, 1.945910), (4, 7, 2.302585)])
def test_texts_that_are_all_alike_cost_log_of_the_others(p, n, expected, tau):
  assert_allclose(loss_of(axes(*[1] * (p + n)), group_of(p, n), tau), expected, atol=1e-5)


@pytest.mark.parametrize("p,n,tau,expected", [
  (2, 1, 1.0, 0.313262), (2, 7, 1.0, 1.274009), (4, 7, 1.0, 1.718320), (4, 7, 0.07, 1.098614),
])  # fmt: skip
def test_negatives_at_right_angles(p, n, tau, expected):
  assert_allclose(loss_of(axes(*[1] * p, *[2] * n), group_of(p, n), tau), expected, atol=1e-6)


@pytest.mark.parametrize("p,n,expected", [(2, 1, 0.126928), (2, 7, 0.666468), (4, 7, 1.373043)])
def test_opposite_negatives_are_the_floor(p, n, expected):
  assert_allclose(loss_of(axes(*[1] * p, *[-1] * n), group_of(p, n)), expected, atol=1e-6)
  rng = np.random.default_rng(p)
  assert all(loss_of(rng.normal(size=(p + n, D)), group_of(p, n)) >= expected - 1e-6 for _ in range(20))


def test_a_positive_opposite_to_all_others():
  """As an anchor it counts its partner among equals; as a partner it costs log(1 + N e^2), the most there is."""
  assert_allclose(loss_of(axes(-1, *[1] * 8), group_of(2, 7)), (np.log(8) + 3.965059) / 2, rtol=1e-6)


@pytest.mark.parametrize("p,n", [(2, 0), (1, 4), (0, 3)])
def test_a_group_without_two_positives_or_without_negatives_costs_nothing(p, n):
  r = np.random.default_rng(0).normal(size=(p + n, D)).astype(np.float32)
  value, slope = jax.value_and_grad(lambda r: loss_of(r, group_of(p, n), 0.07))(r)
  assert_allclose(value, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)


def test_the_derivative_by_similarity_is_the_softmax_minus_the_positives():
  """dL/ds_ij = (|Pi_i| p_ij - 1[Pi_ij]) / |Pi|: rows add to 0, rows of negatives are 0."""
  members, rng = group_of(3, 4), np.random.default_rng(0)
  found = compare(jnp.asarray(rng.normal(size=(7, D)), jnp.float32), members, 0.5)
  of = lambda s: Metric.over(-log_share(s, found.valid), found.pair).value()
  slope = jax.grad(of)(found.cos / 0.5)
  p = np.where(found.valid, np.exp(found.log_p), 0.0)
  pair = np.asarray(found.pair, np.float32)
  assert_allclose(slope, (pair.sum(1, keepdims=True) * p - pair) / pair.sum(), atol=1e-6)
  assert_allclose(slope.sum(1), 0.0, atol=1e-6)
  assert_array_equal(slope[3:], 0.0)


def test_two_groups_weigh_by_their_pairs_and_do_not_see_each_other():
  rng, sizes = np.random.default_rng(1), ((2, 3), (3, 2))
  r = rng.normal(size=(10, D)).astype(np.float32)
  parts = [group_of(*size) for size in sizes]
  both = Members(jnp.repeat(jnp.array([4, 9]), 5), *(jnp.concatenate([getattr(m, f) for m in parts])
                                                     for f in ("positive", "negative")))  # fmt: skip
  alone = [float(loss_of(half, m)) for half, m in zip((r[:5], r[5:]), parts, strict=True)]
  assert_allclose(loss_of(r, both), (2 * alone[0] + 6 * alone[1]) / 8, rtol=1e-6)
  slope = jax.grad(loss_of)(jnp.asarray(r), both)
  changed = jax.grad(loss_of)(jnp.asarray(np.r_[r[:5], rng.normal(size=(5, D))], jnp.float32), both)
  assert_allclose(slope[:5], changed[:5], atol=1e-7)
  order = rng.permutation(10)
  shuffled = jax.tree.map(lambda x: x[order], both)
  assert_allclose(loss_of(r[order], shuffled), loss_of(r, both), rtol=1e-6)


def test_only_directions_count():
  r, members = np.random.default_rng(2).normal(size=(6, D)), group_of(3, 3)
  assert_allclose(loss_of(r * [[3.0], [0.01], [1e3], [1.0], [7.0], [1e-4]], members), loss_of(r, members), rtol=1e-5)


@pytest.mark.parametrize("tau,tolerance", [(1.0, 1e-2), (0.07, 5e-2)])
def test_bfloat16_inputs_agree(tau, tolerance):
  r, members = np.random.default_rng(3).normal(size=(8, D)).astype(np.float32), group_of(4, 4)
  rounded = jnp.asarray(r, jnp.bfloat16).astype(jnp.float32)
  value, slope = jax.value_and_grad(loss_of)(rounded, members, tau)
  assert np.isfinite(slope).all()
  assert_allclose(value, loss_of(r, members, tau), atol=tolerance)
