"""A work folder belongs to one config: claimed before anything slow, refused to another.

  config.json  provenance.json  provenance.diff, and what the command computes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from jaxbias import config as configs
from jaxbias import provenance
from jaxbias.errors import UserError
from jaxbias.files import write_json


def claim(workdir: Path, plain: Mapping, command: str) -> None:
  """Make `workdir` this config's, or find that it is. Raises UserError naming the keys that differ.

  A folder that an earlier command claimed without computing anything (a typo in the model's name) is claimed anew.
  """
  path = workdir / "config.json"
  if workdir.parts and workdir.parts[0] in ("gs:", "s3:"):
    raise UserError(f"{workdir} is no folder on a disk; give one as --workdir, and let --config.train.checkpoints name "
                    "the bucket: it can hold the checkpoints.")  # fmt: skip
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"{workdir} is a file; choose another --workdir.")
  keys = configs.differing_keys(plain, _read_config(path)) if path.exists() else []
  if path.exists() and not keys and (workdir / provenance.FILE).exists():
    return
  if keys and computed(workdir):
    more = f"; and {len(keys) - 4} more" if len(keys) > 4 else ""
    raise UserError(f"{workdir} belongs to another config ({'; '.join(keys[:4])}{more}); choose another --workdir.")
  if not path.exists() and computed(workdir):
    raise UserError(f"{workdir} is not empty and holds no config.json of a run; choose another --workdir.")
  workdir.mkdir(parents=True, exist_ok=True)
  provenance.claim(workdir, plain, command)
  write_json(path, plain)


def computed(workdir: Path) -> bool:
  """Whether anything is there beside what a claim writes."""
  ours = ("config.json", provenance.FILE, provenance.DIFF.format("*"), ".*.tmp")
  return workdir.exists() and any(not any(p.match(name) for name in ours) for p in workdir.iterdir())


def _read_config(path: Path) -> dict:
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    config = None
  if not isinstance(config, dict):
    raise UserError(f"{path} is not the config of a run; choose another --workdir.")
  return config
