"""The row types that every data source yields and every recipe and benchmark reads. No tensors, no jax."""

from __future__ import annotations

import dataclasses

LABELS = ("stereotype", "anti-stereotype", "unrelated")


@dataclasses.dataclass(frozen=True)
class Triple:
  """One context with three fillings, as in StereoSet's intrasentence task (Nadeem et al. 2021).

  `sentences` are whole texts in the order of `LABELS`. `prefix` is the number of characters before the
  filling (the blank's position, without the space before it): what comes after it is the answer span.
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
  """A row to be scored: every option is read after the same context (which may be empty)."""

  id: str
  context: str
  options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
  """What one split of a data set holds."""

  triples: tuple[Triple, ...]
  texts: tuple[Text, ...]


@dataclasses.dataclass(frozen=True)
class DataSet:
  """Train, validation and test; no target term is in two of them. `fingerprint` is a sha256 of the content."""

  name: str
  train: Split
  validation: Split
  test: Split
  fingerprint: str
