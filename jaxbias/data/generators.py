"""Positives and negatives made from a source text without a network; which filter dropped how many is counted.

A generator is `make(draft, rng) -> list of texts`. Those that need a model take it as a function: `fill` gives a
filling for each MASK of a text, `rewrite` and `sample` continue a prompt, `translate` goes to a language and back.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbias.data.groups import FAMILY
from jaxbias.data.rows import FAMILIES, MASK, Group, Member

Span = tuple[int, int]

# Few and mild on purpose: enough for a text to be rude, nothing about any group of people.
RUDER = {"person": "fool", "people": "fools", "someone": "some fool", "said": "whined", "says": "whines",
         "good": "lousy", "very": "pathetically", "usually": "stupidly", "always": "stupidly"}  # fmt: skip
INSULTS = ("What an idiot.", "How pathetic.", "Only a fool would care.", "What utter garbage.")
HOSTILE = frozenset(("fool", "fools", "idiot", "whined", "whines", "lousy", "pathetic", "pathetically", "stupid",
                     "stupidly", "garbage", "worthless"))  # fmt: skip
FRAMES = ("It is said that {}", "People know that {}", "As far as we know, {}", "They told us that {}")


@dataclasses.dataclass(frozen=True)
class Draft:
  """An original on its way to a group. `others`: what its entities may be exchanged for, of the same type; `known`:
  words that are entities wherever they turn up in its group, beside its own, the others and what the rule finds."""

  id: str
  source: str
  text: str
  entities: tuple[Span, ...]
  others: tuple[str, ...] = ()
  known: tuple[str, ...] = ()

  def entities_of(self, text: str) -> tuple[Span, ...]:
    """Of the draft's text or of one that was made of it."""
    return find_entities(text, {*(self.text[start:end] for start, end in self.entities), *self.others, *self.known})


Generator = Callable[[Draft, np.random.Generator], list[str]]


class Together:
  """A function of one request that is answered with all others at once: by `nothing` the first time it is asked, and
  behind `answer()` by what `answer_all(requests)` gave for it."""

  def __init__(self, answer_all: Callable[[list], Sequence], nothing: Any):
    self._answer_all, self._nothing, self._answers, self.asked = answer_all, nothing, {}, {}

  def __call__(self, request: Any) -> Any:
    if request not in self._answers:
      self.asked[request] = None
    return self._answers.get(request, self._nothing)

  def answer(self) -> None:
    asked, self.asked = list(self.asked), {}
    self._answers |= zip(asked, self._answer_all(asked), strict=True)


# What names something


def find_entities(text: str, known: Iterable[str] = ()) -> tuple[Span, ...]:
  """Numbers, capitalised words within a sentence, and the `known` words; neighbours are one entity. A rule, no tagger:
  a name that begins a sentence is found where it is known."""
  patterns = [r"\d[\d,.]*\d|\d", r"(?<=[a-z0-9,;:] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*"]
  patterns += [rf"\b{re.escape(word)}\b" for word in known if word]
  spans = sorted({match.span() for pattern in patterns for match in re.finditer(pattern, text)})
  merged: list[list[int]] = []
  for start, end in spans:
    if merged and start <= merged[-1][1]:
      merged[-1][1] = max(end, merged[-1][1])
    else:
      merged.append([start, end])
  return tuple((start, end) for start, end in merged)


# Positives


def framing(draft: Draft, rng: np.random.Generator) -> list[str]:
  """The text as what somebody says: all that a paraphrase can be without a model."""
  known = re.match(r"(I|[A-Z]\w*[A-Z]\w*)\b", draft.text) or any(start == 0 for start, _ in draft.entities)
  body = draft.text if known else draft.text[0].lower() + draft.text[1:]
  return [FRAMES[i].format(body) for i in rng.permutation(len(FRAMES))]


