"""Hugging Face `datasets` and TFDS -> plain records. Neither package is imported before a source names it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxbias.errors import UserError, did_you_mean

FORMS = "hf:NAME[:CONFIG[:SPLIT]] or tfds:NAME[:SPLIT], NAME being a folder or a data set's name"


def is_remote(source: str) -> bool:
  return source.startswith(("hf:", "tfds:"))


def records(source: str) -> list[dict[str, Any]]:
  """The rows of one split as JSON has them, labels by their names. Raises UserError as `opened` does."""
  features, rows = opened(source)
  return [plain(row, features) for row in rows]


def opened(source: str) -> tuple[Mapping, Sequence[Mapping]]:
  """(features, rows) of one split, the rows as the package has them, read at random. SPLIT may be left out where there
  is only one.

  Raises UserError where the package, the data set or the split is not there.
  """
  kind, _, rest = source.partition(":")
  name, config, split = _parts(rest) if kind == "hf" else _tfds_parts(rest)
  if not name:
    raise UserError(f"`{source}` names no data set; it has to be {FORMS}.")
  try:
    splits = _hugging_face(name, config) if kind == "hf" else _tfds(name)
  except (UserError, KeyboardInterrupt):
    raise
  except Exception as error:  # the two packages raise nearly everything: hub, network, file and parser errors
    said = str(error).strip().partition("\n")[0]
    raise UserError(f"{source} cannot be read ({type(error).__name__}: {said}).") from None
  split = split or (next(iter(splits)) if len(splits) == 1 else "")
  if split not in splits:
    asked = f"there is no split `{split}`" if split else "name a split"
    raise UserError(f"{source}: {asked}; {did_you_mean(split, splits)}")
  features, rows = splits[split]
  return features, rows()


def plain(row: Mapping, features: Mapping) -> dict[str, Any]:
  """A row as JSON has it; a column without a feature stays as it is."""
  return {name: _plain(value, features[name] if name in features else None) for name, value in row.items()}


def _parts(rest: str) -> tuple[str, str, str]:
  name, config, split, *more = [*rest.split(":"), "", ""]
  if any(more[:-2]):
    raise UserError(f"`hf:{rest}` has too many parts; it has to be hf:NAME[:CONFIG[:SPLIT]].")
  return name, config, split


def _tfds_parts(rest: str) -> tuple[str, str, str]:
  """TFDS names may end in a version, `name/config:1.0.0`."""
  name, _, last = rest.rpartition(":")
  return (name, "", last) if name and not re.fullmatch(r"[\d.*]+", last) else (rest, "", "")


def package(module: str, package: str) -> Any:
  """An optional package. Raises UserError where it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(f"this source needs {package} ({error}): pip install {package}, or give a local file.") from None


def _hugging_face(name: str, config: str) -> dict[str, tuple[Mapping, Any]]:
  datasets = package("datasets", "datasets")
  saved = any((Path(name) / file).exists() for file in ("dataset_dict.json", "dataset_info.json"))
  name, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
  found = (datasets.load_from_disk(name) if saved
           else datasets.load_dataset(name, config or None, revision=revision or None))  # fmt: skip
  found = found if isinstance(found, dict) else {"all": found}
  return {split: (part.features, lambda part=part: part) for split, part in found.items()}


def _tfds(name: str) -> dict[str, tuple[Mapping, Any]]:
  """Through data sources, which need no TensorFlow."""
  tfds = package("tensorflow_datasets", "tensorflow-datasets")
  if Path(name).is_dir():
    builder = tfds.builder_from_directory(name)
  else:
    builder = tfds.builder(name, file_format="array_record")
    builder.download_and_prepare()
  return {split: (builder.info.features, lambda split=split: builder.as_data_source(split))
          for split in builder.info.splits}


def _plain(value: Any, feature: Any) -> Any:
  """A value as JSON has it; the numbers of a ClassLabel become its names, in lists and objects as well."""
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, bytes):
    return value.decode("utf-8")
  inner = getattr(feature, "feature", feature)  # of a list
  if isinstance(value, list):
    return [_plain(one, inner) for one in value]
  if isinstance(value, dict):
    return {key: _plain(one, inner[key] if isinstance(inner, Mapping) or hasattr(inner, "keys") else None)
            for key, one in value.items()}
  if isinstance(value, int) and not isinstance(value, bool) and hasattr(inner, "int2str"):
    return inner.int2str(value) if value >= 0 else None  # -1: not labelled
  return value
