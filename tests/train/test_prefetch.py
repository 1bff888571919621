"""The batch ahead: the right one, made once, whatever its source does."""

from __future__ import annotations

import threading

import pytest

from jaxbias.train.prefetch import Prefetch


@pytest.fixture
def made():
  return []


@pytest.fixture(params=[1, 3])
def ahead(made, request):
  def make(source, step):
    if source == "broken":
      raise ValueError(f"no text for step {step}")
    made.append((source, step, threading.get_ident()))
    return source, step

  found = Prefetch(make, 5, request.param)
  yield found
  found.close()


def test_every_step_is_made_once_ahead_and_elsewhere(ahead, made):
  assert [ahead.take("a", step) for step in range(2, 5)] == [("a", 2), ("a", 3), ("a", 4)]
  ahead.close()
  assert sorted(step for _, step, _ in made) == [2, 3, 4], "none twice, none behind the end"
  assert threading.get_ident() not in {thread for *_, thread in made}


def test_the_next_one_is_begun_before_it_is_asked_for(made):
  begun = threading.Event()
  ahead = Prefetch(lambda source, step: (begun.set() if step == 1 else None, step)[1], end=3)
  assert ahead.take("a", 0) == 0 and begun.wait(timeout=10)
  ahead.close()


def test_another_source_or_step_is_not_given_what_was_ahead(ahead):
  assert ahead.take("a", 0) == ("a", 0)
  assert ahead.take("b", 1) == ("b", 1), "a controller exchanged the texts"
  assert ahead.take("b", 4) == ("b", 4)


def test_what_goes_wrong_ahead_is_raised_when_its_turn_comes(ahead):
  assert ahead.take("a", 0) == ("a", 0)
  with pytest.raises(ValueError, match="no text for step 1"):
    ahead.take("broken", 1)


def test_several_are_made_at_a_time():
  together = threading.Barrier(3, timeout=10)
  ahead = Prefetch(lambda source, step: step if step == 0 else (together.wait(), step)[1], 4, 3)
  assert [ahead.take("a", step) for step in range(4)] == [0, 1, 2, 3]
  ahead.close()
