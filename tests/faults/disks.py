"""Disks of a few kilobytes, for tests that fill them."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def disk(path: Path, size: str):
  """A small disk of its own at `path`, where this process may make one."""
  path.mkdir()
  try:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
  except FileNotFoundError:
    pytest.skip("there is no mount here")
  if made.returncode:
    pytest.skip(f"no file system may be mounted here: {made.stderr.decode().strip()}")
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", path], check=True)
