"""Means of what counts, formulas of means, and intervals that are left out rather than wrong."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_allclose

from jaxbias.evals.metrics import Benchmark, Higher
from jaxbias.evals.tabulate import groups_of, tabulate

NAN = float("nan")


def table(items, labels, clusters, formulas=None):
  benchmark = Benchmark("b", {name: Higher() for name in (*items, *(formulas or {}))}, "here", "cluster")
  return tabulate(benchmark, items, groups_of(labels), clusters, formulas, draws=300).estimates


def test_only_what_counts_is_averaged_and_a_formula_sees_the_means():
  found = table({"x": [1, 3, NAN, 5], "y": [NAN, 1, 1, 0]}, list("aabb"), list("stuv"),
                {"product": lambda means: means["x"] * means["y"]})
  assert list(found) == ["overall", "a", "b"]
  assert found["overall"]["x"].value == 3.0
  assert_allclose(found["overall"]["product"].value, 2.0)
  assert found["a"]["x"].value == 2.0 and found["b"]["y"].value == 0.5


def test_a_metric_without_examples_is_left_out_and_one_that_may_lack_them_has_no_interval():
  found = table({"x": [NAN, NAN, 1.0, 2.0]}, list("aabb"), list("stuv"))
  assert found["a"] == {}
  assert found["overall"]["x"].low is None  # a resample may hold none of the two that count
  assert found["b"]["x"].low == 1.0 and found["b"]["x"].high == 2.0


def test_clusters_are_drawn_whole():
  rng = np.random.default_rng(0)
  value = np.repeat(rng.normal(size=20), 10)
  alone = table({"x": value}, ["a"] * 200, [str(i) for i in range(200)])["overall"]["x"]
  together = table({"x": value}, ["a"] * 200, [str(i // 10) for i in range(200)])["overall"]["x"]
  assert_allclose(alone.value, together.value)
  assert 2.0 < (together.high - together.low) / (alone.high - alone.low) < 4.5  # sqrt(10)
