"""Training in several processes: the same run as in one, stopped and lost and resumed, on the CPU over gloo."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from numpy.testing import assert_allclose

from jaxbias import preemption
from jaxbias.errors import Preempted
from tests.multiprocess import SERVER, ended, say_to, start, wait_until
from tests.train import Workplace, lines, read

STEPS = 50
ARGUMENTS = ("--variant=npo", "--config.seeds=(0,)", f"--config.train.steps={STEPS}",
             "--config.train.checkpoint_every=20")  # fmt: skip
RUN = "npo-seed0"
LOSS = 1e-5  # relative


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


def command(tiny: Workplace, workdir: Path, *more: str) -> list[str]:
  return ["train", f"--config={tiny.config}", f"--workdir={workdir}", *ARGUMENTS, *more]


def run(tiny: Workplace, folder: Path, count: int, devices: int = 1) -> Path:
  """A run from its first step to its report."""
  workdir = folder / f"{count}-processes-{devices}-devices"
  codes = ended(start(count, command(tiny, workdir), folder / "log", tiny.cache, devices))
  assert codes == [0] * count, (folder / "log-0").read_text()
  return workdir


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
  return run(tiny, tmp_path_factory.mktemp("alone"), 1)


def assert_same_run(workdir: Path, alone: Path) -> None:
  """Every step once; its texts, its losses, and in the end the answers."""
  ours, theirs = (lines(folder / RUN / "metrics.jsonl") for folder in (workdir, alone))
  assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
  assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
  for name in ("loss", "gradient_norm"):
    value = lambda records, name=name: [line[name] for line in records]
    assert_allclose(value(ours), value(theirs), rtol=LOSS if name == "loss" else 1e-3, err_msg=name)
  for part in theirs[0]["parts"]:
    assert_allclose(*([line["parts"][part] for line in records] for records in (ours, theirs)), rtol=LOSS, atol=1e-6)
  scores = [read(folder / RUN / "evaluation.json")["scores"] for folder in (workdir, alone)]
  flat = lambda found: np.array([x for group in found.values() for options in group.values() for x in options])
  assert_allclose(flat(scores[0]), flat(scores[1]), rtol=1e-4)
  assert len(list((workdir / RUN / "tensorboard").iterdir())) == 1  # one process writes


@pytest.mark.parametrize("count, devices", [(4, 1), (1, 8)])
def test_any_number_of_processes_trains_as_one(tiny, alone, tmp_path, count, devices):
  assert_same_run(run(tiny, tmp_path, count, devices), alone)


def test_stopped_and_resumed_by_other_numbers_of_processes_it_is_the_same_run(tiny, alone, tmp_path):
  """SIGTERM to one of two, then to one alone; two end it. None of the stops is at a step that would be saved anyway."""
  workdir, metrics = tmp_path / "work", tmp_path / "work" / RUN / "metrics.jsonl"
  for count, until in ((2, 10), (1, 30)):
    processes = start(count, command(tiny, workdir), tmp_path / "log", tiny.cache)
    wait_until(lambda until=until: metrics.exists() and len(lines(metrics)) >= until, processes)
    os.kill(processes[-1].pid, signal.SIGTERM)
    assert ended(processes) == [75] * count, (tmp_path / "log-0").read_text()
    saved = len(lines(metrics))
    assert (workdir / RUN / "checkpoints" / str(saved)).is_dir()
    for i in range(count):
      assert f"jaxbias: told to stop: {RUN} is saved at step {saved}, and the same command goes on from there." in (
        tmp_path / f"log-{i}").read_text()  # fmt: skip
  assert saved < STEPS, "it was done too soon"
  codes = ended(start(2, command(tiny, workdir), tmp_path / "log", tiny.cache))
  assert codes == [0, 0], (tmp_path / "log-0").read_text()
  assert_same_run(workdir, alone)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_stops_the_other_in_time_with_a_message(tiny, tmp_path, how):
  """Killed, its connections close; stopped, only its heartbeats are missing."""
  silence, metrics = 5, tmp_path / "work" / RUN / "metrics.jsonl"
  arguments = command(tiny, tmp_path / "work", f"--silence={silence}", "--config.train.steps=100000")
  processes = start(2, arguments, tmp_path / "log", tiny.cache)
  wait_until(lambda: metrics.exists() and len(lines(metrics)) >= 3, processes)
  os.kill(processes[1].pid, how)
  began = time.monotonic()
  ended(processes[:1])
  took = time.monotonic() - began
  processes[1].kill()  # one that was only stopped
  assert processes[0].exitcode in (75, -signal.SIGABRT) and took < silence + 30, took  # and what a busy machine needs
  assert "another process was lost" in (said := (tmp_path / "log-0").read_text()) or "heartbeat" in said


def test_what_only_the_first_process_sees_ends_all_with_its_line(tiny, tmp_path):
  (tmp_path / "work").mkdir()
  (tmp_path / "work" / "notes.txt").touch()
  codes = ended(start(2, command(tiny, tmp_path / "work"), tmp_path / "log", tiny.cache))
  said = f"jaxbias: {tmp_path / 'work'} is not empty and holds no config.json of a run; choose another --workdir."
  assert codes == [2, 2] and all(said in (tmp_path / f"log-{i}").read_text() for i in range(2))
  assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]


def hang(log: str) -> None:
  say_to(log)
  jax.distributed.is_initialized, multihost_utils.reached_preemption_sync_point = lambda: True, lambda boundary: False
  preemption.HANG = 1
  with preemption.listening():
    assert not preemption.due()
    time.sleep(300)


def test_a_process_that_hangs_ends_with_where_it_stands(tmp_path):
  process = SERVER.Process(target=hang, args=(str(tmp_path / "log"),))
  process.start()
  assert ended([process]) == [1]
  said = (tmp_path / "log").read_text()
  assert "Timeout (0:00:01)!" in said and "in hang" in said


def test_sigterm_is_told_once_and_then_ends_a_process_as_ever():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.listening():
    preemption.check()
    signal.raise_signal(signal.SIGTERM)
    assert preemption.due() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(Preempted, match="what was finished is saved"):
      preemption.check()
  assert signal.getsignal(signal.SIGTERM) == before and not preemption.due()
