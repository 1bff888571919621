"""What it takes to make a run again: versions, commit and changes, hardware, inputs. Collected, never guessed."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from jaxbias.config import config_hash
from jaxbias.errors import UserError
from jaxbias.files import replace, write_json

PACKAGES = (
  "jaxbias", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "safetensors", "gguf",
)  # fmt: skip
FILE, DIFF = "provenance.json", "provenance{}.diff"
VARIABLES = ("JAX_", "XLA_", "LIBTPU_")  # beginnings of environment variables that change what is computed
SURROUNDINGS = ("versions", "git", "hardware", "environment", "mesh", "processes")  # a continued run may have others


def versions() -> dict[str, str]:
  """Installed version of each package that a number can depend on."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def git() -> dict | None:
  """Commit of the source tree and whether it has uncommitted changes, with their sha256; None outside a checkout."""
  try:
    commit, changes = _git("rev-parse", "HEAD").decode().strip(), diff()
  except (OSError, subprocess.CalledProcessError):
    return None
  digest = {"diff_sha256": hashlib.sha256(changes).hexdigest()} if changes else {}
  return {"commit": commit, "dirty": bool(changes), **digest}


def diff() -> bytes:
  """What `git apply` makes the source tree of, from its commit: tracked files, and new ones of the package."""
  root, package = os.fsdecode(_git("rev-parse", "--show-toplevel")).strip(), str(Path(__file__).parent)
  plain = ("diff", "--no-color", "--no-ext-diff", "--binary")
  new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", package, at=root).split(b"\0")[:-1]
  added = (_git(*plain, "--no-index", "--", os.devnull, os.fsdecode(name), at=root, codes=(0, 1)) for name in new)
  return _git(*plain, "HEAD", at=root) + b"".join(added)


def _git(*arguments: str, at: str | None = None, codes: tuple[int, ...] = (0,)) -> bytes:
  done = subprocess.run(["git", *arguments], cwd=at or Path(__file__).parent, capture_output=True)
  if done.returncode not in codes:
    raise subprocess.CalledProcessError(done.returncode, done.args)
  return done.stdout


def hardware() -> str:
  import jax

  devices = jax.devices()
  return f"{os.cpu_count()} CPU cores, {len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"


def now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# The record of a work folder


def claim(workdir: Path, plain: Mapping, command: str) -> None:
  """Write down what is known before anything is loaded. plain: the merged config; command: as it was typed."""
  write_json(workdir / FILE, {
    "command": command, "overrides": [a for a in shlex.split(command) if a.startswith("--config.")],
    "config_hash": config_hash(plain), "seeds": plain.get("seeds"), **_surroundings(), "created": now(),
  })  # fmt: skip
  _write_diff(workdir / DIFF.format(""))


def bind(workdir: Path, inputs: Mapping[str, str], mesh: Mapping[str, int], command: str, computed: bool) -> None:
  """Add what a run reads and where it lies; where something is `computed` already, hold the inputs against those of
  then, and note surroundings that are not what they were.

  inputs: {what: its sha256}. Raises UserError naming the inputs that changed.
  """
  about = json.loads((workdir / FILE).read_text(encoding="utf-8"))
  before = about.get("inputs")
  if computed and before is not None:
    changed = [f"{name} ({before.get(name, 'none')[:12]} there, {inputs.get(name, 'none')[:12]} here)"
               for name in sorted(before.keys() | inputs.keys()) if before.get(name) != inputs.get(name)]  # fmt: skip
    if changed:
      raise UserError(f"what {workdir} was computed from has changed since: {', '.join(changed)}; put it back, or "
                      "choose another --workdir.")
  import jax

  here = {**_surroundings(), "mesh": dict(mesh), "processes": jax.process_count()}
  if not computed or "mesh" not in about:
    return write_json(workdir / FILE, {**about, **here, "inputs": dict(inputs)})
  latest = dict(about)
  for entry in about.get("continued", ()):
    latest |= entry
  if other := {name: here[name] for name in SURROUNDINGS if here[name] != latest[name]}:
    continued = [*about.get("continued", ()), {"created": now(), "command": command, **other}]
    write_json(workdir / FILE, {**about, "continued": continued})
    if "git" in other:
      _write_diff(workdir / DIFF.format(f".{len(continued)}"))


def files_named(plain: Mapping) -> dict[str, str]:
  """{dotted key: sha256} of every file that a config names, but for the model, which has a fingerprint of its own."""
  from flax.traverse_util import flatten_dict

  named = {key: value for key, value in flatten_dict(dict(plain), sep=".").items() if isinstance(value, str) and value}
  return {key: _sha256(path) for key, path in named.items() if key != "model" and os.path.isfile(path)}


def _sha256(path: str) -> str:
  with open(path, "rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def _surroundings() -> dict:
  environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
  return {"versions": versions(), "git": git(), "hardware": hardware(), "environment": environment}


def _write_diff(path: Path) -> None:
  """The uncommitted changes, where there are any."""
  if git() and (changes := diff()):
    replace(path, changes)
