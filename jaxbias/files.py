"""Writing files so that the final name is always whole: under a temporary name first, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
  """Write `content` to `path`, folders included; a kill at any moment leaves the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
  replace(path, json.dumps(value, indent=1).encode())
