"""The diagnosis's statistics against closed forms, scipy, and tables whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.evals import diagnosis as d
from jaxbias.evals.student import t_cdf, t_quantile

RNG = np.random.default_rng(3)


def row(model="m", objective="two_sided", remedy="none", n=100, seed=0, step=1, **columns):
  return {"model": model, "objective": objective, "remedy": remedy, "n": n, "seed": seed, "step": step, **columns}


def points(x, y, model="m", per_run=5, **more):
  """A table of (x, y) in order, `per_run` checkpoints a run."""
  extra = [dict(zip(more, values, strict=True)) for values in zip(*more.values(), strict=True)] or [{}] * len(x)
  return [row(model, seed=i // per_run, step=1 + i % per_run, x=float(a), y=float(b), **e)
          for i, (a, b, e) in enumerate(zip(x, y, extra, strict=True))]  # fmt: skip


def value(table, *args, **how):
  return d.correlate(table, *args, draws=100, **how).estimate.value


@pytest.mark.parametrize("slope", [2.0, -0.3])
@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_linear_data_correlate_exactly(slope, kind):
  x = RNG.normal(size=30)
  found = d.correlate(points(x, 4 + slope * x), "x", "y", kind=kind, draws=200)
  expected = np.sign(slope)
  assert_allclose([found.estimate.value, found.estimate.low, found.estimate.high], expected, atol=1e-12)
  assert (found.points, found.runs, found.reason) == (30, 6, "")


def test_what_is_left_of_x_and_x_plus_z_given_z_is_the_same():
  x, z = RNG.normal(size=40), 10 * RNG.normal(size=40)
  table = points(x, x + z, z=z)
  assert_allclose(value(table, "x", "y", ["z"]), 1.0, atol=1e-12)
  assert value(table, "x", "y") < 0.6


def test_a_partial_correlation_is_that_of_the_residuals():
  z, w = RNG.normal(size=(2, 60))
  x, y = z - w + RNG.normal(size=60), 2 * z + w + RNG.normal(size=60)
  design = np.stack([np.ones(60), z, w], 1)
  rest = lambda v: v - design @ np.linalg.lstsq(design, v, rcond=None)[0]
  expected = np.corrcoef(rest(x), rest(y))[0, 1]
  assert_allclose(value(points(x, y, z=z, w=w), "x", "y", ["z", "w"]), expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_a_difference_between_models_is_no_correlation(kind):
  x = np.arange(10.0)
  table = points(x, -x, "small") + points(x + 100, -x + 500, "large")
  assert_allclose(value(table, "x", "y", kind=kind), -1.0, atol=1e-12)
  assert np.corrcoef([r["x"] for r in table], [r["y"] for r in table])[0, 1] > 0.9


def test_correlations_agree_with_scipy():
  stats = pytest.importorskip("scipy.stats")
  x = RNG.integers(0, 6, 50).astype(float)  # with ties
  y = x + RNG.integers(0, 9, 50)
  assert_allclose(value(points(x, y), "x", "y"), stats.pearsonr(x, y)[0], atol=1e-12)
  assert_allclose(value(points(x, y), "x", "y", kind="spearman"), stats.spearmanr(x, y)[0], atol=1e-12)


def test_a_resample_is_the_correlation_of_repeated_rows():
  x, y = RNG.normal(size=(2, 12))
  weight = np.repeat([2.0, 0.0, 1.0], 4)
  again = np.repeat(np.arange(12), weight.astype(int))
  for kind, of in (("pearson", lambda v: v), ("spearman", lambda v: d.mid_ranks(v, np.ones((1, len(v))),
                                                                               np.zeros(len(v)))[0])):  # fmt: skip
    found = d.weighted_correlation(np.stack([x, y]), weight[None], np.zeros(12), kind)[0]
    assert_allclose(found, np.corrcoef(of(x[again]), of(y[again]))[0, 1], atol=1e-12)


def test_checkpoints_of_a_run_are_not_counted_as_independent():
  """Ten runs, each one point many times over: the interval is that of ten points, not of 500."""
  x, noise = RNG.normal(size=(2, 10))
  y = 0.5 * x + noise
  width = lambda copies: np.ptp([getattr(d.correlate(
    points(np.repeat(x, copies), np.repeat(y, copies), per_run=copies), "x", "y", draws=1000).estimate, side)
    for side in ("low", "high")])  # fmt: skip
  assert_allclose(width(50), width(1), rtol=1e-9)
  assert width(1) > 0.5


def test_what_is_missing_stays_missing_and_says_why():
  x = np.arange(8.0)
  table = points(x, 2 * x, per_run=2)
  table[3] |= {"y": None, "missing": {"y": "the run failed"}}
  found = d.correlate(table, "x", "y", draws=50)
  assert found.points == 7 and "the run failed (1 rows)" in found.reason
  assert_allclose(found.estimate.value, 1.0)
  few = d.correlate(table[:2], "x", "y")
  assert few.estimate is None and "2 points are too few" in few.reason
  flat = d.correlate(points(x, np.full(8, 0.1)), "x", "y")
  assert flat.estimate is None and "does not vary" in flat.reason
  one_run = d.correlate(points(x, x, per_run=8), "x", "y")
  assert one_run.estimate.low is None and "no interval from 1 runs" in one_run.reason


def test_power():
  assert_allclose(d.smallest_spearman_p(5), 0.0167, atol=5e-5)
  assert d.runs_needed(-0.55) == 14
  with pytest.raises(ValueError, match="between 0 and 1"):
    d.runs_needed(1.0)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30])
def test_students_t(freedom):
  stats = pytest.importorskip("scipy.stats")
  for t in (-7.0, -1.3, 0.0, 0.4, 2.5, 40.0):
    assert_allclose(t_cdf(t, freedom), stats.t.cdf(t, freedom), atol=1e-13)
  for p in (0.01, 0.5, 0.95, 0.995):
    assert_allclose(t_quantile(p, freedom), stats.t.ppf(p, freedom), rtol=1e-9, atol=1e-12)


def test_an_equivalence_is_two_tests():
  stats = pytest.importorskip("scipy.stats")
  difference = RNG.normal(0.1, 0.2, 8)
  found = d.tost(difference, 0.3)
  expected = max(stats.ttest_1samp(difference, -0.3, alternative="greater").pvalue,
                 stats.ttest_1samp(difference, 0.3, alternative="less").pvalue)  # fmt: skip
  assert_allclose(found.p, expected, rtol=1e-9)
  assert_allclose(found.p_zero, stats.ttest_1samp(difference, 0).pvalue, rtol=1e-9)
  assert_allclose([found.low, found.high], stats.t.interval(0.9, 7, difference.mean(), stats.sem(difference)))


@pytest.mark.parametrize("difference,verdict", [
  ([0.01, -0.01, 0.0, 0.02], "equivalent"), ([0.5, 0.52, 0.49, 0.51], "different"), ([-3.0, 4.0, 1.0], "undecided"),
  ([0.05, 0.051, 0.052], "different, within the margin"), ([0.3, 0.3], "different"), ([0.0, 0.0], "equivalent"),
])  # fmt: skip
def test_not_finding_a_difference_is_no_equivalence(difference, verdict):
  found = d.tost(difference, 0.1)
  assert found.verdict == verdict
  assert (found.p < 0.05) == (-0.1 < found.low and found.high < 0.1)


def test_one_pair_tests_nothing():
  assert d.tost([0.1], 0.1) is None
  with pytest.raises(ValueError, match="margin"):
    d.tost([0.1, 0.2], 0.0)


def run(biases, **columns):
  steps = range(len(biases))
  return [row(step=s, b=b, **{k: v[s] for k, v in columns.items()}) for s, b in zip(steps, biases, strict=True)]


def test_a_run_is_read_where_its_bias_comes_down():
  at = d.at_bias(run([20, 12, 4, 9], f=[0.0, 1.0, 3.0, 9.0]), "b", 6.0, ["f"])
  assert_allclose([at["f"], at["step"]], [2.5, 1.75])
  assert d.at_bias(run([20, 12], f=[0, 1]), "b", 12.0, ["f"])["f"] == 1.0
  ends = d.at_bias(run([20, 12, 4], f=[0.0, 1.0, 3.0], at_ends=[80.0, None, 64.0]), "b", 6.0, ["f", "at_ends"])
  assert_allclose([ends["f"], ends["at_ends"]], [2.5, 66.0])
  for biases, reason in (([20, 12], "came down to 12, not to 6"), ([5, 1], "is 5 before training"),
                         ([None, None], "was not measured")):  # fmt: skip
    missed = d.at_bias(run(biases, f=[0, 1]), "b", 6.0, ["f"])
    assert missed["f"] is None and reason in missed["reason"]


def test_remedies_are_compared_at_one_bias_and_not_at_one_step():
  """A remedy that only slows a run down moves along the same front: no difference at the same bias."""
  front = lambda b: (20 - b) * 0.1
  table = []
  for seed, (remedy, speed, off) in itertools.product(range(4), [("none", 8, 0), ("slow", 4, 0), ("good", 8, -0.3)]):
    for step in range(5):
      b = max(20.0 - speed * step, 0) + 0.01 * seed
      table.append(row(remedy=remedy, seed=seed, step=step, b=b, f_all=front(b) + (off + 0.01 * seed) * (step > 0)))
  found = {m.remedy: m for m in d.matched(table, "b", 6.0, {"f_all": 0.05})}
  assert found["slow"].test.verdict == "equivalent" and abs(found["slow"].test.mean) < 1e-9
  assert found["good"].test.verdict == "different" and found["good"].test.mean < -0.25
  assert {m.test.pairs for m in found.values()} == {4}
  high = {m.remedy: m for m in d.matched(table, "b", 2.0, {"f_all": 0.05})}
  assert high["slow"].test is None and high["slow"].reason.count("slow: b came down to 4") == 4
  apart = {r["step"]: r["f_all"] for r in table if r["remedy"] == "slow" and r["seed"] == 0}[1] - front(12.0)
  assert apart < -0.3  # what a comparison at step 1 would have praised


def test_slopes_and_free_points():
  table = [row(seed=s, step=t, f_sel=0.1 * t, f_all=a * 0.1 * t) for s, a in ((0, 2.0), (1, -0.5)) for t in range(4)]
  table += [row(seed=2, step=0, f_sel=0.0, f_all=0.0)]
  found = d.slopes(table, "f_sel", "f_all")
  assert_allclose([s.slope for s in found[:2]], [2.0, -0.5])
  assert found[2].slope is None and "fewer than two" in found[2].reason
  assert d.free_share(table, delta=0.05, tolerance=0.25) == (6, 4, 6)


def test_noise_is_between_seeds_at_one_step():
  table = [row(seed=s, step=t, f_all=10 * t + s) for s in range(3) for t in (0, 1, 2)]
  assert_allclose(d.noise(table, "f_all", 1.0), 2.0)
  assert d.noise(table[:3], "f_all") is None


def test_the_smallest_size_that_suffices():
  table = [row(objective=o, n=n, seed=s, step=t, b=(30.0 if t == 0 else end + s))
           for o, sizes in {"two_sided": {100: 12, 300: 4, 1000: 2}, "one_sided": {100: 20, 300: 18}}.items()
           for n, end in sizes.items() for s in (0, 1) for t in (0, 9)]  # fmt: skip
  two, one = d.smallest_n(table, "b", 5.0)
  assert (two.n, one.n) == (300, None) and "18.5, with n = 300" in one.reason
  assert two.by_n == {100: 12.5, 300: 4.5, 1000: 2.5}
  found, pairs = d.paired_ends(table, "b", "one_sided", "two_sided")
  assert_allclose(found.value, 11.0)
  assert pairs == 4 and found.low < 11.0 < found.high
