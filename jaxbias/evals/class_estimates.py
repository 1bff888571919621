"""Neural collapse over a set of classes: every metric's mean over classes or pairs, its interval, and what is missing.

Of "Fairness-NC" (ICLR 2025) and "Linguistic collapse" (Wu & Papyan, arXiv 2405.17767) the code and what reviews say
were read, not the papers' equations. `cdnv_k2` and the uncentred kernels are as coded there; what ends in `_w` or
`_w_unit`, the "calibrated" statistics, is a reconstruction from the reviews: the variance of states over distances of
weights, and kernels of weights as they are or of length 1.

Axis letters: C classes, D features, R resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxbias.evals import class_geometry, stats
from jaxbias.evals.class_labels import Classes
from jaxbias.evals.class_statistics import Statistics
from jaxbias.evals.metrics import Benchmark, Estimate, Higher, Lower, Neutral, Result
from jaxbias.evals.tabulate import tabulate

BENCHMARK = Benchmark(
  name="neural_collapse",
  metrics={
    "cdnv": Lower(),  # NC1
    "cdnv_k2": Lower(),
    "trace_ratio": Lower(),
    "norm": Neutral(),  # NC2
    "norm_cov": Lower(),
    "log_sqnorm_std": Lower(),
    "interference": Lower(),
    "interference_std": Lower(),
    "log_kernel": Lower(),
    "log_kernel_std": Lower(),
    "log_kernel_uncentred": Lower(),
    "log_kernel_uncentred_std": Lower(),
    "log_riesz": Lower(),
    "log_riesz_uncentred": Lower(),
    "similarity": Higher(),  # NC3
    "similarity_std": Lower(),
    "similarity_cov": Neutral(),
    "similarity_centred": Higher(),
    "duality_distance": Lower(),
    "agreement": Higher("%"),  # NC4
    "cdnv_w": Lower(),  # reconstructions
    "cdnv_k2_w": Lower(),
    "log_kernel_w": Lower(),
    "log_kernel_w_unit": Lower(),
  },
  source="Papyan et al. 2020; Wu & Papyan 2024; Fairness-NC, ICLR 2025: code, and reconstructions", cluster="class")

OF_PAIRS = tuple(name for name in BENCHMARK.metrics if name.startswith(("cdnv", "interference", "log_kernel", "log_r")))
OF_WEIGHTS = tuple(name for name in BENCHMARK.metrics if name.startswith(("similarity", "duality")) or "_w" in name)
OF_VARIANCES = tuple(name for name in BENCHMARK.metrics if name.startswith(("cdnv", "trace")))
RESAMPLED = 4_000_000  # classes drawn at most in the resamples of an interval
LEAST_DRAWS, MOST_DRAWS = 200, 2000


def reduce(found: Statistics, weight_CD: np.ndarray | None, classes: Classes, *, compat: bool = False,
           **how) -> tuple[Result, dict[str, str]]:  # fmt: skip
  """Every metric over all classes ("overall") and over each group's, the gap of the first two groups, what is missing.

  A group's value of a pair statistic is over pairs of its classes with any class. Intervals draw classes: of pairs, by
  the means of each class's pairs (Hoeffding 1948), the others held fixed for a group.
  """
  C, D = found.mean.shape
  how = {"draws": min(MOST_DRAWS, max(LEAST_DRAWS, RESAMPLED // max(C, 1)))} | how
  fits = weight_CD is not None and weight_CD.shape[1] == D
  items = class_geometry.of_means(found.mean, found.variance) if C else {}
  items |= class_geometry.of_weights(found.mean, found.variance, weight_CD) if C and fits else {}
  if found.agreement is not None and found.agreement[0].sum():
    items |= dict(zip(("held", "agreed"), found.agreement.astype(np.float64), strict=True))
  items |= {f"{name}_square": items[name] ** 2 for name in ("log_sqnorm", "similarity") if name in items}
  metrics = BENCHMARK.metrics | ({"dual_dists": Neutral()} if compat else {})
  benchmark = dataclasses.replace(BENCHMARK, metrics=metrics)
  estimates, missing = {"overall": {}}, {}
  if C:
    estimates["overall"] = _of(benchmark, items, np.ones(C, bool), how)
  for group, member_C in classes.groups.items():
    if member_C.any():
      estimates[group] = _of(benchmark, items, member_C, how)
    else:
      missing[group] = "none of its words is a class that is seen often enough"
  named = [group for group in classes.groups if group in estimates][:2]
  if len(named) == 2:
    estimates[" - ".join(named)] = _gap(benchmark, items, [classes.groups[group] for group in named], how)
  lacking = [metric for metric in metrics if metric not in estimates["overall"]]
  missing |= {metric: _why(metric, found, weight_CD, fits) for metric in lacking}
  return Result(estimates, items), missing


def _why(metric: str, found: Statistics, weight_CD: np.ndarray | None, fits: bool) -> str:
  C, D = found.mean.shape
  if metric in (*OF_WEIGHTS, "agreement", "dual_dists") and not fits:
    return ("classes that are labels have no output weights" if weight_CD is None else
            f"the head reads {weight_CD.shape[1]} features and this site has {D}")  # fmt: skip
  if metric == "agreement":
    return "no text is held out, or none of them has a class's token"
  if C < 2:
    return "one class only; it is about several"
  if metric in OF_VARIANCES and np.isfinite(found.variance).sum() < 1 + (metric in OF_PAIRS):
    return "too few classes have two samples, which a variance needs"
  if C == 2 and metric.endswith("_std"):
    return "one pair of classes, which has no spread"
  return "not finite: two classes coincide, or a class's mean is that of all classes"


def _formulas(items: Mapping[str, np.ndarray], member_C: np.ndarray) -> dict[str, Callable]:
  """{metric: a function of {item: its mean over drawn classes}}."""
  whole = bool(member_C.all())
  number = {name: int(np.isfinite(value[member_C]).sum()) for name, value in items.items()}

  def std(name: str) -> Callable:
    return lambda mean: _std(mean[name], mean[f"{name}_square"], number[name])

  def of_pairs(name: str) -> Callable:
    """The mean over pairs; where both classes of a pair are drawn it moves twice as far as the mean over classes."""
    value = np.nanmean(items[name])
    return (lambda mean: value + 2 * (mean[name] - value)) if whole else (lambda mean: mean[name])

  def std_of_pairs(name: str) -> Callable:
    one, square, n = of_pairs(name), of_pairs(f"{name}_square"), number[name] * (number[name] - 1) // 2
    return lambda mean: _std(one(mean), square(mean), n)

  def log_of_pairs(name: str) -> Callable:
    top, drawn = items[name].max(), f"exp {name}"
    value = np.exp(items[name] - top).mean()
    return lambda mean: top + np.log(value + 2 * (mean[drawn] - value) if whole else mean[drawn])

  out = {"trace_ratio": lambda mean: mean["variance"] / mean["sqnorm"],
         "norm_cov": lambda mean: _std(mean["norm"], mean["sqnorm"], number["norm"]) / mean["norm"],
         "log_sqnorm_std": std("log_sqnorm")}  # fmt: skip
  if "similarity" in items:
    out |= {"similarity_std": std("similarity"),
            "similarity_cov": lambda mean: std("similarity")(mean) / np.abs(mean["similarity"])}  # fmt: skip
  if "agreed" in items:
    out["agreement"] = lambda mean: 100 * mean["agreed"] / mean["held"]
  for name in items.keys() & set(OF_PAIRS):
    out[name] = log_of_pairs(name) if name.startswith("log_riesz") else of_pairs(name)
    if whole:
      out[f"{name}_std"] = std_of_pairs(name)
  return {name: formula for name, formula in out.items() if name in BENCHMARK.metrics}


def _std(mean: np.ndarray, square: np.ndarray, n: int) -> np.ndarray:
  """Sample standard deviation of n values from their mean and that of their squares; NaN for one."""
  return np.sqrt(np.maximum(square - mean**2, 0.0) * (n / (n - 1))) if n > 1 else np.full_like(mean, np.nan)


def _weighed(items: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Items of which means are taken; those of a Riesz kernel as numbers instead of logarithms, the largest of them 1."""
  logs = [name for name in items if name.startswith("log_riesz")]
  return ({name: value for name, value in items.items() if name not in logs}
          | {f"exp {name}": np.exp(items[name] - items[name].max()) for name in logs})  # fmt: skip


