"""Stopped at any moment, the same command goes on where it was and ends with the numbers of an uninterrupted run."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from jaxbias import config as configs
from jaxbias import workdir
from jaxbias.errors import UserError
from tests.faults.kills import UNFINISHED, Left, Moment, differences, half_written, stop
from tests.train import RUNS, Workplace, read, untimed

INTERRUPTED = "jaxbias: interrupted; the same command goes on from the last checkpoint."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


def test_stopped_again_and_again_it_ends_with_the_same_numbers(tiny, tmp_path):
  """Killed while a checkpoint is written, interrupted between two steps, killed while the last run is evaluated."""
  finished, workdir, left = tiny.finished(), tmp_path / "work", []
  stops = [("sft-seed0", "saving", 3, signal.SIGKILL), ("npo-seed0", "steps", 4, signal.SIGINT),
           ("npo-seed1", "evaluation", 6, signal.SIGKILL)]  # fmt: skip
  heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # the jobs of a shell's background ignore it
  try:
    for name, moment, step, how in stops:
      process = tiny.start("compare", "--config", tiny.config, "--workdir", workdir, stdout=subprocess.DEVNULL)
      assert stop(process, Moment(workdir / name, moment, step), how), "it was done too soon"
      said = process.communicate()[1]
      if how == signal.SIGINT:
        assert (process.returncode, said.splitlines()[-1]) == (130, INTERRUPTED) and "Traceback" not in said, said
      else:
        assert process.returncode == -signal.SIGKILL, said
      assert not half_written(workdir)
      left.append(Left.of(workdir / name))
  finally:
    signal.signal(signal.SIGINT, heard)
  done = tiny.compare(workdir)
  assert done.returncode == 0, done.stderr
  assert [one.went_on_from() for one in left] == [one.saved for one in left] and left[-1].saved == 6
  assert untimed(read(workdir / "results.json")) == untimed(read(finished / "results.json"))
  for name in RUNS:
    assert not differences(workdir / name, finished / name)
    assert not list((workdir / name / "checkpoints").glob(f"*{UNFINISHED}"))


# The work folder


@pytest.fixture
def plain(tiny) -> dict:
  return configs.to_dict(configs.from_command_line([f"--config={tiny.config}"])[0])


@pytest.mark.parametrize("left", [(), ("provenance.json",), (".config.json.17.tmp", "provenance.json")])
def test_a_kill_while_the_folder_was_claimed(plain, tmp_path, left):
  for name in left:
    (tmp_path / name).write_text("{}")
  workdir.claim(tmp_path, plain, "again")
  assert read(tmp_path / "config.json") == plain
  assert read(tmp_path / "provenance.json")["config_hash"] == configs.config_hash(plain)


def test_a_folder_in_which_nothing_was_computed_can_be_claimed_anew(plain, tmp_path):
  workdir.claim(tmp_path, plain | {"model": "smollm2-135m-instuct"}, "first")
  workdir.claim(tmp_path, plain, "second")
  assert read(tmp_path / "config.json") == plain and read(tmp_path / "provenance.json")["command"] == "second"
  (tmp_path / "base").mkdir()
  with pytest.raises(UserError, match="belongs to another config .train.steps: 6 there, 7 here.; choose another"):
    workdir.claim(tmp_path, plain | {"train": plain["train"] | {"steps": 7}}, "third")
  assert read(tmp_path / "config.json") == plain


def test_a_bucket_is_no_work_folder(plain, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="gs:/bucket/mine is no folder on a disk; give one .*train.checkpoints name the"):
    workdir.claim(Path("gs://bucket/mine"), plain, "first")
  assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_another_mesh_and_as_many_checkpoints_as_one_likes(plain, tmp_path):
  workdir.claim(tmp_path, plain, "first")
  (tmp_path / "base").mkdir()
  train = plain["train"] | {"keep_checkpoints": 5}
  workdir.claim(tmp_path, plain | {"mesh": plain["mesh"] | {"fsdp": 4}, "train": train}, "second")
  with pytest.raises(UserError, match="another config .train.checkpoint_every: 3 there, 4 here.;"):
    workdir.claim(tmp_path, plain | {"train": train | {"checkpoint_every": 4}}, "third")
