"""Texts of your own for the roles of an objective: the config's `data.roles`.

A role names one source, or several with their weights, and the columns to read where they are called otherwise:

  forget = "forget.jsonl"
  retain = "qa.parquet?text=answer&prompt=question"
  general = "0.8 * hf:wiki:train + 0.2 * tfds:stories:train?text=story"

A column `text` is needed; `id`, `prompt` and `domain` are read where they are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbias.data import sources
from jaxbias.data.rows import DataSet, Passage, Role, SourceUse
from jaxbias.data.tables import Listed, Table, open_table
from jaxbias.errors import UserError, did_you_mean, nearest

COLUMNS = ("text", "id", "prompt", "domain")
IN_MEMORY = 50_000  # texts of a role; those of a larger one are read and tokenised when a step asks for them
EMPTY = "empty text"

_SOURCE = re.compile(r"(?:(?P<weight>[^*]+) \* )?(?P<source>[^?]+)(?:\?(?P<columns>.*))?")


@dataclasses.dataclass(frozen=True)
class Part:
  """One source of a role: its weight among the others and {field: column} where the config says."""

  source: str
  weight: float
  columns: Mapping[str, str]


def parse(spec: str, key: str) -> tuple[Part, ...]:
  """The sources of a role. Raises UserError, naming the config's `key`, for what is none."""
  return tuple(_part(one.strip(), key) for one in spec.split(" + "))


def _part(one: str, key: str) -> Part:
  found = _SOURCE.fullmatch(one)
  if not found:
    raise UserError(f"{key}: `{one}` is no source; write SOURCE, SOURCE?text=COLUMN or WEIGHT * SOURCE.")
  try:
    weight = float(found["weight"] or 1)
  except ValueError:
    weight = math.nan
  if not 0 < weight < math.inf:
    raise UserError(f"{key}: the weight `{found['weight']}` is no positive number.")
  columns = {}
  for pair in filter(None, (found["columns"] or "").split("&")):
    name, _, column = pair.partition("=")
    if name not in COLUMNS or not column:
      raise UserError(f"{key}: `{pair}` is no FIELD=COLUMN; {did_you_mean(name, COLUMNS)}")
    columns[name] = column
  return Part(found["source"].strip(), weight, columns)


def with_roles(data: DataSet, given: Mapping[str, str]) -> DataSet:
  """The data set whose train split has the texts of `given`, {role: its sources or ""}, in place of its own.

  Where `forget` and `retain` name the same single source, texts of one row are a pair; a row without one of them is in
  neither. Raises UserError for a source that cannot be read, and for a row that is no text: file, row and column.
  """
  parts = {role: parse(spec, f"data.roles.{role}") for role, spec in given.items() if spec}
  read = {role: [_read(part, f"data.roles.{role}") for part in of_role] for role, of_role in parts.items()}
  sides = [read.get(side, ()) for side in ("forget", "retain")]
  if [len(side) for side in sides] == [1, 1] and sides[0][0].part.source == sides[1][0].part.source:
    (forget,), (retain,) = sides
    both = np.intersect1d(forget.index, retain.index, assume_unique=True)
    read |= {"forget": [forget.only(both)], "retain": [retain.only(both)]}
  roles = {role: _role(found) for role, found in read.items()}
  identity = json.dumps([data.fingerprint, *((name, use.fingerprint, use.weight) for name, role in sorted(roles.items())
                                             for use in role.sources)])  # fmt: skip
  return dataclasses.replace(data, train=dataclasses.replace(data.train, roles=roles),
                             fingerprint=hashlib.sha256(identity.encode()).hexdigest())  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Usable:
  """The rows of a table that are texts."""

  part: Part
  table: Table
  columns: Mapping[str, str]
  index: np.ndarray
  fingerprint: str  # of their content

  def __getitem__(self, i: int) -> Passage:
    row = int(self.index[i])
    return passage(self.table[row], self.columns, f"{self.part.source} row {row}", lambda: self.table.where(row))

  def only(self, index: np.ndarray) -> _Usable:
    if not len(index):
      raise UserError(f"{self.part.source}: no row has a text to forget and one to retain.")
    return dataclasses.replace(self, index=index)

  @property
  def use(self) -> SourceUse:
    rows = len(self.table)
    dropped = {EMPTY: rows - len(self.index)} if rows > len(self.index) else {}
    return SourceUse(self.part.source, self.part.weight, rows, dropped, self.fingerprint, self.table.files)


