"""Neural collapse from class means, variances and weights: one value a class of each statistic.

NC1 to NC4 of Papyan, Han & Donoho 2020, as "Fairness-NC" (ICLR 2025) and "Linguistic collapse" (arXiv 2405.17767) use
them over token classes. mu_G is the plain mean of the class means; m = mu - mu_G, u = m / |m|, v^ = v / |v|. Published
code adds EPS to norms, which is kept; weights are never centred there, but in `similarity_centred`.

What pairs of classes have is given by class, as the mean over its pairs: that of all is their mean. Interference has a
closed form; the others are summed in tiles, so that no [C, C] array exists.

Axis letters: C classes, D features; M, N classes of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.losses.collapse import EPS

TILE = 1024

Items = dict[str, np.ndarray]  # float64 [C] each, NaN where a class does not count


def unit(x_CD: np.ndarray) -> np.ndarray:
  return x_CD / (np.linalg.norm(x_CD, axis=-1, keepdims=True) + EPS)


# Pairs of classes


KERNELS = {  # of a squared distance, the half sum of spreads, and Riesz' power; of `log_riesz` the logarithm
  "cdnv": lambda square, spread, power: spread / square,
  "cdnv_k2": lambda square, spread, power: spread / square**2,
  "log_kernel": lambda square, spread, power: -0.5 * jnp.log(square),
  "log_riesz": lambda square, spread, power: -0.5 * power * jnp.log(square),
}


@functools.partial(jax.jit, static_argnames="kernels")
def _tile(a_MD, b_ND, spread_M, spread_N, first_M, first_N, count, power, pivots, kernels: tuple[str, ...]):
  """{kernel: (of rows: sum of K - pivot, of its square, of columns: the same)} over pairs i < j < count; of `log_riesz`
  the logarithms of the sums of K and of K^2."""
  row_M, column_N = first_M + jnp.arange(len(a_MD)), first_N + jnp.arange(len(b_ND))
  pair = (row_M[:, None] < column_N) & (column_N < count)
  dot = jnp.matmul(a_MD, b_ND.T, precision=jax.lax.Precision.HIGHEST)
  sizes = (a_MD**2).sum(-1)[:, None] + (b_ND**2).sum(-1)
  square = jnp.where(sizes - 2 * dot > 4 * EPS * sizes, sizes - 2 * dot, 0.0)  # less is rounding: they coincide
  out = {}
  for kernel in kernels:
    value = KERNELS[kernel](square, 0.5 * (spread_M[:, None] + spread_N), power)
    if kernel == "log_riesz":
      value = jnp.where(pair, value, -jnp.inf)
      powers, total = (value, 2 * value), jax.nn.logsumexp
    else:
      value = jnp.where(pair, value - pivots[kernel], 0.0)
      powers, total = (value, value**2), jnp.sum
    out[kernel] = tuple(total(each, axis=axis) for axis in (1, 0) for each in powers)
  return out


def pairs(x_CD: np.ndarray, spread_C: np.ndarray | None, kernels: tuple[str, ...], power: float = 0.0,
          name: str = "") -> Items:  # fmt: skip
  """{kernel: mean over a class's pairs of K, kernel_square: of K^2}, [C]; of `log_riesz` the logarithms of these means.

  With d = |x_i - x_j|: cdnv: (s_i + s_j) / (2 d^2); cdnv_k2: / (2 d^4); log_kernel: -log d; log_riesz: d^-power. Their
  names end in `name`. Not finite where two classes coincide.
  """
  C, size = len(x_CD), min(TILE, 1 << max(0, len(x_CD) - 1).bit_length())
  x_CD, pad = x_CD - x_CD.mean(0), -C % size  # centred and, below, counted from a pivot: digits are kept
  spread_C = np.zeros(C) if spread_C is None else spread_C
  one = ((x_CD[0] - x_CD[1]) ** 2).sum(), spread_C[:2].mean(), power
  pivots = {kernel: _finite(float(KERNELS[kernel](*map(jnp.float32, one)))) for kernel in kernels}
  x = jnp.asarray(np.pad(x_CD, ((0, pad), (0, 0))), jnp.float32)
  spread = jnp.asarray(np.pad(spread_C, (0, pad)), jnp.float32)
  of = {kernel: np.full((2, C + pad), -np.inf if kernel == "log_riesz" else 0.0) for kernel in kernels}
  for i in range(0, C, size):
    for j in range(i, C, size):
      rows, columns = np.s_[i : i + size], np.s_[j : j + size]
      found = jax.device_get(_tile(x[rows], x[columns], spread[rows], spread[columns], i, j, C, power, pivots, kernels))
      for kernel, (row, row2, column, column2) in found.items():
        join = np.logaddexp if kernel == "log_riesz" else np.add
        for n, at, value in ((0, rows, row), (1, rows, row2), (0, columns, column), (1, columns, column2)):
          of[kernel][n, at] = join(of[kernel][n, at], value.astype(np.float64))
  out = {}
  for kernel, sums in of.items():
    if kernel == "log_riesz":
      out[f"{kernel}{name}"], out[f"{kernel}{name}_square"] = sums[:, :C] - np.log(C - 1)
    else:
      (first, second), p = sums[:, :C] / (C - 1), pivots[kernel]
      with np.errstate(invalid="ignore"):  # of classes that coincide
        out[f"{kernel}{name}"], out[f"{kernel}{name}_square"] = first + p, second + 2 * p * first + p * p
  return out


def _finite(value: float) -> float:
  return value if np.isfinite(value) else 0.0


def interference(m_CD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means over j of u_i . u_j and of its square, in closed form: u_i . sum_j u_j and u_i' (sum_j u_j u_j') u_i."""
  u_CD, others = unit(m_CD), len(m_CD) - 1
  own_C = (u_CD**2).sum(-1)
  return (u_CD @ u_CD.sum(0) - own_C) / others, (((u_CD @ (u_CD.T @ u_CD)) * u_CD).sum(-1) - own_C**2) / others


# What each class has


def of_means(mean_CD: np.ndarray, variance_C: np.ndarray) -> Items:
  """NC1 and NC2. Of pairs (`cdnv`, `interference`, kernels) the mean over a class's pairs, and `_square` of squares."""
  C, D = mean_CD.shape
  m_CD = mean_CD - mean_CD.mean(0)
  square_C = (m_CD**2).sum(-1)
  with np.errstate(divide="ignore"):
    items = {"variance": variance_C, "sqnorm": square_C, "norm": np.sqrt(square_C), "log_sqnorm": np.log(square_C)}
  if C < 2:
    return items
  items["interference"], items["interference_square"] = interference(m_CD)
  for name, points in (("", m_CD), ("_uncentred", mean_CD)):
    items |= pairs(unit(points), None, ("log_kernel", "log_riesz"), D - 2, name)
  return items | _with_variance(mean_CD, variance_C, "")


def of_weights(mean_CD: np.ndarray, variance_C: np.ndarray, weight_CD: np.ndarray) -> Items:
  """NC3, and the calibrated NC1 and NC2, which are reconstructions: no code of them was published."""
  u_CD, w_CD = unit(mean_CD - mean_CD.mean(0)), unit(weight_CD)
  items = {
    "similarity": (u_CD * w_CD).sum(-1),
    "similarity_centred": (u_CD * unit(weight_CD - weight_CD.mean(0))).sum(-1),
    "duality_distance": np.linalg.norm(u_CD - w_CD, axis=-1),
    "dual_dists": unit(w_CD - u_CD).sum(-1),  # as published: a sum of coordinates, and no distance
  }
  if len(mean_CD) < 2:
    return items
  for name, points in (("_w", weight_CD), ("_w_unit", w_CD)):
    items |= pairs(points, None, ("log_kernel",), name=name)
  return items | _with_variance(weight_CD, variance_C, "_w")


def _with_variance(x_CD: np.ndarray, variance_C: np.ndarray, name: str) -> Items:
  """CDNV among the classes that have a variance; NaN for the others."""
  known = np.isfinite(variance_C)
  if known.sum() < 2:
    return {}
  items = {}
  for key, value in pairs(x_CD[known], variance_C[known], ("cdnv", "cdnv_k2"), name=name).items():
    items[key] = np.full(len(x_CD), np.nan)
    items[key][known] = value
  return items
