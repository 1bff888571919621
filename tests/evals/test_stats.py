"""The cluster bootstrap against a loop, a closed form and its own promise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.evals import stats

RNG = np.random.default_rng(7)


def test_resamples_draw_as_many_clusters_as_there_are():
  count_RC = stats.resample(13, 500, np.random.default_rng(0))
  assert count_RC.shape == (500, 13) and (count_RC.sum(1) == 13).all() and (count_RC >= 0).all()
  assert_allclose(count_RC.mean(0), 1.0, atol=0.2)


def test_a_resampled_mean_varies_by_the_closed_form():
  value_MC = RNG.normal(size=(1, 40))
  mean_R = stats.cluster_mean(stats.resample(40, 40_000, np.random.default_rng(0)), value_MC)[:, 0]
  assert_allclose(mean_R.mean(), value_MC.mean(), atol=0.005)
  assert_allclose(mean_R.var(), value_MC.var() / 40, rtol=0.03)


def test_the_interval_is_that_of_a_plain_loop_over_clusters():
  cluster = np.array([f"c{i}" for i in RNG.integers(12, size=90)])
  value_E = RNG.normal(size=90) + (cluster == "c3")
  names = np.unique(cluster)
  loop = np.random.default_rng(1)
  means = []
  for _ in range(4000):
    drawn = [value_E[cluster == name] for name in loop.choice(names, size=len(names))]
    means.append(np.concatenate(drawn).mean())
  found = stats.ratio_over_clusters(*stats.by_cluster(value_E[None], cluster), draws=4000)
  assert_allclose(found.value, value_E.mean(), rtol=1e-12)
  width = found.high - found.low
  assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.06 * width)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
  hits = 0
  for trial in range(400):
    rng = np.random.default_rng(trial)
    value_C = rng.exponential(size=60)  # true mean 1
    found = stats.mean_over_clusters(value_C, draws=400, seed=trial)
    hits += found.low <= 1.0 <= found.high
  assert 0.90 <= hits / 400 <= 0.98


def test_clusters_that_move_together_widen_the_interval():
  term_effect = np.repeat(RNG.normal(size=20), 10)
  cluster = np.repeat([f"t{i:02d}" for i in range(20)], 10)
  by_term = stats.ratio_over_clusters(*stats.by_cluster(term_effect[None], cluster))
  by_item = stats.mean_over_clusters(term_effect)
  assert by_term.high - by_term.low > 2.5 * (by_item.high - by_item.low)  # sqrt(10) in the limit


def test_seeds_are_averaged_and_shown_and_do_not_narrow_the_interval():
  value_C = RNG.normal(size=30)
  one = stats.mean_over_clusters(value_C)
  many = stats.mean_over_clusters(np.stack([value_C, value_C + 1.0, value_C - 1.0]))
  assert_allclose(many.per_seed, [one.value, one.value + 1, one.value - 1])
  assert_allclose([many.value, many.low, many.high], [one.value, one.low, one.high])


def test_independent_populations_are_drawn_separately():
  a_C, b_C = RNG.normal(size=25), RNG.normal(size=50)

  def difference(count_RA, count_RB):
    return stats.cluster_mean(count_RA, a_C[None]) - stats.cluster_mean(count_RB, b_C[None])

  found = stats.bootstrap_interval(difference, (25, 50), draws=20_000)
  deviation = np.sqrt(a_C.var() / 25 + b_C.var() / 50)
  assert_allclose(found.value, a_C.mean() - b_C.mean())
  assert_allclose(found.high - found.low, 2 * 1.96 * deviation, rtol=0.04)


def test_many_clusters_are_drawn_in_blocks_of_the_same_resamples(monkeypatch):
  value_MC = np.random.default_rng(0).normal(size=(2, 90))
  whole, seen = stats.mean_over_clusters(value_MC, draws=100), []
  monkeypatch.setattr(stats, "BLOCK", 30 * 90)
  monkeypatch.setattr(stats, "resample", lambda *given, draw=stats.resample: seen.append(given[1]) or draw(*given))
  found = stats.mean_over_clusters(value_MC, draws=100)
  assert seen == [30, 30, 30, 10]
  assert_allclose([found.low, found.high], [whole.low, whole.high], rtol=1e-12)


def test_one_cluster_has_no_interval_and_equal_ones_have_no_width():
  alone = stats.mean_over_clusters(np.array([3.0]))
  assert (alone.value, alone.low, alone.high) == (3.0, None, None)
  equal = stats.mean_over_clusters(np.full(5, 3.0))
  assert (equal.value, equal.low, equal.high) == (3.0, 3.0, 3.0)


def test_a_statistic_that_a_resample_may_not_have_has_a_value_and_no_interval():
  """Three clusters, of which one alone has what is counted: a resample without it has no ratio."""
  weight, total = np.array([2.0, 0.0, 0.0]), np.array([[1.0, 0.0, 0.0]])
  with np.errstate(invalid="ignore"):
    found = stats.bootstrap_interval(lambda count: stats.cluster_ratio(count, total, weight), [3], draws=50)
  assert (found.value, found.low, found.high) == (0.5, None, None)


def test_the_same_seed_gives_the_same_interval_and_a_higher_level_a_wider_one():
  value_C = RNG.normal(size=30)
  found = stats.mean_over_clusters(value_C, seed=3)
  assert found == stats.mean_over_clusters(value_C, seed=3) != stats.mean_over_clusters(value_C, seed=4)
  wide = stats.mean_over_clusters(value_C, seed=3, level=0.99)
  assert wide.low < found.low < found.value < found.high < wide.high


@pytest.mark.parametrize("names", [["b", "a", "b", "c"], ["Ethiopia", "Ethiopian", "Ethiopia", "x"]])
def test_examples_are_added_up_by_name(names):
  sum_MC, size_C = stats.by_cluster(np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0]]), names)
  order = sorted(set(names))
  assert_allclose(size_C, [names.count(name) for name in order])
  assert_allclose(sum_MC[0], [sum(v for v, n in zip([1, 2, 3, 4], names, strict=True) if n == name) for name in order])
  assert sum_MC.shape == (2, 3)


# Two models on the same items.


def test_exact_sign_flips_count_the_patterns():
  # Sums of +-1 +-2 +-4: +-7, +-5, +-3, +-1; |sum| >= 7 for 2 of 8 patterns, >= 5 for 4 of 8, >= 1 for all.
  assert stats.sign_flips([1.0, 2.0, 4.0]) == 2 / 8
  assert stats.sign_flips([-1.0, 2.0, 4.0]) == 4 / 8
  assert stats.sign_flips([-1.0, -2.0, 4.0]) == 1.0
  assert stats.sign_flips(np.zeros(5)) == stats.sign_flips([3.0]) == 1.0
  assert stats.sign_flips(np.full(10, 0.1)) == 2 / 2**10


def test_drawn_sign_flips_come_near_the_exact_ones_and_are_never_zero():
  difference_C = np.random.default_rng(2).normal(0.4, 1.0, size=12)
  exact = stats.sign_flips(difference_C)
  drawn = stats.sign_flips(difference_C, draws=4000)
  assert 0.02 < exact < 0.9 and drawn != exact
  assert_allclose(drawn, exact, atol=4 * np.sqrt(exact * (1 - exact) / 4000))
  assert stats.sign_flips(np.ones(200), draws=999) == 1 / 1000


@pytest.mark.parametrize("clusters", [9, 40])
def test_the_test_holds_its_level(clusters):
  rejected = 0
  for trial in range(400):
    rng = np.random.default_rng(trial)
    effect_C = rng.standard_t(3, size=clusters)  # symmetric, heavy-tailed, shared by a cluster's five items
    cluster = np.repeat([f"c{i}" for i in range(clusters)], 5)
    difference_E = np.repeat(effect_C, 5) + rng.normal(size=5 * clusters)
    sum_1C, _ = stats.by_cluster(difference_E[None], cluster)
    rejected += stats.sign_flips(sum_1C[0], draws=600, seed=trial) <= 0.05
  assert 0.02 <= rejected / 400 <= 0.08  # 0.05 +- 2.75 standard errors


def test_the_interval_of_a_difference_covers_it_and_pairing_narrows_it():
  hits = 0
  for trial in range(300):
    rng = np.random.default_rng(trial)
    item_E = np.repeat(rng.normal(scale=3.0, size=50), 4)  # hard and easy clusters, for both models alike
    one_E, other_E = item_E + 0.5 + rng.normal(size=200), item_E + rng.normal(size=200)
    cluster = np.repeat(np.arange(50), 4).astype(str)
    found, p = stats.paired(one_E, other_E, cluster, draws=400, seed=trial)
    hits += found.low <= 0.5 <= found.high
  assert 0.90 <= hits / 300 <= 0.98
  alone = stats.mean_over_examples(one_E, cluster)
  assert found.high - found.low < 0.5 * (alone.high - alone.low) and p < 0.05


def test_paired_is_antisymmetric_and_refuses_what_is_no_pair():
  one_E, other_E, cluster = RNG.normal(size=30), RNG.normal(size=30), [f"c{i % 6}" for i in range(30)]
  forth, p = stats.paired(one_E, other_E, cluster)
  back, q = stats.paired(other_E, one_E, cluster)
  assert_allclose([forth.value, forth.low, forth.high], [-back.value, -back.high, -back.low])
  assert_allclose(forth.value, (one_E - other_E).mean())
  assert p == q
  assert stats.paired(one_E, one_E, cluster)[1] == 1.0
  with pytest.raises(ValueError, match="no pairs"):
    stats.paired(one_E, other_E[:-1], cluster)


def test_holm_by_hand():
  assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])  # x3, the 0.06 below it, x2, x4
  assert_allclose(stats.holm([0.5, 0.9]), [1.0, 1.0])
  assert_allclose(stats.holm([0.2]), [0.2])
  assert stats.holm([]).shape == (0,)


def test_ties_are_counted():
  assert stats.tie_rate([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 3.0, 5.0]) == 0.5
  assert stats.tie_rate([1.0, 2.0], [1.05, 2.5], atol=0.1) == 0.5
