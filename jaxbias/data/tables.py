"""Sources of records, whatever they are: JSON, JSON lines, CSV, Parquet, Hugging Face `datasets`, TFDS.

Each is a sequence of plain records that is read at random: JSON lines by their offsets in the file, data sets saved by
`datasets` and TFDS's ArrayRecord files where they lie on disk; JSON, CSV and the wanted columns of Parquet in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxbias.data import fields, hub
from jaxbias.errors import UserError

FORMS = f"a .jsonl, .json, .csv, .tsv or .parquet file, `builtin`, {hub.FORMS}"
NEWLINE = ord("\n")
BATCH = 1024  # records that are read at a time in a pass over all


class Table(Protocol):
  """Records by number. `columns`: of the first one, or of the schema; `where` names the place of a record."""

  columns: tuple[str, ...]
  files: Mapping[str, str]  # the sha256 of each local file by its path

  def __len__(self) -> int: ...
  def __getitem__(self, i: int) -> Mapping[str, Any]: ...
  def __iter__(self) -> Iterator[Mapping[str, Any]]: ...
  def where(self, i: int) -> str: ...


def open_table(source: str, wanted: Sequence[str]) -> Table:
  """The records of a source; of files with columns only the `wanted` ones are sure to be there.

  Raises UserError for a source that is none of FORMS or cannot be read, and for one without records.
  """
  if hub.is_remote(source):
    table = _of_hub(source, wanted)
  else:
    path = Path(source).expanduser()
    if path.is_dir():
      raise UserError(f"{path} is a folder; give a file, or hf:{path} for one of `datasets`, tfds:{path} for TFDS.")
    readers = {".jsonl": Lines, ".json": _json, ".csv": _table, ".tsv": _table,
               ".parquet": lambda path: _parquet(path, wanted)}  # fmt: skip
    if path.suffix not in readers:
      raise UserError(f"`{source}` is no source of texts; give {FORMS}.")
    if not path.is_file():
      raise UserError(f"{path}: there is no such file.")
    table = readers[path.suffix](path)
  if not len(table):
    raise UserError(f"{source} holds no rows.")
  return table


class Listed:
  """Records in memory, with the place of each."""

  def __init__(self, records: Sequence[tuple[str, Mapping[str, Any]]], files: Mapping[str, str]):
    self._records, self.files = records, files
    first = records[0][1] if records else {}
    self.columns = tuple(first) if isinstance(first, Mapping) else ()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Mapping[str, Any]:
    return self._records[i][1]

  def __iter__(self):
    return (record for _, record in self._records)

  def where(self, i: int) -> str:
    return self._records[i][0]


class Lines:
  """JSON lines, mapped into memory; one pass finds where each begins, and the file's hash."""

  def __init__(self, path: Path):
    self._path, offset, begins = path, 0, []
    digest = hashlib.sha256()
    with path.open("rb") as file:
      for line in file:
        digest.update(line)
        if line.strip():
          begins.append((offset, offset + len(line)))
        offset += len(line)
    self._spans = np.array(begins, np.int64).reshape(-1, 2)
    self._bytes = np.memmap(path, np.uint8, "r") if offset else np.zeros(0, np.uint8)
    self.files = {str(path): digest.hexdigest()}
    first = self[0] if len(self) else {}
    self.columns = tuple(first) if isinstance(first, Mapping) else ()

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, i: int) -> Mapping[str, Any]:
    begin, end = self._spans[i]
    try:
      return json.loads(self._bytes[begin:end].tobytes().decode("utf-8").removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
      raise UserError(f"{self.where(i)}: not JSON ({error.msg}).") from None
    except UnicodeDecodeError:
      raise UserError(f"{self.where(i)}: not UTF-8.") from None

  def __iter__(self):
    return (self[i] for i in range(len(self)))

  def where(self, i: int) -> str:
    return f"{self._path} line {np.count_nonzero(self._bytes[: self._spans[i][0]] == NEWLINE) + 1}"


class Columns:
  """A pyarrow table; its features name the labels that it has as numbers."""

  def __init__(self, name: str, columns: Sequence[str], table: Any, features: Mapping, files: Mapping[str, str]):
    self._name, self._table, self._features = name, table, features
    self.columns, self.files = tuple(columns), files

  def __len__(self) -> int:
    return self._table.num_rows

  def __getitem__(self, i: int) -> Mapping[str, Any]:
    return next(self._plain(self._table.slice(int(i), 1)))

  def __iter__(self):
    for batch in self._table.to_batches(max_chunksize=BATCH):
      yield from self._plain(batch)

  def _plain(self, rows: Any) -> Iterator[Mapping[str, Any]]:
    for record in rows.to_pylist():
      yield hub.plain(record, self._features)

  def where(self, i: int) -> str:
    return f"{self._name} row {i}"


class Source:
  """A data source of TFDS."""

  files: Mapping[str, str] = {}

  def __init__(self, name: str, records: Sequence[Mapping[str, Any]], features: Mapping):
    self._name, self._records, self._features = name, records, features
    self.columns = tuple(features)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Mapping[str, Any]:
    try:
      record = self._records[int(i)]
    except Exception as error:  # the reader's own, for a damaged file
      raise UserError(f"{self.where(i)} cannot be read ({type(error).__name__}: {error}).") from None
    return hub.plain(record, self._features)

  def __iter__(self):
    return (self[i] for i in range(len(self)))

  def where(self, i: int) -> str:
    return f"{self._name} row {i}"


def _json(path: Path) -> Listed:
  with fields.noted() as reading:
    found = fields.json_file(path)
  if not isinstance(found, list):
    raise UserError(f"{path}: a list of objects is needed; give JSON lines a name that ends in .jsonl.")
  return Listed([(f"{path} row {i}", record) for i, record in enumerate(found)], reading.files)


def _table(path: Path) -> Listed:
  with fields.noted() as reading:
    records = list(fields.table(path, (), "," if path.suffix == ".csv" else "\t"))
  return Listed(records, reading.files)


def _parquet(path: Path, wanted: Sequence[str]) -> Columns:
  parquet = hub.package("pyarrow.parquet", "pyarrow")
  try:
    names = parquet.read_schema(path).names
    table = parquet.read_table(path, columns=[name for name in names if name in wanted], memory_map=True)
    table.validate(full=True)
  except Exception as error:  # damaged files raise nearly everything
    said = str(error).strip().partition("\n")[0]
    raise UserError(f"{path} is not a whole Parquet file ({type(error).__name__}: {said}); write it again.") from None
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return Columns(str(path), names, table, {}, {str(path): digest})


def _of_hub(source: str, wanted: Sequence[str]) -> Table:
  features, rows = hub.opened(source)
  if not source.startswith("hf:"):
    return Source(source, rows, features)
  if not hasattr(rows, "select_columns"):
    raise UserError(f"{source} is a stream; rows are read at random, so give a data set that is on disk.")
  names = list(rows.column_names)
  return Columns(source, names, rows.select_columns([name for name in names if name in wanted]).with_format("arrow")[:],
                 features, {})  # fmt: skip
