"""How the next token is chosen: filters against a sort, the penalty by hand, draws against their probabilities."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.evals.sampling import Sampling, choose, likely
from tests.evals.drawing import rules


def kept_by_numpy(score, k, p) -> np.ndarray:
  """Hugging Face's two filters on one row, with a sort."""
  order = np.argsort(-score, kind="stable")
  order = order[: k or None]
  mass = np.exp(score[order] - score.max())
  above = np.concatenate([[0], np.cumsum(mass / mass.sum())[:-1]])
  kept = np.zeros(len(score), bool)
  kept[order[(above < p) | (np.arange(len(order)) == 0) | (p == 1)]] = True
  return kept


@pytest.mark.parametrize("seed", range(3))
def test_top_k_and_top_p_against_a_sort(seed):
  rng = np.random.default_rng(seed)
  k = np.array([0, 1, 5, 0, 7, 400, 0, 100], np.int32)
  p = np.array([1, 1, 1, 0.9, 0.6, 0.95, 1e-6, 0.3], np.float32)
  score = (4 * rng.standard_normal((8, 300))).astype(np.float32)
  expected = [kept_by_numpy(row.astype(np.float64), *kp) for row, *kp in zip(score, k, p.astype(float), strict=True)]
  assert_array_equal(likely(score, k, p), expected)


def test_ties_at_the_edge_are_kept_together():
  score = np.array([[2.0, 1.0, 1.0, 0.0], [0.0, -1.0, -1.0, -2.0]], np.float32)
  assert_array_equal(likely(score, np.array([2, 2]), np.ones(2, np.float32)), [[1, 1, 1, 0]] * 2)


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_not():
  score = jnp.array([[3.0, 2.5, -1.0], [-1.0, -1.5, -1.2]])
  seen = jnp.array([[True, False, False], [True, False, False]])
  pick = lambda penalty: choose(score, seen, rules([Sampling(repetition_penalty=penalty)] * 2, [0, 1]), 0).tolist()
  assert pick(1.0) == [0, 0]
  assert pick(1.3) == [1, 2]  # 3 / 1.3 < 2.5 and -1 * 1.3 < -1.2


def test_draws_have_the_model_s_probabilities():
  B, score = 20_000, np.array([2.0, 1.0, 0.5, 0.0, -1.0], np.float32)
  how = Sampling(temperature=0.8, top_k=4, top_p=0.9, repetition_penalty=1.5)
  seen = np.array([True, False, False, False, False])
  warm = np.where(seen, score / 1.5, score).astype(np.float64) / 0.8
  expected = np.where(kept_by_numpy(warm, 4, 0.9), np.exp(warm), 0)
  expected /= expected.sum()
  drawn = choose(jnp.tile(score, (B, 1)), jnp.tile(seen, (B, 1)), rules([how] * B, range(B)), 3)
  share = np.bincount(drawn, minlength=5) / B
  assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(B))  # four standard errors
  assert share[expected == 0].sum() == 0
