"""Labelled texts for fine-tuning: GLUE's SST-2 and RTE, and any table of their columns (Wang et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxbias.data import fields
from jaxbias.data.hub import is_remote
from jaxbias.errors import UserError, did_you_mean

SUFFIXES = {".tsv": "\t", ".csv": ",", ".jsonl": ""}  # a table's delimiter
FILES = {"train": ("train",), "dev": ("dev", "validation")}  # how the name of each part's file begins
REMOTE = {"train": "train", "dev": "validation"}  # how a hub names the parts


@dataclasses.dataclass(frozen=True)
class Task:
  """What is classified: the text of one column, or of two. `labels`: names of the classes 0, 1, ..."""

  name: str
  columns: tuple[str, ...]
  labels: tuple[str, ...]
  source: str


TASKS = {
  task.name: task
  for task in (
    Task("sst2", ("sentence",), ("negative", "positive"), "Socher et al. 2013, as in GLUE"),
    Task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), "Dagan et al. 2006, as in GLUE"),
  )
}


@dataclasses.dataclass(frozen=True)
class Example:
  """`texts`: one, or a premise and its hypothesis; `label`: the number of the class."""

  id: str
  texts: tuple[str, ...]
  label: int


def get(name: str) -> Task:
  """Raises UserError with the nearest name for a task that there is not."""
  if name not in TASKS:
    raise UserError(f"there is no task `{name}`; {did_you_mean(name, TASKS)}")
  return TASKS[name]


def parts(given: Sequence[str]) -> dict[str, str]:
  """{"train": source, "dev": source} of what `--data` says: a folder with both, a data set with the splits `train` and
  `validation`, or `train=SOURCE` and `dev=SOURCE`.

  A folder's files begin with train and with dev or validation, and end in .tsv, .csv or .jsonl. Raises UserError for a
  part that is not there or is there twice.
  """
  named = {part: one.removeprefix(f"{part}=") for part in FILES for one in given if one.startswith(f"{part}=")}
  if len(named) == len(FILES) == len(given):
    return named
  if len(given) != 1 or named:
    raise UserError("--data is one folder or data set, or both of --data train=SOURCE and --data dev=SOURCE.")
  if is_remote(given[0]):
    config = ":" * (given[0].startswith("hf:") and given[0].count(":") == 1)  # left out, and yet in its place
    return {part: f"{given[0]}{config}:{split}" for part, split in REMOTE.items()}
  folder = Path(given[0]).expanduser()
  if not folder.is_dir():
    what = "is a file" if folder.exists() else "is not there"
    raise UserError(f"{folder} {what}; give a folder with train and dev files, or --data train=FILE --data dev=FILE.")
  return {part: str(_only(folder, part, begins)) for part, begins in FILES.items()}


def _only(folder: Path, part: str, begins: tuple[str, ...]) -> Path:
  found = sorted(p for p in folder.iterdir() if p.name.startswith(begins) and p.suffix in SUFFIXES)
  if not found:
    raise UserError(f"{folder} has no {' or '.join(begins)} file ({', '.join(SUFFIXES)}); name it with --data "
                    f"{part}=FILE.")  # fmt: skip
  if len(found) > 1:
    raise UserError(f"{folder} has {found[0].name} and {found[1].name}; say which with --data {part}=FILE.")
  return found[0]


def read(path: str, task: Task, part: str) -> list[Example]:
  """The examples of a table with the task's columns and `label`, a class's number or its name.

  Spaces around a text go, as the files end sentences with one, and a causal model is read at the last token. Raises
  UserError with file, line and field for a column that is missing, an empty text or another label; and for no rows.
  """
  delimiter = SUFFIXES.get(Path(path).suffix)
  if delimiter is None:
    raise UserError(f"{path}: a table ends in {', '.join(SUFFIXES)}.")
  rows = fields.table(path, (*task.columns, "label"), delimiter)
  examples = [_example(row, where, task, f"{part}-{number}") for number, (where, row) in enumerate(rows)]
  if not examples:
    raise UserError(f"{path} holds no examples, only the head line with the columns.")
  return examples


def _example(row: dict[str, str], where: str, task: Task, identity: str) -> Example:
  texts = tuple(fields.string(row, column, where).strip() for column in task.columns)
  numbers = {str(number): number for number in range(len(task.labels))}
  label = (numbers | {name: number for number, name in enumerate(task.labels)}).get(row["label"].strip())
  if label is None:
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
    raise UserError(f"{where}: `label` is `{row['label']}`; {task.name} has {known}.")
  return Example(identity, texts, label)
