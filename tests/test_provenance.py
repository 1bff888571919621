"""What a work folder says about how to make it again, and what it refuses to be continued with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from jaxbias import compare as comparison
from jaxbias import config as configs
from jaxbias import provenance
from jaxbias.errors import UserError
from tests.train import Workplace, read

MESH = {"data": 1, "fsdp": 1, "tensor": 1}


def git(folder: Path, *arguments: str) -> None:
  who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
  subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
  """A committed source tree, which takes the place of this one."""
  root = tmp_path / "tree"
  (root / "package").mkdir(parents=True)
  (root / "package" / "provenance.py").write_text("one\n")
  (root / "package" / "blob").write_bytes(bytes(range(256)))
  (root / ".gitignore").write_text("*.tmp\n")
  git(root, "init", "-q")
  git(root, "add", "-A")
  git(root, "commit", "-qm", "first")
  monkeypatch.setattr(provenance, "__file__", str(root / "package" / "provenance.py"))
  return root


def test_the_diff_makes_the_tree_again(checkout, tmp_path):
  assert provenance.git().keys() == {"commit", "dirty"} and not provenance.git()["dirty"]
  (checkout / "package" / "provenance.py").write_text("two\n")
  (checkout / "package" / "blob").write_bytes(b"\xff\0other")
  (checkout / "package" / "new name.py").write_text("not added yet\n")
  (checkout / "package" / "left.tmp").write_text("ignored")
  (checkout / "notes").write_text("outside of the package")
  about = provenance.git()
  assert about["dirty"] and len(about["diff_sha256"]) == 64
  git(tmp_path, "clone", "-q", str(checkout), "again")
  (tmp_path / "changes").write_bytes(provenance.diff())
  git(tmp_path / "again", "apply", str(tmp_path / "changes"))
  content = lambda root: {p.name: p.read_bytes() for p in (root / "package").iterdir() if p.suffix != ".tmp"}
  assert content(tmp_path / "again") == content(checkout) and not (tmp_path / "again" / "notes").exists()


def test_a_run_of_a_changed_tree_keeps_the_changes(checkout, tmp_path):
  work = tmp_path / "work"
  work.mkdir()
  provenance.claim(work, {"seeds": [3]}, "python -m jaxbias train --config.a='(1, 2)' --workdir=w --config.b=c")
  about = read(work / provenance.FILE)
  assert about["overrides"] == ["--config.a=(1, 2)", "--config.b=c"] and about["seeds"] == [3]
  assert {p.name for p in work.iterdir()} == {"provenance.json"}
  provenance.bind(work, {"data": "d"}, MESH, "first", computed=False)
  (checkout / "package" / "provenance.py").write_text("two\n")
  provenance.bind(work, {"data": "d"}, MESH, "again", computed=True)
  provenance.bind(work, {"data": "d"}, MESH, "and again", computed=True)  # nothing has changed since
  (entry,) = read(work / provenance.FILE)["continued"]
  assert entry.keys() == {"created", "command", "git"} and entry["command"] == "again" and entry["git"]["dirty"]
  assert b"+two" in (work / "provenance.1.diff").read_bytes()
  assert read(work / provenance.FILE)["git"] == about["git"], "what it began with stays"


def test_inputs_that_changed_are_refused_by_name(tmp_path):
  provenance.claim(tmp_path, {}, "a test")
  provenance.bind(tmp_path, {"data": "a" * 64, "model": "m" * 64}, MESH, "a test", computed=False)
  provenance.bind(tmp_path, {"data": "b" * 64, "model": "m" * 64}, MESH, "a test", computed=False)
  assert read(tmp_path / provenance.FILE)["inputs"]["data"] == "b" * 64, "nothing was made of the first"
  with pytest.raises(UserError, match="data .bbbbbbbbbbbb there, cccccccccccc here., watch.general .none there, eee"):
    provenance.bind(tmp_path, {"data": "c" * 64, "model": "m" * 64, "watch.general": "e" * 64}, MESH, "", computed=True)
  wide = MESH | {"data": 8}
  provenance.bind(tmp_path, {"data": "b" * 64, "model": "m" * 64}, wide, "on more", computed=True)
  assert read(tmp_path / provenance.FILE)["continued"][0]["mesh"] == wide


def test_files_are_found_wherever_a_config_names_them(tmp_path):
  (tmp_path / "words.txt").write_text("he she")
  plain = {"model": str(tmp_path / "words.txt"), "data": {"source": "builtin", "corpus": str(tmp_path / "words.txt")},
           "variants": {"a": {"losses": {"nc3": {"words": str(tmp_path / "words.txt"), "on": "retain"}}}},
           "title": "long " * 1000, "steps": 3}  # fmt: skip
  found = provenance.files_named(plain)
  assert found.keys() == {"data.corpus", "variants.a.losses.nc3.words"} and len(set(found.values())) == 1


def test_a_comparison_with_other_data_under_the_same_name_is_refused(tmp_path, tmp_path_factory):
  tiny, data, workdir = Workplace.of(tmp_path_factory), tmp_path / "stereoset.json", tmp_path / "work"
  shutil.copy(tiny.folder / "stereoset.json", data)
  config = lambda: configs.from_command_line([f"--config={tiny.config}", f"--config.data.source={data}"])[0]
  comparison.prepare(config(), workdir, "first")
  data.write_text(data.read_text().replace("a hat.", "a bat."))
  comparison.prepare(config(), workdir, "nothing was computed yet")
  (workdir / "base").mkdir()
  comparison.prepare(config(), workdir, "the same once more")
  data.write_text(data.read_text().replace("a bat.", "a hat."))
  with pytest.raises(UserError, match="has changed since: data .* data.source"):
    comparison.prepare(config(), workdir, "other texts")
