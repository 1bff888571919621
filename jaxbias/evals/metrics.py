"""What a benchmark says about itself, what scores look like on the way in, and estimates on the way out. NumPy only.

Axis letters: E examples, O options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxbias.errors import UserError

Scores = Mapping[str, Sequence[Sequence[float]]]
"""What the scorer writes: id -> [summed log-probability (nats), tokens] for each option."""


@dataclasses.dataclass(frozen=True)
class Ideal:
  """The nearer to `ideal`, the better."""

  ideal: float
  unit: str = ""
  better: ClassVar[str] = "ideal"


@dataclasses.dataclass(frozen=True)
class Higher:
  unit: str = ""
  better: ClassVar[str] = "higher"


@dataclasses.dataclass(frozen=True)
class Lower:
  unit: str = ""
  better: ClassVar[str] = "lower"


@dataclasses.dataclass(frozen=True)
class Neutral:
  """Neither way is better by itself; another metric says how much is enough."""

  unit: str = ""
  better: ClassVar[str] = "none"


Direction = Ideal | Higher | Lower | Neutral


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """`metrics` says which way each metric is better; `cluster` is what the bootstrap draws."""

  name: str
  metrics: Mapping[str, Direction]
  source: str
  cluster: str

  def describe(self) -> dict[str, dict[str, Any]]:
    """{metric: {"better", "unit", and where there is one "ideal"}}, ready for JSON."""
    return {name: {"better": direction.better} | dataclasses.asdict(direction)
            for name, direction in self.metrics.items()}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A metric's value, its interval (None where there is nothing to resample), and its value for each trained model."""

  value: float
  low: float | None
  high: float | None
  per_seed: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
  """`estimates[group][metric]`, where one group is "overall"; `items` are the values behind them, one an example."""

  estimates: dict[str, dict[str, Estimate]]
  items: dict[str, np.ndarray]


def score_array(ids: Sequence[str], scores: Scores, options: int) -> np.ndarray:
  """Scores as float64 [E, O, 2] in the order of `ids`: summed log-probability (nats) and tokens.

  Raises UserError for an id without scores, another number of options, a score that is not finite or has no token.
  """
  missing = [identity for identity in ids if identity not in scores]
  if missing:
    raise UserError(f"the scores lack {len(missing)} of {len(ids)} ids, `{missing[0]}` first.")
  for identity in ids:
    if len(scores[identity]) != options:
      raise UserError(f"the scores of `{identity}` are for {len(scores[identity])} options, {options} are needed.")
  array_EO2 = np.array([scores[identity] for identity in ids], np.float64).reshape(len(ids), options, 2)
  for fault, wrong_EO in (("not finite", ~np.isfinite(array_EO2).all(-1)), ("over no token", array_EO2[..., 1] < 1)):
    if wrong_EO.any():
      raise UserError(f"{wrong_EO.any(-1).sum()} rows have a score that is {fault}, "
                      f"`{ids[int(wrong_EO.any(-1).argmax())]}` first.")
  return array_EO2
