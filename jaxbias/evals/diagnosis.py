"""What forgetting has to do with fairness and performance: statistics over the checkpoints of many runs.

A table is a list of rows, one a checkpoint: {"model", "objective", "remedy", "n", "seed", "step", column: number}. What
could not be measured is None, and `row["missing"][column]` says why; no statistic guesses it. A run is one training,
`run_of(row)`; its checkpoints drift together and are never taken for independent: intervals draw whole runs.

Claims and definitions: Liu et al. 2025, arXiv 2509.21456, as reconstructed in docs/diagnosis.md; statistics: ours.

Axis letters: N rows, C runs, R resamples, K variables (x, y, then what is held fixed).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbias.evals.metrics import Estimate
from jaxbias.evals.stats import resample
from jaxbias.evals.student import t_cdf, t_quantile

Row = Mapping[str, Any]
RUN = ("model", "objective", "remedy", "n", "seed")  # what tells runs apart
SMALLEST = 3  # points, or runs, below which nothing is said
ZERO = 1e-12  # of a variable's square: below it, a variance is rounding


def run_of(row: Row) -> tuple:
  return tuple(row[key] for key in RUN)


def runs(table: Iterable[Row]) -> dict[tuple, list[Row]]:
  """The rows of each run, by step."""
  found: dict[tuple, list[Row]] = {}
  for row in sorted(table, key=lambda row: row["step"]):
    found.setdefault(run_of(row), []).append(row)
  return found


def where(table: Iterable[Row], **wanted: Any) -> list[Row]:
  return [row for row in table if all(row[key] == value for key, value in wanted.items())]


def complete(table: Iterable[Row], columns: Sequence[str]) -> list[Row]:
  return [row for row in table if all(row.get(column) is not None for column in columns)]


def why_missing(table: Sequence[Row], columns: Sequence[str]) -> str:
  """Why rows lack a column, each reason once with how many rows it holds for."""
  reasons = [f"{column}: {row.get('missing', {}).get(column, 'not measured')}" for row in table for column in columns
             if row.get(column) is None]  # fmt: skip
  return "; ".join(f"{reason} ({reasons.count(reason)} rows)" for reason in dict.fromkeys(reasons))


# Correlations.


@dataclasses.dataclass(frozen=True)
class Correlation:
  """`estimate` is None where there is none, and `reason` says why; with it, `reason` says what was left out."""

  x: str
  y: str
  given: tuple[str, ...]
  kind: str  # "pearson" or "spearman"
  estimate: Estimate | None
  points: int
  runs: int
  reason: str = ""


def correlate(table: Sequence[Row], x: str, y: str, given: Sequence[str] = (), kind: str = "pearson", *,
              draws: int = 2000, seed: int = 0, level: float = 0.95) -> Correlation:  # fmt: skip
  """(Partial) correlation of two columns within models, with a percentile interval from whole runs.

  Every model's means are taken off (with "spearman" of its mid-ranks), so that a difference between models is no
  correlation (Simpson's paradox); `given` columns are regressed out of both. Runs are drawn within their model.
  """
  columns = (x, y, *given)
  rows = complete(table, columns)
  names = list(dict.fromkeys(map(run_of, rows)))
  told = Correlation(x, y, tuple(given), kind, None, len(rows), len(names), why_missing(table, columns))
  if len(rows) < SMALLEST + len(given):
    return dataclasses.replace(told, reason=_and(f"{len(rows)} points are too few", told.reason))
  value_KN = np.array([[row[column] for row in rows] for column in columns], np.float64)
  run_N = np.array([names.index(run_of(row)) for row in rows])
  model_N = np.unique([str(row["model"]) for row in rows], return_inverse=True)[1]
  value = weighted_correlation(value_KN, np.ones((1, len(rows))), model_N, kind)[0]
  if np.isnan(value):
    return dataclasses.replace(told, reason=_and("a column does not vary, beyond what is held fixed", told.reason))
  low = high = None
  if len(names) >= SMALLEST:
    model_of_C = np.array([model_N[run_N == c][0] for c in range(len(names))])
    rng = np.random.default_rng(seed)
    count_RC = np.zeros((draws, len(names)))
    for model in np.unique(model_of_C):
      count_RC[:, model_of_C == model] = resample(int((model_of_C == model).sum()), draws, rng)
    value_R = weighted_correlation(value_KN, count_RC[:, run_N], model_N, kind)
    value_R = value_R[~np.isnan(value_R)]
    if len(value_R) >= draws / 2:
      low, high = map(float, np.quantile(value_R, [(1 - level) / 2, (1 + level) / 2]))
  else:
    told = dataclasses.replace(told, reason=_and(f"no interval from {len(names)} runs", told.reason))
  return dataclasses.replace(told, estimate=Estimate(float(value), low, high, ()))


def _and(*reasons: str) -> str:
  return "; ".join(filter(None, reasons))


def weighted_correlation(value_KN: np.ndarray, weight_RN: np.ndarray, model_N: np.ndarray, kind: str) -> np.ndarray:
  """Of the first two variables with the others regressed out, within models, in each resample [R]; NaN where a
  variable has nothing left."""
  value_RKN = np.broadcast_to(value_KN, (len(weight_RN), *value_KN.shape))
  if kind == "spearman":
    value_RKN = np.stack([mid_ranks(value_N, weight_RN, model_N) for value_N in value_KN], axis=1)
  of_model_MN = (model_N == np.unique(model_N)[:, None]).astype(np.float64)
  weight_RM = np.maximum(weight_RN @ of_model_MN.T, 1e-300)
  mean_RKM = np.einsum("rkn,rn,mn->rkm", value_RKN, weight_RN, of_model_MN) / weight_RM[:, None]
  centred_RKN = value_RKN - mean_RKM @ of_model_MN
  cov_RKK = np.einsum("rkn,rn,rln->rkl", centred_RKN, weight_RN, centred_RKN)
  scale_RK = np.sqrt(np.maximum(np.einsum("rkn,rn->rk", value_RKN**2, weight_RN), 1e-300))
  cov_RKK = cov_RKK / scale_RK[:, :, None] / scale_RK[:, None, :]
  both_R22, cross_R2Z = cov_RKK[:, :2, :2], cov_RKK[:, :2, 2:]
  left_R22 = both_R22 - cross_R2Z @ np.linalg.pinv(cov_RKK[:, 2:, 2:]) @ np.swapaxes(cross_R2Z, 1, 2)
  xx_R, yy_R = left_R22[:, 0, 0], left_R22[:, 1, 1]
  varies_R = (xx_R > ZERO) & (yy_R > ZERO)
  product_R = np.sqrt(np.where(varies_R, xx_R * yy_R, 1.0))
  return np.where(varies_R, np.clip(left_R22[:, 0, 1] / product_R, -1.0, 1.0), np.nan)


def mid_ranks(value_N: np.ndarray, weight_RN: np.ndarray, model_N: np.ndarray) -> np.ndarray:
  """Ranks within a row's model, each row counted as often as its weight, ties at their middle: [R, N]."""
  same_NN = model_N[:, None] == model_N
  below_NN, tied_NN = same_NN & (value_N < value_N[:, None]), same_NN & (value_N == value_N[:, None])
  return weight_RN @ below_NN.T.astype(np.float64) + 0.5 * (weight_RN @ tied_NN.T.astype(np.float64) + 1.0)


def smallest_spearman_p(points: int) -> float:
  """The least two-sided p-value that a rank correlation of so many points without ties can have: 2 / points!."""
  return min(1.0, 2.0 / math.factorial(points))


def runs_needed(r: float, level: float = 0.05) -> int:
  """The fewest independent points at which a correlation of size r is significant, two-sided, by Student's t."""
  if not 0 < abs(r) < 1:
    raise ValueError(f"r = {r} is not between 0 and 1 in size")
  t = lambda n: abs(r) * math.sqrt((n - 2) / (1 - r * r))
  return next(n for n in itertools.count(3) if 2 * t_cdf(-t(n), n - 2) < level)


# Remedies at the same bias.


@dataclasses.dataclass(frozen=True)
class Tost:
  """Two one-sided t-tests (Schuirmann 1987) of a paired difference: `p` that it lies outside +-margin."""

  mean: float
  low: float  # 90 % interval, which lies inside the margin exactly where p < 0.05
  high: float
  p: float
  p_zero: float  # two-sided, that the difference is 0
  pairs: int
  margin: float

  @property
  def verdict(self) -> str:
    """Not to have found a difference is no equivalence."""
    equivalent, different = self.p < 0.05, self.p_zero < 0.05
    return {(True, True): "different, within the margin", (True, False): "equivalent", (False, True): "different",
            (False, False): "undecided"}[equivalent, different]  # fmt: skip


def tost(difference_N: Sequence[float], margin: float) -> Tost | None:
  """None with fewer than two pairs. Raises ValueError for a margin that is not positive."""
  if margin <= 0:
    raise ValueError(f"margin = {margin}; an equivalence needs one above 0")
  value_N = np.asarray(difference_N, np.float64)
  N = len(value_N)
  if N < 2:
    return None
  mean, error = float(value_N.mean()), float(value_N.std(ddof=1)) / math.sqrt(N)
  error = max(error, ZERO * max(abs(mean), margin))  # the same difference in every pair
  p = max(1 - t_cdf((mean + margin) / error, N - 1), t_cdf((mean - margin) / error, N - 1))
  reach = t_quantile(0.95, N - 1) * error
  return Tost(mean, mean - reach, mean + reach, p, 2 * t_cdf(-abs(mean) / error, N - 1), N, margin)


def at_bias(run: Sequence[Row], bias: str, level: float, columns: Sequence[str]) -> dict[str, Any]:
  """The columns where a run's bias first comes down to `level`, by linear interpolation between its checkpoints.

  The rows are one run's by step, the start model first. A column goes by the checkpoints that have it, perhaps the
  first and the last alone. A run that does not come down has None everywhere, and "reason" says how far it came.
  """
  found = {column: _crossing(complete(run, (bias, column)), bias, level, column) for column in (*columns, "step")}
  rows = complete(run, (bias,))
  if found["step"] is not None:
    return found | {"reason": ""}
  nothing = dict.fromkeys(found)
  if not rows:
    return nothing | {"reason": f"{bias} was not measured"}
  if rows[0][bias] <= level:
    return nothing | {"reason": f"{bias} is {rows[0][bias]:.3g} before training, not above {level:g}"}
  return nothing | {"reason": f"{bias} came down to {min(row[bias] for row in rows):.3g}, not to {level:g}"}


def _crossing(rows: Sequence[Row], bias: str, level: float, column: str) -> float | None:
  for before, after in itertools.pairwise(rows):
    if before[bias] > level >= after[bias]:
      share = (before[bias] - level) / (before[bias] - after[bias])
      return before[column] + share * (after[column] - before[column])
  return None


@dataclasses.dataclass(frozen=True)
class Matched:
  """One remedy against none at the same bias, paired over seeds; `test` is None where fewer than two pairs are left."""

  model: str
  objective: str
  remedy: str
  n: int
  column: str
  test: Tost | None
  reason: str


def matched(table: Sequence[Row], bias: str, level: float, margins: Mapping[str, float], none: str = "none"
            ) -> list[Matched]:  # fmt: skip
  """Each remedy minus `none` in the columns of `margins`, at bias `level`, in runs of the same model, objective, n and
  seed. Raises ValueError for a margin that is not positive."""
  points = {key: at_bias(run, bias, level, tuple(margins)) for key, run in runs(table).items()}
  found = []
  for model, objective, remedy, n in dict.fromkeys(key[:4] for key in points):
    seeds = [key[4] for key in points if key[:4] == (model, objective, remedy, n)]
    if remedy == none:
      continue
    for column, margin in margins.items():
      pairs, reasons = [], []
      for seed in seeds:
        one, other = (points.get((model, objective, r, n, seed)) for r in (remedy, none))
        if other is None:
          reasons.append(f"seed {seed}: no run without a remedy")
        elif None in (one[column], other[column]):
          side, at = (remedy, one) if one[column] is None else (none, other)
          reasons.append(f"seed {seed}, {side}: {at['reason'] or f'{column} is missing there'}")
        else:
          pairs.append(one[column] - other[column])
      found.append(Matched(model, objective, remedy, n, column, tost(pairs, margin), _and(*reasons)))
  return found


# Along runs, over the grid, over sizes.


@dataclasses.dataclass(frozen=True)
class Slope:
  run: tuple
  slope: float | None  # least squares of y on x over the run's checkpoints
  points: int
  reason: str = ""


def slopes(table: Sequence[Row], x: str, y: str) -> list[Slope]:
  """Of y on x along each run."""
  found = []
  for key, rows in runs(table).items():
    kept = complete(rows, (x, y))
    x_N, y_N = (np.array([row[column] for row in kept], np.float64) for column in (x, y))
    dx_N = x_N - x_N.mean() if len(kept) else x_N
    total, size = float(dx_N @ dx_N), float(x_N @ x_N)
    if len(kept) < 2 or total <= ZERO * size:
      reason = _and("fewer than two points" if len(kept) < 2 else f"{x} does not vary", why_missing(rows, (x, y)))
      found.append(Slope(key, None, len(kept), reason))
    else:
      found.append(Slope(key, float(dx_N @ y_N) / total, len(kept), why_missing(rows, (x, y))))
  return found


def noise(table: Sequence[Row], column: str, share: float = 0.95) -> float | None:
  """The `share` quantile of |difference| of a column between seeds of the same run at the same step; None where no two
  seeds meet. With null runs it is how far two runs that differ in nothing but their seed are apart."""
  groups: dict[tuple, list[float]] = {}
  for row in complete(table, (column,)):
    if row["step"] > 0:
      groups.setdefault((*run_of(row)[:4], row["step"]), []).append(row[column])
  apart = [abs(a - b) for values in groups.values() for a, b in itertools.combinations(values, 2)]
  return float(np.quantile(apart, share)) if apart else None


def free_share(table: Sequence[Row], delta: float, tolerance: float, selective: str = "f_sel", overall: str = "f_all"
               ) -> tuple[int, int, int]:  # fmt: skip
  """Trained points with selective forgetting above `delta`; those of them whose overall forgetting is within
  `tolerance`; and all trained points."""
  rows = [row for row in complete(table, (selective, overall)) if row["step"] > 0]
  chosen = [row for row in rows if row[selective] > delta]
  return len(chosen), sum(row[overall] <= tolerance for row in chosen), len(rows)


@dataclasses.dataclass(frozen=True)
class Enough:
  """`n` is None where no size suffices or none was measured; `by_n` are the mean biases at the last step."""

  model: str
  objective: str
  n: int | None
  by_n: Mapping[int, float]
  reason: str


def smallest_n(table: Sequence[Row], bias: str, target: float) -> list[Enough]:
  """The smallest data size whose bias at the end, a mean over seeds, is at most `target`, for each objective."""
  found = []
  for model, objective in dict.fromkeys((row["model"], row["objective"]) for row in table):
    rows = where(table, model=model, objective=objective)
    ends = [run[-1] for run in runs(rows).values()]
    biases: dict[int, list[float]] = {}
    for row in complete(ends, (bias,)):
      biases.setdefault(row["n"], []).append(row[bias])
    by_n = {n: float(np.mean(biases[n])) for n in sorted(biases)}
    n = next((n for n, value in by_n.items() if value <= target), None)
    reason = why_missing(ends, (bias,))
    if n is None and by_n:
      best = min(by_n, key=by_n.get)
      reason = _and(f"the least is {by_n[best]:.3g}, with n = {best}", reason)
    found.append(Enough(model, objective, n, by_n, reason))
  return found


def paired_ends(table: Sequence[Row], column: str, one: str, other: str, level: float = 0.95
                ) -> tuple[Estimate | None, int]:  # fmt: skip
  """The column at the end of objective `one` minus that of `other`, over runs that agree in all else: mean, Student's
  interval, and how many pairs; None without a pair."""
  ends = {key: run[-1].get(column) for key, run in runs(table).items()}
  twin = lambda key: (key[0], other, *key[2:])
  difference = [value - ends[twin(key)] for key, value in ends.items()
                if key[1] == one and value is not None and ends.get(twin(key)) is not None]  # fmt: skip
  N = len(difference)
  if N < 2:
    return (Estimate(difference[0], None, None, tuple(difference)) if N else None), N
  mean, error = float(np.mean(difference)), float(np.std(difference, ddof=1)) / math.sqrt(N)
  reach = t_quantile((1 + level) / 2, N - 1) * error
  return Estimate(mean, mean - reach, mean + reach, tuple(difference)), N