def _of(benchmark: Benchmark, items: Mapping, member_C: np.ndarray, how: Mapping) -> dict[str, Estimate]:
  """Estimates over the classes in `member_C`."""
  clusters = [str(c) for c in range(len(member_C))]
  with np.errstate(invalid="ignore", divide="ignore"):
    found = tabulate(benchmark, _weighed(items), {"": member_C}, clusters, _formulas(items, member_C), **how)
  return found.estimates[""]


def _gap(benchmark: Benchmark, items: Mapping, members: Sequence[np.ndarray], how: Mapping) -> dict[str, Estimate]:
  """First group less second, every metric that both have; classes are drawn in each."""
  values = _weighed(items)

  def of(member_C: np.ndarray) -> dict[str, Callable]:
    formulas = {name: lambda mean, name=name: mean[name] for name in values} | _formulas(items, member_C)
    mine = {name: value[member_C] for name, value in values.items()}

    def mean(count_RC: np.ndarray) -> dict[str, np.ndarray]:
      return {name: stats.cluster_ratio(count_RC, np.nan_to_num(value)[None], np.isfinite(value))[:, 0]
              for name, value in mine.items()}  # fmt: skip

    return {name: lambda count_RC, f=formulas[name]: f(mean(count_RC))[:, None]
            for name in benchmark.metrics if name in formulas}  # fmt: skip

  with np.errstate(invalid="ignore", divide="ignore"):
    first, second = map(of, members)
    found = {name: stats.bootstrap_interval(lambda a, b, name=name: first[name](a) - second[name](b),
                                            [int(member.sum()) for member in members], **how)
             for name in first.keys() & second.keys()}  # fmt: skip
  return {name: found[name] for name in benchmark.metrics if name in found and np.isfinite(found[name].value)}