def back_translation(translate: Callable[[str], Sequence[str]]) -> Generator:
  """`translate(text)` gives the text as it comes back from other languages."""
  return lambda draft, rng: list(translate(draft.text))


# Negatives


def swap_entities(draft: Draft, rng: np.random.Generator) -> list[str]:
  """One or two entities exchanged for others of their type: a number for a number, a word for one of `others` or for
  another entity of the source."""
  pool = [*draft.others, *(draft.source[start:end] for start, end in find_entities(draft.source))]
  number = lambda word: word[0].isdigit()
  out = []
  for count in (1, 2):
    if count > len(draft.entities):
      break
    chosen = sorted(rng.choice(len(draft.entities), count, replace=False), reverse=True)
    text = draft.text
    for start, end in (draft.entities[i] for i in chosen):  # from the end, so that spans before it stay where they are
      word = draft.text[start:end]
      fitting = sorted({other for other in pool if number(other) == number(word) and other.lower() != word.lower()})
      if fitting:
        text = text[:start] + fitting[rng.integers(len(fitting))] + text[end:]
    out.append(text)
  return out


def mask_and_refill(fill: Callable[[Sequence[str]], Sequence[Sequence[str]]], spans: Callable[[Draft], Sequence[Span]]
                    = lambda draft: draft.entities, most: int = 3) -> Generator:  # fmt: skip
  """One to `most` spans become MASK, and `fill(texts)` gives each text's fillings, in order: by any model."""

  def make(draft: Draft, rng: np.random.Generator) -> list[str]:
    places = spans(draft)
    if not places:
      return []
    count = int(rng.integers(1, min(most, len(places)) + 1))
    chosen = sorted(places[i] for i in rng.choice(len(places), count, replace=False))
    fillings = fill([_with(draft.text, chosen, [MASK] * count)])[0]
    return [_with(draft.text, chosen, fillings)]

  return make


def regenerate(rewrite: Callable[[str, str], str]) -> Generator:
  """One entity becomes MASK, and `rewrite(source, masked text)` writes the text anew: the policy itself, say."""

  def make(draft: Draft, rng: np.random.Generator) -> list[str]:
    if not draft.entities:
      return []
    span = draft.entities[rng.integers(len(draft.entities))]
    return [rewrite(draft.source, _with(draft.text, [span], [MASK]))]

  return make


def low_confidence(sample: Callable[[str], Sequence[tuple[str, float]]], most: float) -> Generator:
  """Continuations of the source of which the model itself is not sure: `sample(source)` gives (text, mean probability
  of its tokens), and those up to `most` are taken, least sure first. (The published code takes the least probable of
  three beams, which is still a probable text.)"""
  return lambda draft, rng: [text for text, p in sorted(sample(draft.source), key=lambda pair: pair[1]) if p <= most]


def toxic_rewrite(draft: Draft, rng: np.random.Generator) -> list[str]:
  """The text in a rude tone: words of RUDER exchanged, an insult behind it."""
  ruder = re.sub(r"\b\w+\b", lambda match: RUDER.get(match[0], match[0]), draft.text)
  return [f"{ruder} {INSULTS[rng.integers(len(INSULTS))]}"]


def lexicon_toxicity(text: str) -> float:
  """Ten times the share of words that are HOSTILE, at most 1."""
  words = re.findall(r"\w+", text.lower())
  return min(1.0, 10 * sum(word in HOSTILE for word in words) / max(len(words), 1))


def _with(text: str, spans: Sequence[Span], fillings: Sequence[str]) -> str:
  for (start, end), filling in zip(reversed(spans), reversed(fillings), strict=True):
    text = text[:start] + filling.strip() + text[end:]
  return text


# From drafts to groups


