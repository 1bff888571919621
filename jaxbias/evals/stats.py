"""Bootstrap intervals over clusters: examples about one target term are not independent, so whole terms are drawn.

Axis letters: M trained models (one a seed), E examples, C clusters, R resamples, H hypotheses.

An interval here says how far the value would move with other terms of the same kind. It does not cover the noise
between training seeds: a mean over M models is resampled with these M models held fixed, and `Estimate.per_seed` gives
their values to be shown beside it. With few clusters (three religions) a percentile interval is too narrow.

Two models on the same items are compared by the items' differences: `mean_over_examples` of them for the interval,
`sign_flips` for the p-value, `holm` for a table of p-values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxbias.evals.metrics import Estimate

BLOCK = 2**25  # draws of one population of clusters that are held at a time


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
  Where a population has only one cluster there is no interval, nor where a resample has no value (it drew none of the
  few clusters that the statistic is about).
  """
  per_seed = statistic(*(np.ones((1, size)) for size in clusters))[0]
  low = high = None
  if min(clusters) > 1:
    value_R = np.concatenate([statistic(*counts).mean(1) for counts in _resamples(clusters, draws, seed)])
    if np.isfinite(value_R).all():
      low, high = map(float, np.quantile(value_R, [(1 - level) / 2, (1 + level) / 2]))
  return Estimate(float(per_seed.mean()), low, high, tuple(map(float, per_seed)))


def _resamples(clusters: Sequence[int], draws: int, seed: int) -> Iterator[list[np.ndarray]]:
  """Resamples of each population; of a single large one a block after the other, the same ones in less memory."""
  rng = np.random.default_rng(seed)
  each = max(1, BLOCK // clusters[0]) if len(clusters) == 1 else draws
  for start in range(0, draws, each):
    yield [resample(size, min(each, draws - start), rng) for size in clusters]


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


def mean_over_examples(value_ME: np.ndarray, cluster: Sequence[str], **how) -> Estimate:
  """The plain mean over examples, [E] or [M, E], with the interval from whole clusters."""
  return ratio_over_clusters(*by_cluster(np.atleast_2d(value_ME), cluster), **how)


def tie_rate(one_E: np.ndarray, other_E: np.ndarray, atol: float = 0.0) -> float:
  """The share of items on which two scores are within `atol`; low precision makes ties."""
  return float(np.mean(np.abs(np.asarray(one_E) - np.asarray(other_E)) <= atol))


def sign_flips(difference_C: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> float:
  """Two-sided p-value of a paired permutation test (Fisher 1935): that the clusters' differences are symmetric about 0.

  `difference_C` is one model minus the other on each cluster, summed (`by_cluster`: tests the mean over examples) or
  averaged (the mean over clusters). Signs are flipped cluster by cluster; the statistic is |sum|, ties count. Exact
  where there are no more sign patterns than `draws`, else from random ones, of which the observed one is counted as
  one more (Phipson & Smyth 2010), so that the level holds. With C clusters p is no less than 2 / 2^C.
  """
  difference_C = np.asarray(difference_C, np.float64)
  clusters = len(difference_C)
  exact = clusters <= np.log2(draws)
  if exact:
    blocks = [np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1]
  else:  # a few at a time, to stay small in memory
    rng = np.random.default_rng(seed)
    blocks = (rng.integers(2, size=(min(500, draws - start), clusters)) for start in range(0, draws, 500))
  total, slack = difference_C.sum(), 1e-12 * np.abs(difference_C).sum()  # other orders differ in the last digits
  sum_R = np.concatenate([total - 2.0 * (flip_RC @ difference_C) for flip_RC in blocks])
  hits = np.sum(np.abs(sum_R) >= np.abs(total) - slack)
  return float(hits / len(sum_R) if exact else (hits + 1) / (draws + 1))


def holm(p_H: Sequence[float]) -> np.ndarray:
  """Holm's step-down adjusted p-values (Holm 1979), in the order given: those below a level hold it family-wise."""
  p_H = np.asarray(p_H, np.float64)
  order_H = np.argsort(p_H, kind="stable")
  adjusted_H = np.empty_like(p_H)
  adjusted_H[order_H] = np.minimum(1.0, np.maximum.accumulate(p_H[order_H] * np.arange(len(p_H), 0, -1)))
  return adjusted_H


def paired(one_E: np.ndarray, other_E: np.ndarray, cluster: Sequence[str], *, draws: int = 10_000, seed: int = 0,
           level: float = 0.95) -> tuple[Estimate, float]:
  """One model against another on the same examples: the mean difference, `one` - `other`, and its p-value.

  The interval draws whole clusters, the p-value flips their signs.
  """
  one_E, other_E = np.asarray(one_E, np.float64), np.asarray(other_E, np.float64)
  if one_E.shape != other_E.shape:
    raise ValueError(f"items of shapes {one_E.shape} and {other_E.shape} are no pairs")
  sum_1C, size_C = by_cluster(one_E[None] - other_E, cluster)
  estimate = ratio_over_clusters(sum_1C, size_C, draws=draws, seed=seed, level=level)
  return estimate, sign_flips(sum_1C[0], draws=draws, seed=seed)
