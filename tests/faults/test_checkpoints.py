"""Checkpoints alone: what is saved in the background, kept, skipped, and refused."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbias.errors import UserError
from jaxbias.files import checkpoint_folder
from jaxbias.models import adapted
from jaxbias.train.checkpoint import Checkpoints
from jaxbias.types import TrainState
from tests.faults.disks import disk

CONFIG = {"model": "m", "lora": {"rank": 2, "alpha": 2.0, "targets": ("q",)}, "train": {"steps": 9}}
SIZE = 4096  # past what is stored inside the index


def state(step: int) -> TrainState:
  """Another one at every step."""
  drawn = np.random.default_rng(step).normal(size=SIZE).astype(np.float32)
  return TrainState(jnp.int32(step), {"layers": {"a": jnp.asarray(drawn)}}, {"mean": jnp.arange(3.0) + step})


def save(folder: Path, *steps: int, **how) -> None:
  checkpoints = Checkpoints(folder, **how)
  for step in steps:
    checkpoints.save(state(step), CONFIG)
  checkpoints.close()


def restored(folder: Path) -> int | None:
  """The step that is restored, whose arrays are checked."""
  checkpoints = Checkpoints(folder)
  try:
    found = checkpoints.restore(state(0), CONFIG)
    if found is None:
      return None
    jax.tree.map(np.testing.assert_array_equal, found, state(int(found.step)))
    assert checkpoints.about()["data_position"] == checkpoints.newest == int(found.step)
    return int(found.step)
  finally:
    checkpoints.close()


def names(folder: Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  save(folder, 2, 4)
  return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
  return shutil.copytree(saved, tmp_path / "checkpoints")


# Saved and kept


def test_the_newest_checkpoint_is_taken(folder, tmp_path):
  assert restored(folder) == 4
  assert restored(tmp_path / "none") is None


def test_what_is_saved_is_the_state_of_its_step_though_the_next_step_takes_its_arrays(tmp_path):
  """`save` returns before anything is written, and a step may overwrite what it was given."""
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  now = TrainState(jnp.int32(0), {"layers": {"a": jnp.zeros(1 << 20)}}, {"mean": jnp.zeros(3)})
  checkpoints = Checkpoints(tmp_path, keep=3)
  for _ in range(3):
    for _ in range(3):
      now = step(now)
    checkpoints.save(now, CONFIG)
  now = step(now)
  for saved in (9, 6, 3):
    found = checkpoints.best(now, saved)
    assert all(np.all(np.asarray(leaf) == saved) for leaf in jax.tree.leaves(found))
  checkpoints.close()


def test_everything_that_a_run_goes_on_from_is_saved(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state(3), CONFIG, best={"step": 3}, phase={"until": 6})
  about = checkpoints.about()
  checkpoints.close()
  assert about["data_position"] == 3 and about["phase"] == {"until": 6} and about["best"] == {"step": 3}
  assert about["config"]["train"] == {"steps": 9} and about["versions"]["jax"] == jax.__version__
  assert about["streams"] == {"adapters": 0, "dropout": 1, "losses": 2, "mixout": 3}, "changing it changes every run"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay_and_the_best_whatever_follows(tmp_path, keep):
  checkpoints = Checkpoints(tmp_path, keep)
  for step in range(1, 8):
    checkpoints.save(state(step), CONFIG, best={"step": min(step, 2)})
  assert int(checkpoints.best(state(0), 2).step) == 2
  checkpoints.close()
  assert names(tmp_path) == {"2", *(str(step) for step in range(8 - keep, 8))}
  again = Checkpoints(tmp_path, keep)
  again.restore(state(0))
  for step in (8, 9):  # 9 is better, so that 2 may go with the last checkpoint that names it
    again.save(state(step), CONFIG, best={"step": 2 if step == 8 else 9})
  again.close()
  assert names(tmp_path) == {"9"} if keep == 1 else {"2", "8", "9"} <= names(tmp_path)


def test_checkpoints_elsewhere(tmp_path):
  """The run's folder says where; two work folders with runs of the same name do not meet."""
  for work in ("one", "two"):
    run = tmp_path / work / "npo-seed0"
    run.mkdir(parents=True)
    assert checkpoint_folder(run) is None
    checkpoints = Checkpoints.of(run, str(tmp_path / "bucket"))
    checkpoints.save(state(1), CONFIG)
    checkpoints.close()
    assert restored(checkpoint_folder(run)) == 1 and adapted.find(run).step == 1
  assert names(tmp_path / "bucket" / "two" / "npo-seed0") == {"1"}


def test_a_bucket_that_cannot_be_reached(tmp_path):
  if importlib.util.find_spec("gcsfs"):
    pytest.skip("gcsfs is here, and would ask the cloud")
  (tmp_path / "run").mkdir()
  with pytest.raises(UserError, match="gs://bucket/mine/.*/run cannot be reached: .*gcsfs"):
    Checkpoints.of(tmp_path / "run", "gs://bucket/mine")


