"""Local files, their records and their fields; whatever is wrong is a `UserError` that names file, place and field."""

from __future__ import annotations

import contextlib
import contextvars
import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from jaxbias.errors import UserError, nearest

File = str | os.PathLike[str] | Traversable
Row = TypeVar("Row")
_KINDS = {str: "a string", list: "a list", dict: "an object"}


@dataclasses.dataclass
class Reading:
  """What was read: the sha256 of every file by its path, and the rows that were malformed and left out."""

  files: dict[str, str] = dataclasses.field(default_factory=dict)
  malformed: list[str] = dataclasses.field(default_factory=list)
  tolerant: bool = False


_READING: contextvars.ContextVar[Reading | None] = contextvars.ContextVar("reading", default=None)


def tolerant() -> contextlib.AbstractContextManager[Reading]:
  """Within it a malformed row is noted and left out, where elsewhere it stops the reading; files are noted, too."""
  return _reading(Reading(tolerant=True))


def noted() -> contextlib.AbstractContextManager[Reading]:
  """Within it files are noted; a malformed row stops the reading as ever."""
  return _reading(Reading())


@contextlib.contextmanager
def _reading(reading: Reading) -> Iterator[Reading]:
  token = _READING.set(reading)
  try:
    yield reading
  finally:
    _READING.reset(token)


@contextlib.contextmanager
def a_row() -> Iterator[None]:
  """Around the reading of one row: what is wrong with it ends its block, and all of the reading unless `tolerant`."""
  try:
    yield
  except UserError as error:
    reading = _READING.get()
    if not (reading and reading.tolerant):
      raise
    reading.malformed.append(str(error))


def text_file(file: File) -> str:
  """The content of a UTF-8 file, without a byte-order mark."""
  try:
    content = (Path(file) if isinstance(file, str) else file).read_bytes()
  except FileNotFoundError:
    raise UserError(f"{file}: there is no such file.") from None
  except IsADirectoryError:
    raise UserError(f"{file} is a folder, a file is needed.") from None
  except OSError as error:
    raise UserError(f"{file} cannot be read: {error.strerror}.") from None
  if reading := _READING.get():
    reading.files[str(file)] = hashlib.sha256(content).hexdigest()
  try:
    return content.decode("utf-8").removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise UserError(f"{file} line {line}: not UTF-8.") from None


def _parse(text: str, file: File, first_line: int = 1) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f"{file} line {first_line + error.lineno - 1}: not JSON ({error.msg}).") from None


def json_file(file: File) -> Any:
  return _parse(text_file(file), file)


def json_lines(file: File) -> Iterable[tuple[str, Any]]:
  """(place, row) for each line that is not blank."""
  for number, line in enumerate(text_file(file).split("\n"), start=1):
    parsed = []
    if line.strip():
      with a_row():
        parsed.append((f"{file} line {number}", _parse(line, file, number)))
    yield from parsed


def table(file: File, columns: Iterable[str], delimiter: str = ",") -> Iterable[tuple[str, dict[str, str]]]:
  """(place, {column: value}) for each row below a head line that has `columns`. Only comma-separated files quote.

  A .jsonl is a table, too: lines of objects that have `columns`.
  """
  if str(file).endswith(".jsonl"):
    yield from _table_of_objects(file, columns)
    return
  quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
  reader = csv.reader(io.StringIO(text_file(file), newline=""), delimiter=delimiter, quoting=quoting)
  try:
    head = next(reader, [])
    for column in columns:
      if column not in head:
        close = nearest(column, head)
        raise UserError(f"{file} line 1: there is no column `{column}`{f' (there is `{close}`)' if close else ''}.")
    for row in filter(None, reader):
      where, whole = f"{file} line {reader.line_num}", []
      with a_row():
        if len(row) < len(head):
          raise UserError(f"{where}: `{head[len(row)]}` is missing.")
        if len(row) > len(head):
          raise UserError(f"{where}: {len(row)} fields, but {len(head)} columns.")
        whole.append((where, dict(zip(head, row, strict=True))))
      yield from whole
  except csv.Error as error:
    raise UserError(f"{file} line {reader.line_num}: not a table ({error}).") from None


def _table_of_objects(file: File, columns: Iterable[str]) -> Iterable[tuple[str, dict[str, str]]]:
  for where, record in json_lines(file):
    whole = []
    with a_row():
      for column in columns:
        field(record, column, object, where)
      whole.append((where, {name: "" if value is None else str(value) for name, value in record.items()}))
    yield from whole


def unique(records: Iterable[tuple[str, Any]], make: Callable[[Any, str], Row]) -> list[Row]:
  """A row of each record; their ids are unique, since scores go by id."""
  rows: list[Row] = []
  seen: dict[str, str] = {}
  for where, record in records:
    with a_row():
      row = make(record, where)
      if row.id in seen:
        raise UserError(f"{where}: id `{row.id}` was already used, see {seen[row.id]}.")
      seen[row.id] = where
      rows.append(row)
  return rows


def field(row: Any, key: str, kind: type, where: object) -> Any:
  if not isinstance(row, dict):
    raise UserError(f"{where}: a JSON object with `{key}` is needed.")
  if key not in row:
    raise UserError(f"{where}: `{key}` is missing.")
  if not isinstance(row[key], kind):
    raise UserError(f"{where}: `{key}` has to be {_KINDS[kind]}.")
  return row[key]


def string(row: Any, key: str, where: object) -> str:
  """A string field that is not empty."""
  if not field(row, key, str, where).strip():
    raise UserError(f"{where}: `{key}` is empty.")
  return row[key]


def strings(row: Any, key: str, where: object) -> list[str]:
  """A list of strings, none of them empty; the list is not empty either."""
  values = field(row, key, list, where)
  if not values or not all(isinstance(value, str) and value.strip() for value in values):
    raise UserError(f"{where}: `{key}` has to be a list of strings, none of them empty.")
  return values
