"""The launchers, run as people run them, mostly against a `jaxbias` of a few lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"


def stub(folder: Path, code: str) -> Path:
  """A folder in which `python -m jaxbias` runs `code`, with the arguments in `sys.argv`."""
  (folder / "jaxbias").mkdir(parents=True)
  (folder / "jaxbias" / "__main__.py").write_text(code)
  return folder


def program(folder: Path, name: str, code: str) -> dict[str, str]:
  """An environment in which a program of this name is a few lines of bash."""
  path = folder / "bin" / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/bash\n{code}")
  path.chmod(0o755)
  return {"PATH": f"{path.parent}:{os.environ['PATH']}"}


def start(*command: object, where: Path = REPOSITORY, **environment: str) -> subprocess.Popen:
  """A launcher by its file name, left running."""
  file, *arguments = map(str, command)
  runner = [sys.executable] if file.endswith(".py") else ["bash"]
  return subprocess.Popen([*runner, str(LAUNCH / file), *arguments], cwd=where, env=os.environ | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)  # fmt: skip


def run(*command: object, where: Path = REPOSITORY, **environment: str):
  """A launcher to its end: exit code, stdout and stderr."""
  process = start(*command, where=where, **environment)
  try:
    out, err = process.communicate(timeout=120)
  finally:
    process.kill()
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)
