"""Lists of words, and the tokens that stand for them: the classes of a statistic over a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxbias.data.fields import text_file
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError

PIECES = ("single", "first", "pooled")  # what becomes of a word of several pieces: left out, its first piece, all of it


def read_words(name: str) -> tuple[str, ...]:
  """`gender` (built in), a text file of one word a line, or a .json whose strings (and keys, where the values are ids)
  are the words, as deep as they may be. Sorted, each once. Raises UserError for a list of no words."""
  file = resources.files("jaxbias.data.builtin") / "gender_words.txt" if name == "gender" else Path(name).expanduser()
  content = text_file(file)
  try:
    found = set(_strings(json.loads(content)) if str(file).endswith(".json") else content.split("\n"))
  except ValueError as error:
    raise UserError(f"{file} is not JSON ({error}).") from None
  words = tuple(sorted(word.strip() for word in found if word.strip() and not word.startswith("#")))
  if not words:
    raise UserError(f"{file} holds no words.")
  return words


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
  sequences = {_inside_text(word, tokenizer) for word in words}
  if pieces == "single":
    sequences = {ids for ids in sequences if len(ids) == 1}
  elif pieces == "first":
    sequences = {ids[:1] for ids in sequences}
  if not sequences:
    raise UserError(f"none of the {len(words)} words is one token of this model; use pieces = `first` or `pooled`.")
  out = np.full((len(sequences), max(map(len, sequences))), -1, np.int32)
  for row, ids in zip(out, sorted(sequences), strict=True):
    row[: len(ids)] = ids
  return out


def _inside_text(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
  before, both = tokenizer.encode("a"), tokenizer.encode(f"a {word}")
  return tuple(both[len(before) :] if both[: len(before)] == before else tokenizer.encode(word))
