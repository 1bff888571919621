"""Phase controllers: pure state machines that look at stereotype scores and say what is trained until the next look.

A controller's state is a `Phase`, plain data that is saved with the checkpoint. Scores are stereotype scores in %, one
a bias type, of a split that is neither trained on nor reported (the published code looks at a part of its test set).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Phase:
  """What is trained until the evaluation at step `until`.

  only: the one bias type that is trained, "" for all. swapped: types whose forget and retain sets have changed roles.
  rate: share of the peak learning rate. schedule_steps, warmup_steps: of the schedule that began at step `began`, 0
  for the run's own; a phase that begins one starts with fresh optimizer moments, too.
  """

  until: int
  only: str = ""
  swapped: tuple[str, ...] = ()
  rate: float = 1.0
  began: int = 0
  schedule_steps: float = 0
  warmup_steps: float = 0
  done: bool = False

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, plain: Mapping[str, Any]) -> Phase:
    return cls(**{**plain, "swapped": tuple(plain["swapped"])})


class Controller(Protocol):
  """`first()` is the phase that a run starts with; `next(...)` follows from an evaluation at `step`."""

  def first(self) -> Phase: ...
  def next(self, phase: Phase, step: int, scores: Mapping[str, float]) -> Phase: ...


@dataclasses.dataclass(frozen=True)
class Signed:
  """Ours: every type is swapped on its own sign, all types are trained all the time.

  A type whose score falls below 50 - hysteresis forgets its anti-stereotypes and retains its stereotypes, until the
  score is above 50 + hysteresis. Done when every type is within `tolerance` of 50.
  """

  every: int = 10
  hysteresis: float = 1.0
  tolerance: float = 2.0

  def first(self) -> Phase:
    return Phase(until=self.every)

  def next(self, phase: Phase, step: int, scores: Mapping[str, float]) -> Phase:
    low = {t for t, score in scores.items() if score < 50.0 - self.hysteresis}
    back = {t for t, score in scores.items() if score > 50.0 + self.hysteresis}
    swapped = tuple(sorted((set(phase.swapped) | low) - back))
    done = all(abs(score - 50.0) < self.tolerance for score in scores.values())
    return dataclasses.replace(phase, until=step + self.every, swapped=swapped, done=done)


@dataclasses.dataclass(frozen=True)
class Published:
  """BiasUnlearn's two scripts (Liu et al. 2025; specification 2.4), `script` "train" (GPT-2) or "train_7b".

  Behind a first phase on all types, each phase trains the one type that is furthest from its centre, swapped where its
  score lies below it; ties go to the first type. Evaluations are at global steps that the cadence divides. `order`: the
  types as the scripts have them, which decides ties and centres.

  Every step advances the scripts' learning-rate schedules by as many ticks as there are `processes`, while the first
  one's length grows with them: there its warm-up is what shortens. (The scripts also bound that length by three epochs
  of stereotypes, which all of StereoSet never reaches.)
  """

  script: str = "train"
  order: tuple[str, ...] = ("gender", "profession", "race", "religion")
  max_steps: int = 1000
  processes: int = 1

  @property
  def centres(self) -> dict[str, float]:
    tuned = (49.0, 49.0, 49.0, 48.0) if self.script == "train" else (50.0,) * 4
    return dict(zip(self.order, tuned, strict=True))

  def first(self) -> Phase:
    """50 is the scripts' first cadence; train.py does not look before step 100."""
    until = 100 if self.script == "train" else 50
    return Phase(until, schedule_steps=1.2 * self.max_steps, warmup_steps=10 / self.processes)

  def next(self, phase: Phase, step: int, scores: Mapping[str, float]) -> Phase:
    """Scores are compared as the scripts have them, rounded to two decimals."""
    rounded = {t: round(scores[t], 2) for t in self.order}
    gaps = {t: abs(rounded[t] - self.centres[t]) for t in self.order}
    worst = max(self.order, key=gaps.get)
    if all(gap < 2 for gap in gaps.values()) or step >= self.max_steps:
      return dataclasses.replace(phase, done=True)
    swapped = (worst,) if rounded[worst] < self.centres[worst] else ()
    every = self._every(gaps[worst], step)
    until = (step // every + 1) * every
    if self.script == "train_7b":  # optimizer and schedule go on
      return dataclasses.replace(phase, until=until, only=worst, swapped=swapped)
    rate, ticks = (1.0, 1000 if step >= 400 else 3000) if gaps[worst] > 5 else (0.8, 200)
    return Phase(until, worst, swapped, rate, step, ticks / self.processes, 5 / self.processes)

  def _every(self, gap: float, step: int) -> int:
    size = 0 if gap > 5 else 1 if gap > 3 else 2
    if self.script == "train":
      return (80, 50, 30)[size]
    return ((15, 5, 3) if step >= 300 else (30, 10, 3))[size]


CONTROLLERS = {"signed": Signed, "published": Published}


def better(one: tuple[Mapping[str, float], float], other: tuple[Mapping[str, float], float] | None) -> bool:
  """Whether an evaluation (scores, drop of LMS in points) beats the best so far: by the largest gap to 50, then by the
  drop of LMS; a gap smaller by less than a tenth of a point does not buy a larger drop."""
  key = lambda scores, drop: (round(max(abs(score - 50.0) for score in scores.values()), 1), drop)
  return other is None or key(*one) < key(*other)
