"""What `--data` says -> the local path that each benchmark's `load` reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from jaxbias import files
from jaxbias.data import hub
from jaxbias.errors import UserError, did_you_mean
from jaxbias.evals import registry
from jaxbias.models.sources import cache_folder


def sources(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
  """{benchmark: its source}. `SOURCE` serves all, `NAME=SOURCE` a benchmark or, as `bbq=...`, those of one file.

  Raises UserError for a name that is not asked for and for a benchmark without a source.
  """
  named = dict(_pair(one, names) for one in given)
  if twice := len(given) - len(named):
    raise UserError(f"--data gives {twice + 1} sources for the same benchmarks; write NAME=PATH for each.")
  found = {name: next((named[key] for key in (name, registry.family_of(name), "") if key in named), None)
           for name in names}
  for name, source in found.items():
    if source is None:
      raise UserError(f"there is no --data for `{name}`; add --data {name}=PATH.")
  return found


def _pair(given: str, names: Sequence[str]) -> tuple[str, str]:
  """(benchmark, family or "", source); an = that belongs to a path stands behind a slash or a colon."""
  name, equals, source = given.partition("=")
  if not equals or not re.fullmatch(r"\w+", name) or Path(given).exists():
    return "", given
  keys = {*names, *map(registry.family_of, names)}
  if name not in keys:
    raise UserError(f"--data {given}: `{name}` is not among the benchmarks asked for; {did_you_mean(name, keys)}")
  return name, source


def local(source: str) -> str:
  """A path as it is. Rows of Hugging Face or TFDS are written to the cache as JSON lines, named by their content."""
  if not hub.is_remote(source):
    return source
  content = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in hub.records(source)).encode()
  name = re.sub(r"\W+", "-", source)[-60:].strip("-")
  path = cache_folder() / "datasets" / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
  if not path.exists():
    files.replace(path, content)
  return str(path)
