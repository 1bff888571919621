"""The published scripts' decisions (tests/oracles/biasunlearn_oracle.json), and what our own controller promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxbias.methods.controllers import Phase, Published, Signed, better

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "biasunlearn_oracle.json").read_text())
TYPES = ("gender", "profession", "race", "religion")


def scores(*values: float) -> dict[str, float]:
  return dict(zip(TYPES, values, strict=True))


@pytest.mark.parametrize("script,key", [("train", "train.py"), ("train_7b", "train_7B.py")])
@pytest.mark.parametrize("case", ORACLE["swap_controller"], ids=lambda case: f"step {case['idx']}")
def test_the_published_scripts_decisions(script, key, case):
  theirs, step = case[key], case["idx"]
  phase = Published(script).next(Published(script).first(), step, scores(*map(float, case["scores"])))
  assert phase.done == theirs["stop"]
  if phase.done:
    return
  assert phase.only == theirs["category"]
  assert phase.swapped == ((theirs["category"],) if theirs["reverse"] else ())
  assert phase.until > step and phase.until % theirs["eval_every"] == 0 and phase.until - step <= theirs["eval_every"]
  if script == "train":
    assert phase.rate * case["lr"] == pytest.approx(theirs["new_lr"])
    assert (phase.schedule_steps, phase.warmup_steps, phase.began) == (theirs["sched_steps"], 5, step)
  else:
    assert phase.rate == 1.0 and phase.began == 0  # it goes on as it began: the script's rebuild is commented out


def test_published_cadence_and_ties():
  assert (Published("train").first().until, Published("train_7b").first().until) == (100, 50)
  assert Published("train").next(Phase(100), 100, scores(60, 50, 50, 50)).until == 160  # 80 divides 160, not 180
  tie = Published("train").next(Phase(100), 100, scores(59, 59, 49, 48))
  assert tie.only == "gender"
  assert Published("train", max_steps=300).next(Phase(300), 300, scores(60, 60, 60, 60)).done


def test_signed_swaps_each_type_on_its_own_with_hysteresis():
  control, phase = Signed(every=10, hysteresis=1.0, tolerance=2.0), Signed(every=10).first()
  phase = control.next(phase, 10, scores(60, 48.5, 49.5, 55))
  assert phase.swapped == ("profession",) and phase.until == 20 and not phase.done
  phase = control.next(phase, 20, scores(60, 50.5, 49.5, 55))
  assert phase.swapped == ("profession",), "within the band nothing changes"
  phase = control.next(phase, 30, scores(48, 51.5, 50, 55))
  assert phase.swapped == ("gender",)
  assert control.next(phase, 40, scores(48.5, 51.5, 50, 51.9)).done


def test_swapping_is_an_involution():
  control = Signed(hysteresis=0.0)
  there = control.next(control.first(), 10, scores(40, 60, 60, 60))
  back = control.next(there, 20, scores(60, 60, 60, 60))
  assert there.swapped == ("gender",) and back.swapped == ()


def test_a_phase_survives_json():
  phase = Phase(30, "race", ("race",), 0.8, 20, 200, 5, False)
  assert Phase.from_json(json.loads(json.dumps(phase.to_json()))) == phase


def test_the_best_is_by_the_largest_gap_then_by_the_loss_of_language():
  assert better((scores(51, 51, 51, 51), 3.0), None)
  assert better((scores(51, 51, 51, 51), 3.0), (scores(50, 50, 50, 55), 0.0))
  assert better((scores(51, 49, 50, 50), 1.0), (scores(50, 50, 50, 51.04), 2.0))
  assert not better((scores(51, 49, 50, 50), 2.0), (scores(51, 50, 50, 50), 2.0))
