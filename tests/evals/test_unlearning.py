"""Measures of forgetting by hand, the exact Kolmogorov-Smirnov test against closed forms and scipy."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.evals import unlearning
from jaxbias.evals.task import TokenScores


def answer(logprob, greedy=None, mean=None, std=None) -> TokenScores:
  logprob = np.array(logprob, float)
  fill = lambda value, default: np.full(len(logprob), default) if value is None else np.array(value)
  return TokenScores(logprob, fill(greedy, True), fill(mean, 0.0), fill(std, 1.0))


def test_ratios_and_probabilities_by_hand():
  half, quarter, eighth = np.log([2.0, 4.0, 8.0])  # losses of answers of probability 1/2, 1/4, 1/8 a token
  assert_allclose(unlearning.loss(answer([-1.0, -2.0, -6.0])), 3.0)
  assert_allclose(unlearning.truth_ratio(half, [quarter, quarter]), 0.5)
  assert_allclose(unlearning.truth_ratio(quarter, [half, eighth]), 1.0)  # geometric: sqrt(1/2 1/8) is 1/4
  assert_allclose(unlearning.normalised_probability(half, [quarter, eighth]), 4 / 7)


def test_memorisation_by_hand():
  assert unlearning.exact_memorization(answer([-1.0] * 4, [True, False, True, True])) == 0.75
  strength = lambda *greedy: unlearning.extraction_strength(answer([-1.0] * len(greedy), greedy))
  assert strength(True, False, True, True) == 0.5  # right from the third of four on
  assert strength(True, True, True) == 1.0
  assert strength(False, False, True, False) == 0.25 == strength(False, False, False, True)  # the floor is 1/N
  assert strength(False) == strength(True) == 1.0


def test_membership_scores_by_hand():
  given = answer([-1.0, -5.0, -2.0, -4.0, -3.0], mean=[-2.0] * 5, std=[1.0, 2.0, 1.0, 1.0, 0.0])
  found = unlearning.attacks(given, "some text", reference=2.0)
  assert_allclose(found["loss"], 3.0)
  assert_allclose(found["zlib"], 3.0 / len(zlib.compress(b"some text")))
  assert_allclose(found["min_k"], 4.5)  # int(0.4 x 5) = 2: -5 and -4
  assert_allclose(found["min_k_plus_plus"], (1000.0 + 2.0) / 2)  # -1 / 0.001 and -2 / 1
  assert_allclose(found["reference"], 1.0)
  assert "reference" not in unlearning.attacks(given, "some text")
  assert unlearning.attacks(answer([-7.0]), "x")["min_k"] == 7.0  # one token at least


def test_auc_and_leak_by_hand():
  assert unlearning.higher([2.0, 3.0], [1.0, 2.0]).tolist() == [[1.0, 0.5], [1.0, 1.0]]
  assert unlearning.privacy_leak(0.5) == 0.0
  assert_allclose([unlearning.privacy_leak(1.0), unlearning.privacy_leak(0.0)], [-100.0, 100.0])
  assert_allclose(unlearning.privacy_leak(0.7, retained=0.6), -25.0)


@pytest.mark.parametrize("size", [3, 20, 400])
def test_samples_apart_have_the_smallest_p(size):
  apart = unlearning.same_distribution(np.arange(size), np.arange(size) + 1000.0)
  assert_allclose(apart, 2 / math.comb(2 * size, size), rtol=1e-10)  # two of all orders


def test_equal_samples_and_single_values():
  sample = np.array([0.3, 0.1, 0.2])
  assert unlearning.same_distribution(sample, sample) == 1.0
  assert unlearning.same_distribution([1.0], [2.0]) == 1.0
  # All 3 places of one value among two others: D is 1 at either end, 1/2 in the middle.
  assert_allclose(unlearning.same_distribution([0.0], [1.0, 2.0]), 2 / 3)
  assert_allclose(unlearning.same_distribution([1.5], [1.0, 2.0]), 1.0)


@pytest.mark.parametrize(("sizes", "shift"), [((40, 40), 0.3), ((400, 400), 0.5), ((30, 47), 0.0), ((100, 37), 2.0)])
def test_the_exact_p_is_scipys(sizes, shift):
  scipy_stats = pytest.importorskip("scipy.stats")
  rng = np.random.default_rng(3)
  one, other = rng.normal(size=sizes[0]), rng.normal(size=sizes[1]) + shift
  expected = scipy_stats.ks_2samp(one, other, method="exact").pvalue
  assert_allclose(unlearning.same_distribution(one, other), expected, rtol=1e-6, atol=1e-14)


def test_the_p_of_like_samples_holds_its_level():
  p = [unlearning.same_distribution(rng.normal(size=25), rng.normal(size=30))
       for rng in map(np.random.default_rng, range(400))]
  assert np.mean(np.array(p) <= 0.05) <= 0.08 and np.mean(np.array(p) <= 0.5) > 0.35


@pytest.mark.parametrize(("reference", "found", "recall"), [
  ("The cat sat on the mat.", "the CAT on, mat", 4 / 6),
  ("a b c", "c b a", 1 / 3),
  ("a b", "a b and much more of it", 1.0),
  ("a b", "", 0.0),
  ("?!", "a", 0.0),
  ("runs", "running", 0.0),  # a stemmer would say 1
])  # fmt: skip
def test_rouge_by_hand(reference, found, recall):
  assert_allclose(unlearning.rouge_l_recall(reference, found), recall)


def test_rouge_is_that_of_the_textbook_table():
  rng = np.random.default_rng(5)
  for _ in range(30):
    one, other = (rng.choice(list("abcd"), size=rng.integers(1, 25)) for _ in range(2))
    table = np.zeros((len(one) + 1, len(other) + 1))
    for i, a in enumerate(one):
      for j, b in enumerate(other):
        table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert_allclose(unlearning.rouge_l_recall(" ".join(one), " ".join(other)), table[-1, -1] / len(one))


def test_the_harmonic_mean_is_zero_with_a_zero():
  found = unlearning.harmonic_mean([np.array([1.0, 0.0]), np.array([0.5, 0.5])])
  assert_allclose(found, [2 / 3, 0.0])
