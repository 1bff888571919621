"""Bootstrap intervals over clusters: examples about one target term are not independent, so whole terms are drawn.

Axis letters: M trained models (one a seed), E examples, C clusters, R resamples.

An interval here says how far the value would move with other terms of the same kind. It does not cover the noise
between training seeds: a mean over M models is resampled with these M models held fixed, and `Estimate.per_seed` gives
their values to be shown beside it. With few clusters (three religions) a percentile interval is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxbias.evals.metrics import Estimate


def resample(clusters: int, draws: int, rng: np.random.Generator) -> np.ndarray:
  """Draws `clusters` clusters with replacement, `draws` times; how often each one came up, float64 [R, C]."""
  drawn_RC = rng.integers(clusters, size=(draws, clusters)) + clusters * np.arange(draws)[:, None]
  return np.bincount(drawn_RC.ravel(), minlength=draws * clusters).reshape(draws, clusters).astype(np.float64)


def bootstrap_interval(statistic: Callable[..., np.ndarray], clusters: Sequence[int], *, draws: int = 2000,
                       level: float = 0.95, seed: int = 0) -> Estimate:
  """Bootstrap percentile interval (Efron & Tibshirani 1993, ch. 13) of the mean over models of `statistic`.

  `clusters` are the sizes of one or more independent populations of clusters (terms; terms and texts). `statistic`
  takes for each of them how often every cluster counts, [R, C], and returns its value for each model, [R, M]. Once
  each gives the value itself. The same sizes and seed give the same resamples, so all rows of a table share them.
  Where a population has only one cluster there is no interval.
  """
  per_seed = statistic(*(np.ones((1, size)) for size in clusters))[0]
  low = high = None
  if min(clusters) > 1:
    rng = np.random.default_rng(seed)
    value_R = statistic(*(resample(size, draws, rng) for size in clusters)).mean(1)
    low, high = map(float, np.quantile(value_R, [(1 - level) / 2, (1 + level) / 2]))
  return Estimate(float(per_seed.mean()), low, high, tuple(map(float, per_seed)))


def cluster_mean(count_RC: np.ndarray, value_MC: np.ndarray) -> np.ndarray:
  """Plain mean of one value a cluster, in each resample and model: [R, M]."""
  return count_RC @ value_MC.T / count_RC.sum(1, keepdims=True)


def cluster_ratio(count_RC: np.ndarray, sum_MC: np.ndarray, weight_C: np.ndarray) -> np.ndarray:
  """Sum over weight, both added up over the drawn clusters: [R, M]. With sizes as weights, the mean over examples."""
  return count_RC @ sum_MC.T / (count_RC @ weight_C)[:, None]


def mean_over_clusters(value_MC: np.ndarray, **how) -> Estimate:
  """The plain mean over clusters, [C] or [M, C], with its interval."""
  value_MC = np.atleast_2d(value_MC)
  return bootstrap_interval(lambda count_RC: cluster_mean(count_RC, value_MC), value_MC.shape[1:], **how)


def ratio_over_clusters(sum_MC: np.ndarray, weight_C: np.ndarray, **how) -> Estimate:
  """Sums over weights, [C] or [M, C] over [C], with the interval."""
  sum_MC = np.atleast_2d(sum_MC)
  return bootstrap_interval(lambda count_RC: cluster_ratio(count_RC, sum_MC, weight_C), weight_C.shape, **how)


def by_cluster(value_ME: np.ndarray, cluster: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Adds up examples by their cluster's name: sums [M, C] and sizes [C], clusters in the order of their names."""
  _, cluster_E, size_C = np.unique(np.asarray(cluster), return_inverse=True, return_counts=True)
  sum_MC = np.stack([np.bincount(cluster_E, value_E, minlength=len(size_C)) for value_E in value_ME])
  return sum_MC, size_C.astype(np.float64)
