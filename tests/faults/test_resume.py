"""Stopped at any moment, the same command goes on where it was and ends with the numbers of an uninterrupted run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxbias import compare as comparison
from jaxbias import config as configs
from jaxbias.errors import UserError
from tests.train import RUNS, Workplace, lines, read, untimed

STOPS = 3
INTERRUPTED = "jaxbias: interrupted; the same command goes on from the last checkpoint."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


def state_of(run: Path) -> tuple[int, dict]:
  """The newest checkpoint of a run: its step, and its arrays as numpy."""
  with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
    step = manager.latest_step()
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
  return step, jax.tree.map(np.asarray, restored)


def assert_same_results(workdir: Path, finished: Path) -> None:
  """Scores, metrics, adapters, optimizer state and estimates of two comparisons are equal to the last bit."""
  assert untimed(read(workdir / "results.json")) == untimed(read(finished / "results.json"))
  for name in ("base", *RUNS):
    assert read(workdir / name / "evaluation.json")["scores"] == read(finished / name / "evaluation.json")["scores"]
  for name in RUNS:
    metrics = [untimed(lines(folder / name / "metrics.jsonl")) for folder in (workdir, finished)]
    assert metrics[0] == metrics[1]
    (step, ours), (last, theirs) = state_of(workdir / name), state_of(finished / name)
    assert step == last and jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def changes(folder: Path, process: subprocess.Popen):
  """Yields each time that something under `folder` changed, until the process ends."""
  before = None
  while process.poll() is None:
    now = set()
    for where, _, names in os.walk(folder):
      for path in (Path(where, name) for name in names):
        with contextlib.suppress(FileNotFoundError):
          now.add((path, path.stat().st_size))
    if before is not None and now != before:
      yield
    before = now
    time.sleep(0.01)


def stop(tiny: Workplace, workdir: Path, after: int, how: signal.Signals) -> tuple[int, str]:
  """Start the comparison, send it `how` after that many changes on disk, and return its exit code and last words."""
  process = tiny.start("compare", "--config", tiny.config, "--workdir", workdir)
  for count, _ in enumerate(changes(workdir, process), start=1):
    if count == after:
      process.send_signal(how)
  return process.returncode, process.communicate()[1]


def test_stopped_again_and_again_it_ends_with_the_same_numbers(tiny, tmp_path):
  finished, workdir = tiny.finished(), tmp_path / "work"
  workdir.mkdir()
  heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # the jobs of a shell's background ignore it
  stops = []
  try:
    for after in np.random.default_rng(2).integers(2, 25, STOPS):
      how = signal.SIGINT if len(stops) == 1 else signal.SIGKILL
      code, said = stop(tiny, workdir, int(after), how)
      if how == signal.SIGINT and code:
        assert (code, said.splitlines()[-1]) == (130, INTERRUPTED) and "Traceback" not in said, said
      else:
        assert code in (0, -signal.SIGKILL), said
      stops.append(code)
      for path in workdir.rglob("*.json"):
        read(path)  # whole, or not there
  finally:
    signal.signal(signal.SIGINT, heard)
  assert np.count_nonzero(stops) >= 2, "it was done too soon: stop it earlier"  # a fast machine sees fewer changes
  print(f"\nstopped {np.count_nonzero(stops)} times")
  done = tiny.compare(workdir)
  assert done.returncode == 0, done.stderr
  assert_same_results(workdir, finished)


def test_a_save_that_was_cut_short_does_not_count(tiny, tmp_path):
  """As if killed while step 6 was being written, after step 7 of metrics that nobody will read again."""
  workdir = shutil.copytree(tiny.finished(), tmp_path / "work")
  run = workdir / "npo-seed1"
  (run / "checkpoints" / "6").rename(run / "checkpoints" / "6.orbax-checkpoint-tmp")
  (run / "checkpoints" / "6.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
  with (run / "metrics.jsonl").open("a") as metrics:
    metrics.write('{"step": 7, "loss": 1.0, "par')
  for path in (run / "evaluation.json", workdir / "results.json"):
    path.unlink()
  done = tiny.compare(workdir)
  assert done.returncode == 0, done.stderr
  assert_same_results(workdir, tiny.finished())


# The work folder


@pytest.fixture
def plain(tiny) -> dict:
  return configs.to_dict(configs.from_command_line([f"--config={tiny.config}"])[0])


@pytest.mark.parametrize("left", [(), ("provenance.json",), (".config.json.17.tmp", "provenance.json")])
def test_a_kill_while_the_folder_was_claimed(plain, tmp_path, left):
  for name in left:
    (tmp_path / name).write_text("{}")
  comparison.claim(tmp_path, plain, "again")
  assert read(tmp_path / "config.json") == plain
  assert read(tmp_path / "provenance.json")["config_hash"] == configs.config_hash(plain)


def test_a_folder_in_which_nothing_was_computed_can_be_claimed_anew(plain, tmp_path):
  comparison.claim(tmp_path, plain | {"model": "smollm2-135m-instuct"}, "first")
  comparison.claim(tmp_path, plain, "second")
  assert read(tmp_path / "config.json") == plain and read(tmp_path / "provenance.json")["command"] == "second"
  (tmp_path / "base").mkdir()
  with pytest.raises(UserError, match="belongs to another config .train.steps: 6 there, 7 here.; choose another"):
    comparison.claim(tmp_path, plain | {"train": plain["train"] | {"steps": 7}}, "third")
  assert read(tmp_path / "config.json") == plain