# Half written, damaged, of something else


def test_what_is_unfinished_is_passed_over_and_written_anew(folder):
  half = folder / "6.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
  half.mkdir(parents=True)
  (half / "d").write_bytes(b"half")
  assert restored(folder) == 4
  save(folder, 6)
  assert restored(folder) == 6


def lose(target: Path) -> None:
  shutil.rmtree(target) if target.is_dir() else target.unlink()


def cut(target: Path) -> None:
  """The largest file of a folder, or a file, to its half."""
  files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.parametrize("how, what", [
  (lose, "about"), (lose, "about/metadata"), (cut, "about/metadata"),
  (lose, "state"), (lose, "state/_METADATA"), (cut, "state/_METADATA"), (lose, "state/manifest.ocdbt"),
  (cut, "state/manifest.ocdbt"), (lose, "state/d"), (cut, "state/d"), (lose, "state/ocdbt.process_0/d"),
  (cut, "state/ocdbt.process_0/d"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_put_aside_with_one_line_and_the_one_before_is_used(folder, caplog, capfd, how, what):
  how(folder / "4" / what)
  assert restored(folder) == 2
  (said,) = caplog.messages
  assert said == (f"the checkpoint {folder / '4'} is damaged and was put aside as 4.damaged; the run goes on from "
                  "step 2.")  # fmt: skip
  assert capfd.readouterr() == ("", ""), "the storage library is quiet about it"
  assert names(folder) == {"2", "4.damaged"}
  save(folder, 4)
  assert restored(folder) == 4 and names(folder) == {"2", "4", "4.damaged"}


def test_an_empty_folder_is_no_checkpoint(folder):
  (folder / "6").mkdir()
  assert restored(folder) == 4


def test_when_no_checkpoint_can_be_read_nothing_is_touched(folder):
  for step in ("2", "4"):
    lose(folder / step / "state" / "manifest.ocdbt")
  with pytest.raises(UserError, match=f"no checkpoint in {folder} can be read: damaged, or of another model; delete"):
    restored(folder)
  assert names(folder) == {"2", "4"}


@pytest.mark.parametrize("steps, said", [(9, ""), (8, "4 is of another config .train.steps: 9 there, 8 here.; choose")])
def test_a_checkpoint_of_another_config_is_refused(folder, steps, said):
  checkpoints = Checkpoints(folder)
  mine = CONFIG | {"train": {"steps": steps}, "mesh": {"data": 8}}  # where arrays lie may change
  try:
    if not said:
      assert int(checkpoints.restore(state(0), mine).step) == 4
      return
    with pytest.raises(UserError, match=said) as error:
      checkpoints.restore(state(0), mine)
    assert "\n" not in str(error.value) and names(folder) == {"2", "4"}
  finally:
    checkpoints.close()


def test_a_best_checkpoint_that_is_gone(folder):
  checkpoints = Checkpoints(folder)
  with pytest.raises(UserError, match=f"best checkpoint {folder / '1'} is missing or damaged; delete {folder}"):
    checkpoints.best(state(0), 1)
  checkpoints.close()


# Disks


@pytest.mark.parametrize("lacks", ["bytes", "files"])
def test_a_disk_that_fills_while_it_is_written_says_so_and_keeps_what_is_there(tmp_path, monkeypatch, lacks):
  """Behind the check before it."""
  with disk(tmp_path / "small", "4m,nr_inodes=100"):
    folder = tmp_path / "small" / "checkpoints"
    save(folder, 1)
    if lacks == "bytes":
      (tmp_path / "small" / "ballast").write_bytes(b"\0" * (shutil.disk_usage(folder).free - 20_000))
    for name in range(os.statvfs(folder).f_ffree - 6 if lacks == "files" else 0):
      (tmp_path / "small" / str(name)).touch()
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 40))
    checkpoints = Checkpoints(folder, keep=9)
    with pytest.raises(OSError) as error:
      checkpoints.save(state(2), CONFIG)
      checkpoints.close()
    assert error.value.errno == errno.ENOSPC and error.value.strerror
    assert {name for name in names(folder) if name.isdecimal()} == {"1"}
    assert restored(folder) == 1


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
  save(tmp_path, 1)
  real = shutil.disk_usage
  monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=20_000))
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(OSError) as error:
    checkpoints.save(state(2), CONFIG)
  checkpoints.close()
  assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path)) and names(tmp_path) == {"1"}


def test_nothing_is_logged_where_nothing_is_wrong(folder, caplog):
  with caplog.at_level(logging.DEBUG, "jaxbias"):
    restored(folder)
  assert not caplog.messages
