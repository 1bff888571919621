"""The row types that every data source yields and every recipe and benchmark reads. No tensors, no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
MASK, OTHER = "[MASK]", "[OTHER]"  # the places of a Cloze; what the tokenizer calls them is the scorer's business
LABELS = ("stereotype", "anti-stereotype", "unrelated")
FAMILIES = {  # which generator made a row of a group, by family: negatives are drawn from each in turn
  "positive": ("original", "back_translation", "framing"),
  "toxic": ("toxic",),
  "low_confidence": ("low_confidence",),
  "entity": ("swap_ent", "mask_ent", "mask_rel", "regen_ent", "regen_rel"),
  "stereotype": ("stereotype",),
}
KINDS = tuple(kind for kinds in FAMILIES.values() for kind in kinds)


@dataclasses.dataclass(frozen=True)
class Triple:
  """One context with three fillings, as in StereoSet's intrasentence task (Nadeem et al. 2021).

  `sentences` are whole texts in the order of `LABELS`. `prefix` is the number of characters before the
  filling (the blank's position, without the space before it): what comes after it is the answer span.
  In the intersentence task the sentences follow `context`, which has no BLANK, and `prefix` is 0; as texts to be
  trained on they are whole, too, context and all, and `prefix` is the context's length.
  """

  id: str
  domain: str  # gender, profession, race, religion
  term: str  # the target term: splits and bootstrap resampling go by it
  context: str  # holds BLANK once (two of StereoSet's hold it twice)
  sentences: tuple[str, str, str]
  prefix: int

  @property
  def stereotype(self) -> str:
    return self.sentences[0]

  @property
  def anti_stereotype(self) -> str:
    return self.sentences[1]

  @property
  def unrelated(self) -> str:
    return self.sentences[2]


@dataclasses.dataclass(frozen=True)
class Text:
  """A piece of running text without labels: neutral facts, held-out prose."""

  id: str
  text: str


@dataclasses.dataclass(frozen=True)
class Choice:
  """A row to be scored: every option is read after the same context (which may be empty).

  `span` says which of an option's tokens count: "all" of them, those that two options have in common ("shared") or
  those in which they differ ("different"); found by difflib's SequenceMatcher on token ids, as CrowS-Pairs does.
  `ended`: the end-of-text token is the last token of every option, scored like the others (causal models).
  """

  id: str
  context: str
  options: tuple[str, ...]
  span: str = "all"
  ended: bool = False


@dataclasses.dataclass(frozen=True)
class Cloze:
  """A sentence that a masked model completes. `text` holds MASK where an option goes, once or several times.

  An option of k pieces is scored by `pieces`: "one" asks a single MASK for its first piece; "each" writes k MASKs and
  asks each for its piece; "growing" asks k times for the next piece behind those before it (StereoSet's way), and
  then the answer is the log of the mean probability. Other MASKs, spelled OTHER, stay masked and are not asked.
  """

  id: str
  text: str
  options: tuple[str, ...]
  pieces: str = "each"


@dataclasses.dataclass(frozen=True)
class Running:
  """Running text, scored whole in rolling windows of the model's size.

  `window` and `stride` in tokens (0: the model's window; stride = window, disjoint). `prefixed`: the first token is
  predicted from the start token, too; otherwise it is context only.
  """

  id: str
  text: str
  window: int = 0
  stride: int = 0
  prefixed: bool = True


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text to be continued: `samples` continuations of at most `max_tokens` tokens. temperature 0 is greedy."""

  id: str
  text: str
  max_tokens: int
  samples: int = 1
  temperature: float = 0.0
  top_p: float = 1.0
  stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Member:
  """One text of a group. `entities` are its (start, end) characters that name somebody or something; `kind` is the
  generator that made it, one of KINDS; `toxicity`, 0 to 1, is what a classifier or lexicon found in it."""

  id: str
  text: str
  kind: str
  entities: tuple[tuple[int, int], ...] = ()
  toxicity: float = 0.0


@dataclasses.dataclass(frozen=True)
class Group:
  """The texts made from one source, which each of them follows: positives keep its meaning, the first of them being
  the original; negatives do not, or are toxic."""

  id: str
  source: str
  positives: tuple[Member, ...]
  negatives: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Passage:
  """A text as a source of a role has it. What follows its first `prefix` characters is the part that losses score."""

  id: str
  text: str
  prefix: int
  domain: str = ""


@dataclasses.dataclass(frozen=True)
class SourceUse:
  """What was taken from a source: its weight in the role, its rows, how many were left out and why, a sha256 of the
  rest's content, and of its local files by their paths."""

  source: str
  weight: float
  rows: int
  dropped: Mapping[str, int]
  fingerprint: str
  files: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Role:
  """The texts that a config gives a role: a tuple, or a sequence that reads each when it is asked for.

  `mixture`: (texts, weight) of each source, one behind the other in `passages`; () where there is one source.
  """

  passages: Sequence[Passage]
  mixture: tuple[tuple[int, float], ...]
  sources: tuple[SourceUse, ...]

  def rows(self, make: Callable[[Passage], T]) -> Sequence[T]:
    """`make` of each text: now for a tuple, by Grain when it is asked for otherwise."""
    if isinstance(self.passages, tuple):
      return tuple(map(make, self.passages))
    import grain  # takes a second

    return grain.MapDataset.source(self.passages).map(make)


@dataclasses.dataclass(frozen=True)
class Split:
  """What one split of a data set holds."""

  triples: tuple[Triple, ...]
  texts: tuple[Text, ...]
  groups: tuple[Group, ...] = ()
  pool: tuple[Text, ...] = ()  # what fairness corpora are made of; `overlapping` texts with evaluation are not in it
  overlapping: int = 0
  roles: Mapping[str, Role] = dataclasses.field(default_factory=dict)  # read in place of a method's own texts
  dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # triples left out of it, by the reason


@dataclasses.dataclass(frozen=True)
class DataSet:
  """Train, validation and test; no target term is in two of them. `fingerprint` is a sha256 of the content, `files` are
  those that were read, with theirs."""

  name: str
  train: Split
  validation: Split
  test: Split
  fingerprint: str
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
