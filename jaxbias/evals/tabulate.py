"""One value an example -> a benchmark's table: every metric in every group, bootstrapped over clusters. NumPy only.

Axis letters: E examples, C clusters, R resamples.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxbias.evals import stats
from jaxbias.evals.metrics import Benchmark, Estimate, Result

Means = Mapping[str, np.ndarray]
Formula = Callable[[Means], np.ndarray]


def groups_of(*labels_E: Sequence[str]) -> dict[str, np.ndarray]:
  """{"overall": everything, and for each label its examples}, bool [E], for one or more ways of labelling."""
  labels_E = [np.asarray(labels) for labels in labels_E]
  found = {"overall": np.ones(len(labels_E[0]), bool)}
  return found | {str(name): labels == name for labels in labels_E for name in np.unique(labels)}


def tabulate(benchmark: Benchmark, items: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray],
             clusters: Sequence[str], formulas: Mapping[str, Formula] | None = None, **how) -> Result:
  """Each metric of `benchmark` is a mean over examples, or what `formulas` makes of such means.

  items[name] [E]: what an example adds; NaN where it does not count. groups[name]: bool [E]. formulas[metric] takes
  {item: mean} and returns the metric. Metrics with neither are left to the caller. One without examples to count is
  left out of a group's row; it has no interval where some resample is without them. `how`: stats.bootstrap_interval's.
  """
  clusters, items = np.asarray(clusters), {name: np.asarray(value_E, np.float64) for name, value_E in items.items()}
  formulas = {name: operator.itemgetter(name) for name in items} | dict(formulas or {})
  estimates = {}
  for group, chosen_E in groups.items():
    names, cluster_E = np.unique(clusters[chosen_E], return_inverse=True)
    sums = {name: _sums(value_E[chosen_E], cluster_E, len(names)) for name, value_E in items.items()}
    found = {metric: _estimate(formulas[metric], sums, len(names), how)
             for metric in benchmark.metrics if metric in formulas}
    estimates[group] = {metric: estimate for metric, estimate in found.items() if np.isfinite(estimate.value)}
  return Result(estimates, items)


def _sums(value_E: np.ndarray, cluster_E: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
  """Sum [1, C] and number [C] of the values that count, in each cluster."""
  counts_E = ~np.isnan(value_E)
  sum_C, size_C = (np.bincount(cluster_E, weight_E, clusters) for weight_E in (np.nan_to_num(value_E), counts_E))
  return sum_C[None], size_C


class _MeansOfResamples(dict):
  """{item: mean [R]}, each computed when a formula first asks for it."""

  def __init__(self, sums: Mapping, count_RC: np.ndarray):
    super().__init__()
    self.sums, self.count_RC = sums, count_RC

  def __missing__(self, name: str) -> np.ndarray:
    self[name] = stats.cluster_ratio(self.count_RC, *self.sums[name])[:, 0]
    return self[name]


def _estimate(formula: Formula, sums: Mapping, clusters: int, how: Mapping) -> Estimate:
  def statistic(count_RC: np.ndarray) -> np.ndarray:
    return formula(_MeansOfResamples(sums, count_RC))[:, None]

  with np.errstate(invalid="ignore", divide="ignore"):
    found = stats.bootstrap_interval(statistic, (clusters,), **how)
  bounded = found.low is not None and np.isfinite([found.low, found.high]).all()
  return found if bounded else dataclasses.replace(found, low=None, high=None)
