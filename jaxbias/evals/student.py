"""Student's t distribution for whole degrees of freedom, in closed form (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).

Its sums are exact, and with them the project needs no statistics library of its own.
"""

from __future__ import annotations

import math


def t_cdf(t: float, freedom: int) -> float:
  """P(T <= t). Raises ValueError for fewer than one degree of freedom."""
  if freedom < 1:
    raise ValueError(f"{freedom} degrees of freedom; at least one is needed")
  theta = math.atan2(t, math.sqrt(freedom))
  sine, cosine = math.sin(theta), math.cos(theta)
  term, total, odd = 1.0, 1.0, freedom % 2
  for k in range(1, (freedom - odd) // 2):
    term *= cosine**2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    total += term
  if odd:
    within = 2 / math.pi * (theta + (sine * cosine * total if freedom > 1 else 0.0))
  else:
    within = sine * total
  return 0.5 * (1.0 + within)


def t_quantile(p: float, freedom: int) -> float:
  """The t with P(T <= t) = p, by bisection. Raises ValueError unless 0 < p < 1."""
  if not 0 < p < 1:
    raise ValueError(f"p = {p} is not between 0 and 1")
  if p < 0.5:
    return -t_quantile(1 - p, freedom)
  low, high = 0.0, 1.0
  while t_cdf(high, freedom) < p:
    high *= 2
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
  return (low + high) / 2
