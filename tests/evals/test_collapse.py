"""Neural-collapse formulas: the shipped code's numbers, closed forms, invariances, and what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.evals import class_geometry, stats
from jaxbias.evals.class_estimates import BENCHMARK, reduce
from jaxbias.evals.class_labels import Classes
from jaxbias.evals.class_statistics import Statistics, decisions

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "nc_oracle.json").read_text())
FULL = ("A_three_classes_full", "A2_four_classes_full_even_triu", "A3_five_classes_full_odd_triu")
FEW = {"draws": 50}


def statistics(x_ND, y_N, C: int, w_CD=None) -> Statistics:
  """In float64, one class after another."""
  x_ND, y_N = np.asarray(x_ND, np.float64), np.asarray(y_N)
  of = [x_ND[y_N == c] for c in range(C)]
  mean = np.stack([x.mean(0) for x in of])
  variance = np.array([((x - m) ** 2).sum() / len(x) for x, m in zip(of, mean, strict=True)])
  agreement = None
  if w_CD is not None:
    linear, nearest = decisions(*(jnp.asarray(a, jnp.float32) for a in (x_ND, mean, w_CD)))
    same = np.asarray(linear) == np.asarray(nearest)
    agreement = np.stack([np.bincount(y_N, minlength=C), np.bincount(y_N[same], minlength=C)])
  return Statistics(np.bincount(y_N, minlength=C), mean, variance, agreement)


def classes(C: int, **groups) -> Classes:
  return Classes(tuple(f"c{c}" for c in range(C)), None, {name: np.isin(range(C), of) for name, of in groups.items()})


def values(x_ND, y_N, w_CD, **settings) -> dict[str, float]:
  w_CD = np.asarray(w_CD, np.float64)
  result, missing = reduce(statistics(x_ND, y_N, len(w_CD), w_CD), w_CD, classes(len(w_CD)), **FEW | settings)
  assert not missing
  return {name: estimate.value for name, estimate in result.estimates["overall"].items()}


def simplex(C: int, D: int, shift: float = 0.0, copies: int = 3):
  """A simplex ETF in D dimensions as samples without spread, their labels, and weights along the centred means."""
  points = np.zeros((C, D))
  points[:, :C] = np.sqrt(C / (C - 1)) * (np.eye(C) - 1 / C)
  return np.repeat(points + shift, copies, axis=0), np.repeat(np.arange(C), copies), 2.5 * points


def drawn(C=7, D=5, N=90, seed=0):
  rng = np.random.default_rng(seed)
  y = np.r_[np.arange(C), np.arange(C), rng.integers(C, size=N - 2 * C)]
  return rng.normal(size=(N, D)) + rng.normal(size=(C, D))[y], y, rng.normal(size=(C, D))


# The shipped code's numbers


@pytest.mark.parametrize("case", FULL)
def test_means_over_classes_and_pairs_are_the_shipped_codes(case):
  inputs, repo, derived = (ORACLE[case][part] for part in ("inputs", "repo", "derived"))
  found = values(inputs["X"], inputs["Y"], inputs["W"], compat=True)
  shipped = {
    "cdnv_k2": "cdnv_triu_mean", "interference": "interference_triu_mean", "interference_std": "interference_triu_std",
    "log_kernel_uncentred": "logkernel_triu_mean", "log_kernel_uncentred_std": "logkernel_triu_std",
    "log_sqnorm_std": "log_sqnorms_std", "similarity": "similarity_mean_NC3",
    "similarity_std": "similarity_std_UNC3_loss", "similarity_cov": "similarity_cov_std_over_mean",
  }  # fmt: skip
  assert_allclose([found[ours] for ours in shipped], [repo[theirs] for theirs in shipped.values()], atol=1e-5)
  assert_allclose(found["log_riesz_uncentred"], np.log(repo["rieszkernel_triu_mean"]), atol=1e-5)
  assert_allclose(found["agreement"], 100 * repo["nc4_agreement"], atol=1e-5)
  assert_allclose(found["dual_dists"], np.mean(repo["dual_dists_buggy"]), atol=1e-5)
  ours = {
    "cdnv": "cdnv_standard_over_dist2_triu", "log_kernel": "logkernel_centred_triu", "cdnv_w":
    "nc1w_var_over_wdist2_triu", "cdnv_k2_w": "nc1w_var_over_wdist4_triu", "log_kernel_w": "gnc2w_log_inv_wdist_triu",
    "log_kernel_w_unit": "gnc2w_normalised_log_inv_wdist_triu", "similarity_centred": "nc3_centred_both_similarity",
    "duality_distance": "true_self_duality_dist",
  }  # fmt: skip
  assert_allclose([found[name] for name in ours], [np.mean(derived[key]) for key in ours.values()], atol=1e-5)


@pytest.mark.parametrize("case", FULL)
def test_values_of_each_class_are_the_shipped_codes(case):
  inputs, repo = ORACLE[case]["inputs"], ORACLE[case]["repo"]
  found = statistics(inputs["X"], inputs["Y"], inputs["C"], inputs["W"])
  assert_allclose(found.variance, repo["sigma2"], atol=1e-5)
  assert_array_equal(found.agreement, [inputs["counts"], repo["nc4_matches"]])
  assert_array_equal(found.agreement[0] - found.agreement[1], repo["nc4_misses"])
  items = class_geometry.of_means(found.mean, found.variance)
  items |= class_geometry.of_weights(found.mean, found.variance, np.asarray(inputs["W"]))
  for ours, theirs in {"sqnorm": "sqnorms", "log_sqnorm": "log_sqnorms", "similarity": "similarity",
                       "dual_dists": "dual_dists_buggy"}.items():  # fmt: skip
    assert_allclose(items[ours], repo[theirs], atol=1e-5)
  assert_allclose(items["sqnorm"] / np.sqrt(inputs["D"]), repo["sqnorms_over_sqrtD"], atol=1e-5)
  finite = lambda rows: np.array([[0.0 if value in ("inf", "nan") else value for value in row] for row in rows], float)
  others = inputs["C"] - 1
  for ours, theirs in {"cdnv_k2": "cdnv_matrix", "log_kernel_uncentred": "logkernel_matrix_uncentred"}.items():
    assert_allclose(items[ours], finite(repo[theirs]).sum(1) / others, atol=1e-5)
    assert_allclose(items[f"{ours}_square"], (finite(repo[theirs]) ** 2).sum(1) / others, atol=1e-5)
  grid = np.array(repo["interference_matrix"]) - np.eye(inputs["C"])
  assert_allclose(items["interference"], grid.sum(1) / others, atol=1e-5)
  second = np.exp(2 * np.log(repo["rieszkernel_triu_mean"])) + repo["rieszkernel_triu_std"] ** 2 * (
    1 - 2 / (inputs["C"] * others))  # fmt: skip
  assert_allclose(np.exp(items["log_riesz_uncentred_square"]).mean(), second, rtol=1e-5)


@pytest.mark.parametrize("case", FULL)
def test_decisions_of_each_sample_are_the_shipped_codes(case):
  inputs, repo = ORACLE[case]["inputs"], ORACLE[case]["repo"]
  x, mean, w = (jnp.asarray(a, jnp.float32) for a in (inputs["X"], repo["means"], inputs["W"]))
  linear, nearest = decisions(x, mean, w)
  assert_array_equal(linear, repo["nc4_pred_linear"])
  assert_array_equal(nearest, repo["nc4_pred_ncc"])


# Closed forms


@pytest.mark.parametrize(("C", "D", "shift"), [(4, 8, 2.0), (4, 8, 0.0), (9, 9, -3.0)])
def test_a_simplex_has_collapsed(C, D, shift):
  found = values(*simplex(C, D, shift))
  zero = ("cdnv", "cdnv_k2", "trace_ratio", "norm_cov", "log_sqnorm_std", "interference_std", "log_kernel_std",
          "similarity_std", "duality_distance", "cdnv_w", "cdnv_k2_w")  # fmt: skip
  assert_allclose([found[name] for name in zero], 0.0, atol=1e-5)
  assert_allclose([found["norm"], found["similarity"], found["agreement"]], [1.0, 1.0, 100.0], atol=1e-5)
  assert_allclose(found["interference"], -1 / (C - 1), atol=1e-5)
  assert_allclose(found["log_kernel"], -0.5 * np.log(2 * C / (C - 1)), atol=1e-5)
  assert_allclose(found["log_riesz"], -0.5 * (D - 2) * np.log(2 * C / (C - 1)), atol=1e-4)


def test_the_shipped_simplex():
  inputs, repo, expected = (ORACLE["D_simplex_etf"][part] for part in ("inputs", "repo", "expected"))
  found = values(inputs["X"], inputs["Y"], inputs["W"])
  assert_allclose(found["log_kernel_uncentred"], repo["logkernel_triu_mean"], atol=1e-5)
  assert_allclose(found["log_kernel"], expected["logkernel_centred"], atol=1e-5)
  assert_allclose(found["log_riesz_uncentred"], np.log(repo["rieszkernel_triu_mean"]), atol=1e-5)
  assert_allclose([found["interference"], found["similarity"]], [expected["interference_offdiag"], 1.0], atol=1e-5)


def test_two_classes_are_opposite():
  result, missing = reduce(statistics(*drawn(C=2)[:2], 2), None, classes(2), **FEW)
  assert_allclose(result.estimates["overall"]["interference"].value, -1.0, atol=1e-6)
  assert missing["interference_std"] == "one pair of classes, which has no spread"


# What may change nothing


SCALED = ("norm", "cdnv_k2", "cdnv_w", "cdnv_k2_w", "agreement")
SHIFT_FREE = [name for name in BENCHMARK.metrics if "uncentred" not in name and name != "agreement"]
MOVED = {
  "scaled": (lambda x, w, turn: (3.0 * x, w), [name for name in BENCHMARK.metrics if name not in SCALED]),
  "shifted": (lambda x, w, turn: (x + np.arange(1.0, 6.0), w), SHIFT_FREE),
  "turned": (lambda x, w, turn: (x @ turn, w @ turn), list(BENCHMARK.metrics)),
  "weights scaled row by row": (lambda x, w, turn: (x, w * np.linspace(0.5, 2.0, len(w))[:, None]),
                                ["similarity", "similarity_std", "similarity_cov", "duality_distance",
                                 "log_kernel_w_unit"]),
}  # fmt: skip


@pytest.mark.parametrize("how", MOVED)
def test_invariances(how):
  x, y, w = drawn()
  move, same = MOVED[how]
  turn = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0]
  before, after = values(x, y, w), values(*(lambda moved: (moved[0], y, moved[1]))(move(x, w, turn)))
  assert_allclose([after[name] for name in same], [before[name] for name in same], rtol=2e-5)


def test_what_is_not_invariant():
  x, y, w = drawn()
  before, scaled, shifted, weights = (values(*of) for of in ((x, y, w), (2 * x, y, w), (x + 5.0, y, w), (x, y, w + 1)))
  assert_allclose(scaled["cdnv_k2"], before["cdnv_k2"] / 4, rtol=1e-5)
  assert_allclose(scaled["norm"], 2 * before["norm"], rtol=1e-6)
  assert abs(shifted["log_kernel_uncentred"] - before["log_kernel_uncentred"]) > 0.1
  assert abs(weights["similarity_std"] - before["similarity_std"]) > 1e-3


def test_the_shipped_invariances_and_degenerate_minima():
  shipped = ORACLE["E_numerics"]["affine_invariance_of_loss"]
  x, y, w = np.array(shipped["X"]), shipped["Y"], np.array(shipped["W"])
  assert_allclose(values(x, y, w)["similarity_std"], shipped["base"], atol=1e-5)
  assert_allclose(values(x + 7.0, y, w)["similarity_std"], shipped["X_shifted"], atol=1e-5)
  x, y, w = simplex(4, 8)
  for sign in (1.0, -1.0):
    found = values(x, y, sign * w)
    assert_allclose([found["similarity"], found["similarity_std"]], [sign, 0.0], atol=1e-5)


# Pairs in tiles


@pytest.mark.parametrize("tile", [4, 8, 1024])
def test_pairs_in_tiles_are_the_whole_grid(tile, monkeypatch):
  monkeypatch.setattr(class_geometry, "TILE", tile)
  rng = np.random.default_rng(1)
  x, spread = rng.normal(size=(13, 6)), rng.uniform(1, 2, 13)  # 13 leaves a last tile of one class
  found = class_geometry.pairs(x, spread, tuple(class_geometry.KERNELS), power=4.0)
  square = ((x[:, None] - x) ** 2).sum(-1) + np.diag(np.full(13, np.inf))
  half = 0.5 * (spread[:, None] + spread)
  np.fill_diagonal(half, 0.0)
  log = np.where(np.isinf(square), 0.0, -0.5 * np.log(square))
  grids = {"cdnv": half / square, "cdnv_k2": half / square**2, "log_kernel": log}
  for kernel, grid in grids.items():
    assert_allclose(found[kernel], grid.sum(1) / 12, rtol=1e-5)
    assert_allclose(found[f"{kernel}_square"], (grid**2).sum(1) / 12, rtol=1e-5)
  assert_allclose(np.exp(found["log_riesz"]), (square**-2.0).sum(1) / 12, rtol=1e-5)
  x = x - x.mean(0)
  u = class_geometry.unit(x)
  grid = u @ u.T - np.eye(13)
  first, second = class_geometry.interference(x)
  assert_allclose(first, grid.sum(1) / 12, atol=1e-6)
  assert_allclose(second, (grid**2).sum(1) / 12, atol=1e-6)


# Intervals, groups, and what is missing


def test_the_interval_of_a_pair_statistic_is_that_of_drawing_classes():
  x, y, w = drawn(C=40, N=400)
  found = statistics(x, y, 40)
  estimate = reduce(found, None, classes(40), draws=400)[0].estimates["overall"]["cdnv"]
  square = ((found.mean[:, None] - found.mean) ** 2).sum(-1) + np.eye(40)
  grid = 0.5 * (found.variance[:, None] + found.variance) / square * (1 - np.eye(40))
  count = stats.resample(40, 400, np.random.default_rng(0))
  pairs = np.einsum("ri,ij,rj->r", count, grid, count)  # a class drawn twice makes no pair with itself
  number = count.sum(1) ** 2 - (count**2).sum(1)
  low, high = np.quantile(pairs / number, [0.025, 0.975])
  assert_allclose(estimate.high - estimate.low, high - low, rtol=0.15)
  assert estimate.low < estimate.value < estimate.high


def test_a_gap_is_the_first_groups_mean_less_the_seconds():
  x, y, w = drawn(C=8)
  result, missing = reduce(statistics(x, y, 8, w), w, classes(8, male=[0, 1, 2], female=[3, 4], none=[]), **FEW)
  of = {group: result.estimates[group]["similarity"].value for group in ("male", "female", "male - female")}
  s = result.items["similarity"]
  assert_allclose([of["male"], of["female"]], [s[:3].mean(), s[3:5].mean()])
  assert_allclose(of["male - female"], s[:3].mean() - s[3:5].mean())
  assert_allclose(result.estimates["male"]["similarity_std"].value, s[:3].std(ddof=1))
  gap = result.estimates["male - female"]
  assert gap["similarity"].low <= of["male - female"] <= gap["similarity"].high
  assert_allclose(gap["cdnv"].value, result.items["cdnv"][:3].mean() - result.items["cdnv"][3:5].mean())
  assert "none" in missing and "none" not in result.estimates


@pytest.mark.parametrize(("change", "lost", "why"), [
  (lambda s, w: (s._replace(agreement=None), None), {"similarity", "agreement", "cdnv_w"}, "labels have no output"),
  (lambda s, w: (s, w[:, :3]), {"similarity_std", "log_kernel_w"}, "the head reads 3 features and this site has 5"),
  (lambda s, w: (s._replace(agreement=None), w), {"agreement"}, "no text is held out"),
  (lambda s, w: (s._replace(variance=np.full(7, np.nan)), w), {"cdnv", "trace_ratio", "cdnv_w"}, "have two samples"),
  (lambda s, w: (s._replace(mean=np.r_[s.mean[:1], s.mean[:6]]), w), {"cdnv", "log_kernel"}, "two classes coincide"),
  (lambda s, w: (s, np.r_[w[:1], w[:6]]), {"cdnv_w", "log_kernel_w_unit"}, "two classes coincide"),
])  # fmt: skip
def test_what_cannot_be_had_is_missing_and_the_rest_is_kept(change, lost, why):
  x, y, w = drawn()
  result, missing = reduce(*change(statistics(x, y, 7, w), w), classes(7), **FEW)
  assert lost <= missing.keys() and all(why in missing[name] for name in lost)
  kept = result.estimates["overall"]
  assert not kept.keys() & missing.keys() and kept.keys() | missing.keys() == BENCHMARK.metrics.keys()
  assert {"norm", "interference"} <= kept.keys()


def test_a_class_of_one_sample_has_no_variance_but_a_mean():
  x, y, w = drawn()
  found = statistics(x, y, 7, w)
  found = found._replace(variance=np.r_[np.nan, found.variance[1:]])
  result, missing = reduce(found, w, classes(7), **FEW)
  without = reduce(found._replace(mean=found.mean[1:], variance=found.variance[1:], agreement=None), w[1:], classes(6),
                   **FEW)[0]  # fmt: skip
  assert not missing and np.isnan(result.items["cdnv"][0])
  pair = lambda one: one.estimates["overall"]["cdnv"].value
  assert_allclose(pair(result), pair(without), rtol=1e-5)
  assert len(result.items["similarity"]) == 7


def test_one_class_and_none():
  x, y, w = drawn(C=1)
  result, missing = reduce(statistics(x, y, 1, w), w, classes(1), **FEW)
  assert "one class only" in missing["cdnv"] and {"interference", "similarity_std", "norm_cov"} <= missing.keys()
  none = Statistics(np.zeros(0, int), np.zeros((0, 5)), np.zeros(0), None)
  result, missing = reduce(none, np.zeros((0, 5)), classes(0), **FEW)
  assert missing.keys() == BENCHMARK.metrics.keys() and result.estimates == {"overall": {}}