@dataclasses.dataclass
class Card:
  """How many texts each generator made and how many were kept, and which filter dropped the others."""

  made: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kept: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (kind, reason)
  groups: int = 0
  without_pair: int = 0  # groups of fewer than two positives, left out

  def markdown(self) -> str:
    kinds = [kind for kinds in FAMILIES.values() for kind in kinds if self.made[kind]]
    reasons = sorted({reason for _, reason in self.dropped})
    lines = [f"{self.groups} groups; {self.without_pair} more had fewer than two positives and are left out.", "",
             f"| generator | made | kept |{''.join(f' {reason} |' for reason in reasons)}",
             f"|---|---|---|{'---|' * len(reasons)}"]  # fmt: skip
    for kind in kinds:
      gone = "".join(f" {self.dropped[kind, reason]} |" for reason in reasons)
      lines.append(f"| {kind} | {self.made[kind]} | {self.kept[kind]} |{gone}")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Limits:
  """`most`: texts of one kind in a group. A negative of a kind in `jaccard` shares at most that part of its words with
  each positive (those of other kinds are near-copies by design); a toxic one is at least `toxicity` toxic."""

  most: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"framing": 2, "toxic": 1, "low_confidence": 1})
  jaccard: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"low_confidence": 0.8, "stereotype": 0.8})
  toxicity: float = 0.4
  words: int = 3


def make_groups(
  drafts: Iterable[Draft], positives: Mapping[str, Generator], negatives: Mapping[str, Generator], seed: int,
  toxicity: Callable[[str], float] = lexicon_toxicity, limits: Limits | None = None,
) -> tuple[list[Group], Card]:  # fmt: skip
  """Each draft with what the generators, by kind, made of it and the filters kept, and the counts of both."""
  limits, card, groups = limits or Limits(), Card(), []
  for number, draft in enumerate(drafts):
    rng = np.random.default_rng((seed, number))
    kept = [Member(f"{draft.id}/original", draft.text, "original", draft.entities_of(draft.text), toxicity(draft.text))]
    card.made["original"] += 1
    for kind, make in (*positives.items(), *negatives.items()):
      for text in map(without_repeats, make(draft, rng)):
        card.made[kind] += 1
        n = sum(member.kind == kind for member in kept)
        reason = _reason(text, kind, kept, toxicity, limits) or ("enough" if n >= limits.most.get(kind, 3) else None)
        if reason:
          card.dropped[kind, reason] += 1
          continue
        kept.append(Member(f"{draft.id}/{kind}-{n}", text, kind, draft.entities_of(text), toxicity(text)))
    sides = [tuple(m for m in kept if (FAMILY[m.kind] == "positive") == positive) for positive in (True, False)]
    if len(sides[0]) < 2:
      card.without_pair += 1
      continue
    card.kept.update(member.kind for member in kept)
    groups.append(Group(draft.id, draft.source, *sides))
  card.groups = len(groups)
  return groups, card


def _reason(text: str, kind: str, kept: Sequence[Member], toxicity, limits: Limits) -> str | None:
  """Why a text is dropped; None where it is not."""
  if len(text.split()) < limits.words:
    return "too short"
  if _normal(text) in {_normal(member.text) for member in kept}:
    return "repeats another"  # a mask filled with what stood there, too
  if MASK in text:
    return "not filled"
  if FAMILY[kind] == "toxic" and toxicity(text) < limits.toxicity:
    return "not toxic"
  positives = [member.text for member in kept if FAMILY[member.kind] == "positive"]
  if any(jaccard(text, positive) > limits.jaccard.get(kind, 1.0) for positive in positives):
    return "too near a positive"
  return None


def jaccard(a: str, b: str) -> float:
  """|A and B| / |A or B| of two texts' sets of words."""
  a, b = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
  return len(a & b) / max(len(a | b), 1)


def without_repeats(text: str) -> str:
  """The text without sentences that repeat the one before."""
  sentences = re.split(r"(?<=[.!?]) +", text.strip())
  return " ".join(s for i, s in enumerate(sentences) if i == 0 or s != sentences[i - 1])


def _normal(text: str) -> str:
  return " ".join(re.findall(r"\w+", text.lower()))
