"""Writing files so that the final name is always whole: under a temporary name first, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxbias.errors import UserError


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


def checkpoint_folder(run: Path) -> Path | None:
  """Where the checkpoints of the run in the folder `run` are: in its folder `checkpoints`, or where a file of that name
  says, which may be an address in the cloud; None for a folder that is no run's."""
  place = run / "checkpoints"
  if place.is_file():
    from etils import epath

    return epath.Path(place.read_text(encoding="utf-8").strip())
  return place.absolute() if place.is_dir() else None


def check_new(folder: Path) -> None:
  """Raises UserError unless `folder` is absent or empty."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f"{folder} exists already and is not an empty folder; give a new one, nothing was written.")


@contextlib.contextmanager
def new_folder(folder: Path, needed: int = 0) -> Iterator[Path]:
  """A temporary folder beside `folder` that takes its name at the end; a failure leaves nothing.

  Raises UserError where `folder` exists with something in it, or the disk lacks `needed` bytes.
  """
  check_new(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(folder.parent).free
  if free < needed:
    raise UserError(f"{needed / 1e6:,.0f} MB are needed in {folder.parent} and {free / 1e6:,.0f} MB are free; make "
                    "room, or give a folder on a larger disk.")  # fmt: skip
  work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
  work.mkdir()
  try:
    yield work
    os.replace(work, folder)  # an empty folder of that name gives way
  finally:
    shutil.rmtree(work, ignore_errors=True)
