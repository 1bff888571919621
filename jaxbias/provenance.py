"""What it takes to make a run again: versions, commit, hardware. Collected, never guessed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path

PACKAGES = (
  "jaxbias", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "safetensors", "gguf",
)  # fmt: skip


def versions() -> dict[str, str]:
  """Installed version of each package that a number can depend on."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def git() -> dict | None:
  """Commit of the source tree and whether it has uncommitted changes; None outside a git checkout."""
  run = lambda *args: subprocess.run(
    ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--untracked-files=no"))}
  except (OSError, subprocess.CalledProcessError):
    return None


def hardware() -> str:
  import jax

  devices = jax.devices()
  return f"{os.cpu_count()} CPU cores, {len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"


def now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