def _read(part: Part, key: str) -> _Usable:
  """One pass over a source: every row is checked before a run begins, so that no step meets a broken one."""
  wanted = [part.columns.get(name, name) for name in COLUMNS]
  table = _builtin() if part.source == "builtin" else open_table(part.source, wanted)
  columns = {}
  for name, column in zip(COLUMNS, wanted, strict=True):
    if column in table.columns:
      columns[name] = column
    elif name in part.columns or name == "text":
      raise UserError(f"{key}: {part.source} has no column `{column}`; {did_you_mean(column, table.columns)}"
                      + ("" if name in part.columns else " Say which it is: SOURCE?text=COLUMN."))  # fmt: skip
  kept, ids, content = [], [], hashlib.sha256()
  for i, record in enumerate(table):
    found = passage(record, columns, f"{part.source} row {i}", lambda i=i: table.where(i))
    if found.text[found.prefix :].strip():
      kept.append(i)
      content.update(json.dumps([found.id, found.text, found.prefix, found.domain]).encode())
    ids.append(hash(found.id))
  if not kept:
    raise UserError(f"{key}: every text of {part.source} is empty.")
  if "id" in columns:
    _check_ids(table, columns, np.array(ids), part)
  return _Usable(part, table, columns, np.array(kept), content.hexdigest())


def _builtin() -> Listed:
  texts = sources.load("builtin").train.texts
  return Listed([(f"builtin {text.id}", {"id": text.id, "text": text.text}) for text in texts], {})


def _check_ids(table: Table, columns: Mapping[str, str], hashes: np.ndarray, part: Part) -> None:
  """Raises UserError for an id that two rows have. Hashes find them in little memory, the rows themselves decide."""
  order = np.argsort(hashes, kind="stable")
  twice = np.flatnonzero(np.diff(hashes[order]) == 0)
  for a, b in zip(order[twice], order[twice + 1], strict=True):
    if table[a][columns["id"]] == table[b][columns["id"]]:
      raise UserError(f"{table.where(b)}: id `{table[b][columns['id']]}` was already used, see {table.where(a)}.")


def passage(record: Any, columns: Mapping[str, str], name: str, where: Callable[[], str]) -> Passage:
  """The text of a record. A prompt goes before it, with a space between where neither of them has one.

  Its id is `name` where there is no such column. Raises UserError for a field that is missing or no string.
  """
  value = {key: _string(record, column, key, where) for key, column in columns.items()}
  prompt, text = value.get("prompt", ""), value["text"]
  between = " " if prompt and not (prompt[-1].isspace() or text[:1].isspace()) else ""
  return Passage(value.get("id", name), prompt + between + text, len(prompt), value.get("domain", ""))


def _string(record: Any, column: str, key: str, where: Callable[[], str]) -> str:
  if not isinstance(record, Mapping):
    raise UserError(f"{where()}: an object with `{column}` is needed.")
  if column not in record:
    close = nearest(column, record)
    raise UserError(f"{where()}: `{column}` is missing{f' (there is `{close}`)' if close else ''}.")
  found = record[column]
  if key == "id" and isinstance(found, int):
    return str(found)
  if found is None and key != "id":  # an empty cell
    return ""
  if not isinstance(found, str):
    raise UserError(f"{where()}: `{column}` has to be a string, it is {found!r:.40}.")
  return found


@dataclasses.dataclass(frozen=True)
class _Joined(Sequence):
  """The texts of several sources, one source behind the other, read when asked for."""

  parts: tuple[_Usable, ...]
  begin: np.ndarray

  def __len__(self) -> int:
    return int(self.begin[-1])

  def __getitem__(self, i: int) -> Passage:
    at = int(np.searchsorted(self.begin, i, "right")) - 1
    return self.parts[at][i - int(self.begin[at])]

  def __iter__(self) -> Iterator[Passage]:
    return (part[i] for part in self.parts for i in range(len(part.index)))


def _role(found: Sequence[_Usable]) -> Role:
  lengths = [len(one.index) for one in found]
  joined = _Joined(tuple(found), np.cumsum([0, *lengths]))
  mixture = tuple((n, one.part.weight) for n, one in zip(lengths, found, strict=True)) if len(found) > 1 else ()
  return Role(tuple(joined) if len(joined) <= IN_MEMORY else joined, mixture, tuple(one.use for one in found))
