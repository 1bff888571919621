"""The texts that fairness training reads, and those of its two controls, as nested subsets of one pool.

| corpus | its texts |
|---|---|
| two_sided | n gendered texts, each with its swapped twin (counterfactual data augmentation) |
| one_sided | the swapped twins alone of n texts that agree with a stereotype |
| unswapped | control K1: the gendered texts of `two_sided`, as they are |
| random | control K2: n texts of the pool, gendered or not |

F_all(two_sided) - F_all(unswapped) is what the objective costs, F_all(unswapped) - F_all(random) what it costs to read
gendered text only. n counts source texts, and a smaller n takes a part of what a larger one takes. Source: Liu et al.
2025, arXiv 2509.21456, as reconstructed in docs/diagnosis.md; the controls are ours.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxbias.data.fields import File, json_lines, string, unique
from jaxbias.data.rows import DataSet, Split, Text
from jaxbias.data.swap import STEREOTYPED, UNPAIRED, Swapper
from jaxbias.errors import UserError, did_you_mean

CORPORA = ("two_sided", "one_sided", "unswapped", "random")
GRAM = 13  # words in common that make two texts overlap

_WORD = re.compile(r"[a-z0-9']+")
_PRONOUNS = {"him": "he", "his": "he", "her": "she", "hers": "she"}  # counted with these, as they have no roles there


@dataclasses.dataclass(frozen=True)
class Card:
  """What a corpus is made of. `male`, `female`: their words in its texts, by word; pronouns of one gender together."""

  corpus: str
  seed: int
  pool: int  # texts before anything was left out
  overlapping: int  # left out of the pool: they share 13 words, or all, with an evaluation text
  unpaired: int  # of the rest, with a gendered word that has no partner: they are in `random` alone
  eligible: int
  sources: int  # n
  texts: int
  words: int
  male: Mapping[str, int]
  female: Mapping[str, int]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"male": dict(self.male), "female": dict(self.female)}

  def markdown(self) -> str:
    """A table of one column, and the ten commonest words of both sides."""
    rows = [("corpus", self.corpus), ("seed", self.seed), ("texts in the pool", self.pool),
            ("left out: overlap with evaluation", self.overlapping), ("set apart: no partner", self.unpaired),
            ("eligible", self.eligible), ("source texts", self.sources), ("texts", self.texts), ("words", self.words)]
    rows += [(f"{side} words", f"{sum(words.values())} ({_commonest(words)})") for side, words in
             (("male", self.male), ("female", self.female))]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _commonest(words: Mapping[str, int]) -> str:
  return ", ".join(f"{word} {count}" for word, count in collections.Counter(words).most_common(10)) or "none"


@dataclasses.dataclass(frozen=True)
class Pool:
  """Running text that corpora are drawn from, without what evaluation reads; `overlapping` texts were left out."""

  texts: tuple[Text, ...]
  overlapping: int = 0


def read_texts(path: File) -> tuple[Text, ...]:
  """JSON lines {"id", "text"}. Raises UserError for a file of none."""
  rows = unique(json_lines(path), lambda row, where: Text(string(row, "id", where), string(row, "text", where)))
  if not rows:
    raise UserError(f"{path} holds no texts.")
  return tuple(rows)


def make(pool: Pool, corpus: str, n: int, seed: int, *, swapper: Swapper | None = None,
         stereotyped: Mapping[str, str] = STEREOTYPED) -> tuple[list[Text], Card]:  # fmt: skip
  """One of `CORPORA` from n source texts, and its card. D_n is part of D_m for n < m and the same seed.

  Raises UserError for an unknown corpus, or where fewer than n texts are eligible.
  """
  if corpus not in CORPORA:
    raise UserError(f"there is no corpus `{corpus}`; {did_you_mean(corpus, CORPORA)}")
  swapper = swapper or Swapper()
  paired = [text for text in pool.texts if UNPAIRED.isdisjoint(words_of(text.text))]
  eligible = {
    "random": lambda: pool.texts,
    "one_sided": lambda: [text for text in paired if agrees(text.text, swapper, stereotyped)],
  }.get(corpus, lambda: [text for text in paired if swapper.found(text.text)])()
  if not 0 < n <= len(eligible):
    raise UserError(f"{n} source texts are asked of the corpus `{corpus}`, and the pool has {len(eligible)} for it; "
                    "give a larger pool or a smaller n.")  # fmt: skip
  chosen = in_order(eligible, seed)[:n]
  twins = [Text(f"{text.id}/swapped", swapper(text.text)) for text in chosen]
  texts = {"two_sided": [*chosen, *twins], "one_sided": twins}.get(corpus, chosen)
  counts = {"male": collections.Counter(), "female": collections.Counter()}
  for text in texts:
    for found in swapper.found(text.text):
      word = text.text[found.start : found.end].lower()
      counts[found.side][_PRONOUNS.get(word, word)] += 1
  words = sum(len(words_of(text.text)) for text in texts)
  card = Card(corpus, seed, len(pool.texts) + pool.overlapping, pool.overlapping, len(pool.texts) - len(paired),
              len(eligible), n, len(texts), words, **counts)  # fmt: skip
  return texts, card


def in_order(texts: Sequence[Text], seed: int) -> list[Text]:
  """By a hash of seed and content, so that neither the file's order nor the other texts decide who comes first."""
  return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}|{text.text}".encode()).digest())


def agrees(text: str, swapper: Swapper, stereotyped: Mapping[str, str] = STEREOTYPED) -> bool:
  """Whether a text holds a stereotyped word, and every gendered word of it is of the gender that one expects of it."""
  expected = {stereotyped[word] for word in words_of(text) if word in stereotyped}
  return len(expected) == 1 and {found.side for found in swapper.found(text)} == expected


def words_of(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def disjoint(pool: Iterable[Text], evaluation: Iterable[str], swapper: Swapper | None = None) -> Pool:
  """The pool without texts of which an evaluation text shares 13 words in a row, or all of its own if it has fewer.

  A text's swapped twin counts as well, whatever the corpus, so that all corpora have one pool.
  """
  swapper = swapper or Swapper()
  overlaps, pool = overlaps_with(evaluation), list(pool)
  kept = tuple(text for text in pool if not overlaps(text.text) and not overlaps(swapper(text.text)))
  return Pool(kept, len(pool) - len(kept))


def overlaps_with(evaluation: Iterable[str]) -> Callable[[str], bool]:
  """Whether a text shares 13 words in a row with one of `evaluation`, or all words of one that has fewer."""
  grams: dict[int, set[tuple[str, ...]]] = collections.defaultdict(set)
  for words in map(words_of, evaluation):
    if words:
      grams[min(len(words), GRAM)].update(_grams(words, min(len(words), GRAM)))
  return lambda text: any(
    gram in known for words in [words_of(text)] for size, known in grams.items() for gram in _grams(words, size))


def _grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
  return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def evaluated(split: Split) -> Iterator[str]:
  """Every sentence that a split's metrics read."""
  yield from (sentence for triple in split.triples for sentence in triple.sentences)
  yield from (text.text for text in split.texts)


def with_pool(data: DataSet, texts: Sequence[Text], watched: Sequence[Text] = ()) -> DataSet:
  """The data set whose train split has `texts` to make corpora of, without those that the other splits evaluate, or
  that are watched."""
  read = (text.text for text in watched)
  pool = disjoint(texts, [*evaluated(data.validation), *evaluated(data.test), *read])
  return dataclasses.replace(data, train=dataclasses.replace(data.train, pool=pool.texts, overlapping=pool.overlapping))
