"""Lists of words, and the tokens that stand for them: the classes of a statistic over a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxbias.data.fields import text_file
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError

PIECES = ("single", "first", "pooled")  # what becomes of a word of several pieces: left out, its first piece, all of it
BUILT_IN = {"gender": "gender_words.json", "occupations": "occupation_words.txt"}


def read_words(name: str) -> tuple[str, ...]:
  """The words of all groups of `read_groups`, sorted, each once."""
  return tuple(sorted({word for words in read_groups(name).values() for word in words}))


def read_groups(name: str) -> dict[str, tuple[str, ...]]:
  """{group: its words, sorted, each once}, in the order of the list.

  `gender` and `occupations` are built in; else a text file of one word a line, which is one group, "", or a .json. An
  object of lists or objects is a group a key; strings (and keys, where the values are ids) are words, as deep as they
  may be. Raises UserError for a list of no words.
  """
  file = resources.files("jaxbias.data.builtin") / BUILT_IN[name] if name in BUILT_IN else Path(name).expanduser()
  content = text_file(file)
  try:
    parsed = json.loads(content) if str(file).endswith(".json") else content.split("\n")
  except ValueError as error:
    raise UserError(f"{file} is not JSON ({error}).") from None
  grouped = isinstance(parsed, dict) and all(isinstance(inner, dict | list) for inner in parsed.values())
  found = {key: _words(inner) for key, inner in (parsed.items() if grouped else [("", parsed)])}
  if not any(found.values()):
    raise UserError(f"{file} holds no words.")
  return found


def _words(value: Any) -> tuple[str, ...]:
  return tuple(sorted({word.strip() for word in _strings(value) if word.strip() and not word.startswith("#")}))


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, list):
    for inner in value:
      yield from _strings(inner)
  elif isinstance(value, dict):
    for key, inner in value.items():
      yield from [key] if isinstance(inner, int) else _strings(inner)


def classes(words: Sequence[str], tokenizer: Tokenizer, pieces: str) -> np.ndarray:
  """Token ids of every class, int32 [C, M], -1 behind those of fewer pieces; no class twice, in the order of ids.

  A word is spelled as it stands behind another one. `first` is the published way: with most vocabularies a good part
  of its classes are fragments that belong to other words, too. Raises UserError where no class is left.
  """
  sequences = _sequences(words, tokenizer, pieces)
  if not sequences:
    raise UserError(f"none of the {len(words)} words is one token of this model; use pieces = `first` or `pooled`.")
  out = np.full((len(sequences), max(map(len, sequences))), -1, np.int32)
  for row, ids in zip(out, sorted(sequences), strict=True):
    row[: len(ids)] = ids
  return out


def groups_of_classes(
  ids_CM: np.ndarray, groups: Mapping[str, Sequence[str]], tokenizer: Tokenizer, pieces: str
) -> np.ndarray:
  """The number of each class's group, int32 [C]; -1 for a class of several groups, such as a fragment of two words."""
  members = [_sequences(words, tokenizer, pieces) for words in groups.values()]
  of = [[n for n, group in enumerate(members) if tuple(i for i in ids if i >= 0) in group] for ids in ids_CM.tolist()]
  return np.array([found[0] if len(found) == 1 else -1 for found in of], np.int32)


def _sequences(words: Sequence[str], tokenizer: Tokenizer, pieces: str) -> set[tuple[int, ...]]:
  sequences = {_inside_text(word, tokenizer) for word in words}
  if pieces == "single":
    return {ids for ids in sequences if len(ids) == 1}
  return {ids[:1] for ids in sequences} if pieces == "first" else sequences


def _inside_text(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
  before, both = tokenizer.encode("a"), tokenizer.encode(f"a {word}")
  return tuple(both[len(before) :] if both[: len(before)] == before else tokenizer.encode(word))
