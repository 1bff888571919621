"""Which state of a text is a sample of which class: word lists, token ids or labels of one's own. NumPy only.

A class is a token id, a word of one or several pieces, or a name that the user gave to spans of the text. Its sample is
the state at the token itself (shift 0: what a masked model predicts from) or one before (shift 1: a causal model).

Axis letters: C classes, M pieces of the longest word, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbias.data import wordlists
from jaxbias.data.fields import a_row, field, json_lines, string
from jaxbias.data.pipeline import Place, Segment, Shape, place, union
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError
from jaxbias.evals import perplexity

NONE = -1  # the label of a state that is no sample


class Text(NamedTuple):
  """A text to read; `spans` are (first character, behind the last one, class) where the classes are the user's."""

  text: str
  spans: tuple[tuple[int, int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Classes:
  """`ids` int32 [C, M], -1 behind words of fewer pieces; None where the classes are spans, which have no weights.

  groups[name]: bool [C]; classes of two groups at once are in neither.
  """

  names: tuple[str, ...]
  ids: np.ndarray | None
  groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.names)

  def only(self, chosen: np.ndarray) -> Classes:
    """Those at the places `chosen`, in that order."""
    groups = {name: member_C[chosen] for name, member_C in self.groups.items()}
    names = tuple(self.names[c] for c in chosen)
    return Classes(names, None if self.ids is None else self.ids[chosen], groups)


def read_texts(path: str) -> list[Text]:
  """A text file, in passages of whole lines, or JSON lines {"text", optionally "labels": [[start, end, class], ...]}.

  Raises UserError for a malformed line and for a file without text.
  """
  if Path(path).suffix in (".jsonl", ".json"):
    texts = []
    for where, row in json_lines(path):
      with a_row():
        texts.append(_labelled(row, where))
  else:
    texts = [Text(document.text) for document in perplexity.passages(path)]
  if not texts:
    raise UserError(f"{path} holds no text.")
  return texts


def _labelled(row: object, where: str) -> Text:
  text = string(row, "text", where)
  spans = field(row, "labels", list, where) if "labels" in row else []
  for span in spans:
    whole = isinstance(span, list) and len(span) == 3 and all(isinstance(at, int) for at in span[:2])
    if not whole or not isinstance(span[2], str) or not 0 <= span[0] < span[1] <= len(text):
      raise UserError(f"{where}: the label {span} is no [start, end, class] within the {len(text)} characters of "
                      "`text`.")  # fmt: skip
  return Text(text, tuple((start, end, name) for start, end, name in spans))


# Classes


def of_words(words: str, tokenizer: Tokenizer, pieces: str) -> Classes:
  """The words of a list as `wordlists.classes` has them, and its groups, such as male and female words.

  Raises UserError where none of its words can be used.
  """
  listed = wordlists.read_groups(words)
  ids = wordlists.classes(wordlists.read_words(words), tokenizer, pieces)
  group_C, groups = wordlists.groups_of_classes(ids, listed, tokenizer, pieces), {}
  for number, name in enumerate(listed) if len(listed) > 1 else ():
    groups[name] = group_C == number
  names = tuple(tokenizer.decode([i for i in row if i >= 0]).strip() for row in ids.tolist())
  return Classes(names, ids, groups)


def of_vocabulary(size: int, tokenizer: Tokenizer, chosen: np.ndarray | None = None) -> Classes:
  """All token ids of the model, or those chosen."""
  ids = np.arange(size, dtype=np.int32) if chosen is None else np.asarray(chosen, np.int32)
  known = tokenizer.vocab_size
  return Classes(tuple(tokenizer.backend.id_to_token(int(i)) or str(i) if i < known else str(i) for i in ids),
                 ids[:, None])


def of_spans(texts: Iterable[Text]) -> Classes:
  """The names that the texts' spans bear. Raises UserError where there is no span."""
  names = tuple(sorted({name for text in texts for *_, name in text.spans}))
  if not names:
    raise UserError("no text has `labels`; give [[start, end, class], ...] to each line, or name other classes.")
  return Classes(names, None)


# Labels


class Finder:
  """Finds a class's words among token ids; where two begin at one place the longer one is meant."""

  def __init__(self, ids_CM: np.ndarray):
    length_C = (ids_CM >= 0).sum(-1)
    self.table = np.full(int(ids_CM.max(initial=0)) + 1, NONE, np.int32)
    self.table[ids_CM[length_C == 1, 0]] = np.flatnonzero(length_C == 1)
    self.longer: dict[int, list[tuple[np.ndarray, int]]] = {}
    for c in sorted(np.flatnonzero(length_C > 1), key=lambda c: -length_C[c]):
      self.longer.setdefault(int(ids_CM[c, 0]), []).append((ids_CM[c, : length_C[c]], int(c)))

  def __call__(self, ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class that begins at each token, NONE where none does, and its number of tokens; int32 [T] both."""
    label_T = np.where(ids_T < len(self.table), self.table[np.minimum(ids_T, len(self.table) - 1)], NONE)
    span_T = np.ones_like(label_T)
    for t in np.flatnonzero(np.isin(ids_T, list(self.longer))) if self.longer else ():
      word = next(((k, c) for k, c in self.longer[int(ids_T[t])] if np.array_equal(ids_T[t : t + len(k)], k)), None)
      if word:
        label_T[t], span_T[t] = word[1], len(word[0])
    return label_T, span_T


def shifted(label_T: np.ndarray, span_T: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
  """What was said of tokens, said of the states `shift` before them. The first token ([CLS], BOS) has no label."""
  label_T = np.where(np.arange(len(label_T)) == 0, NONE, label_T)
  back = lambda x_T, fill: np.concatenate([x_T[shift:], np.full(shift, fill, x_T.dtype)])
  return back(label_T, NONE), back(span_T, 1)


def _of_spans(spans, offsets, number: Mapping[str, int], pieces: str) -> tuple[np.ndarray, np.ndarray]:
  """A span's tokens are those that hold any of its characters; `pieces` is as for words."""
  label_T, span_T = np.full(len(offsets), NONE, np.int32), np.ones(len(offsets), np.int32)
  for start, end, name in spans:
    inside = [t for t, (a, b) in enumerate(offsets) if a < end and b > start]
    if inside and not (pieces == "single" and len(inside) > 1):
      label_T[inside[0]], span_T[inside[0]] = number[name], len(inside) if pieces == "pooled" else 1
  return label_T, span_T


@dataclasses.dataclass(frozen=True)
class Sampled:
  """What the model reads, and for each state the class that it is a sample of, and over how many states it is pooled.

  `text` is the text that it was cut from.
  """

  segment: Segment
  label: np.ndarray  # int32 [T], NONE
  span: np.ndarray  # int32 [T]
  text: int


def sampled(texts: Sequence[Text], classes: Classes, tokenizer: Tokenizer, causal: bool, window: int, shift: int,
            pieces: str) -> list[Sampled]:
  """Texts in windows of at most `window` tokens, each behind the start token, or between [CLS] and [SEP]."""
  before = [tokenizer.start_id] if causal else [tokenizer.special("cls")]
  behind = [] if causal else [tokenizer.special("sep")]
  room, out = window - len(before) - len(behind), []
  number = {name: c for c, name in enumerate(classes.names)} if classes.ids is None else {}
  find = None if classes.ids is None else Finder(classes.ids)
  for i, text in enumerate(texts):
    ids, offsets = tokenizer.encode_with_offsets(text.text)
    of_text = _of_spans(text.spans, offsets, number, pieces) if find is None else None
    for at in range(0, len(ids), room):
      read_T = np.array([*before, *ids[at : at + room], *behind], np.int32)
      if find is None:
        edges = ((len(before), len(behind)),)
        label_T = np.pad(of_text[0][at : at + room], edges, constant_values=NONE)
        span_T = np.minimum(np.pad(of_text[1][at : at + room], edges, constant_values=1),
                            len(read_T) - len(behind) - np.arange(len(read_T))).clip(1)  # cut at the window's end
      else:
        label_T, span_T = find(read_T)
      label_T, span_T = shifted(label_T, span_T, shift)
      inputs = len(read_T) - (shift if causal else 0)  # the last token's own state predicts nothing here
      none, positions = np.zeros(0, np.int32), np.arange(inputs, dtype=np.int32)
      segment = Segment(read_T[:inputs], positions, np.zeros_like(positions), none, none, none)
      out.append(Sampled(segment, label_T[:inputs], span_T[:inputs], i))
  return out


def counts(samples: Iterable[Sampled], classes: int) -> np.ndarray:
  """How often each class occurs, int64 [C]."""
  labels = [s.label[s.label != NONE] for s in samples]
  return np.bincount(np.concatenate([np.zeros(0, np.int32), *labels]), minlength=classes)


def renumbered(samples: Iterable[Sampled], chosen: np.ndarray, classes: int) -> list[Sampled]:
  """Labels as numbers among the classes `chosen`, NONE for the others."""
  new = np.full(classes + 1, NONE, np.int32)  # the last one is NONE's own
  new[chosen] = np.arange(len(chosen))
  return [dataclasses.replace(s, label=new[s.label]) for s in samples]


# Batches of one shape


def batches(samples: Sequence[Sampled], length: int, rows: int) -> list[tuple[list[int], list[Place], Shape]]:
  """Rows of `length` tokens, `rows` at a time: every call has one shape, so that one program serves all."""
  segments = [s.segment for s in samples]
  if not segments:
    return []
  places, need = place(segments, length)
  shape = union([need._replace(B=rows)], rows)
  out = [([], [], shape) for _ in range(-(-need.B // rows))]
  for i, at in enumerate(places):
    indices, local, _ = out[at.b // rows]
    indices.append(i)
    local.append(at._replace(b=at.b % rows))
  return out


def packed_labels(samples: Sequence[Sampled], places: Sequence[Place], shape: Shape) -> dict[str, np.ndarray]:
  """`label` and `span`, int32 [B, T], beside what `pipeline.pack` makes of the segments."""
  label_BT, span_BT = np.full((shape.B, shape.T), NONE, np.int32), np.ones((shape.B, shape.T), np.int32)
  for s, at in zip(samples, places, strict=True):
    here = np.s_[at.b, at.t : at.t + len(s.label)]
    label_BT[here], span_BT[here] = s.label, s.span
  return {"label": label_BT, "span": span_BT}
