"""Rows -> what the model is asked: segments of token ids, and which of their targets make up each option.

A causal model reads a context once and its options behind it, as branches of one segment. A masked model reads a text
once for each token that counts, with that token masked: pseudo-log-likelihood (Salazar et al. 2020). Segments with the
same inputs are one segment, whoever asks; each distinct target of it is asked once.

Wanted: int [N, 2], for each token that counts its segment and its place among that segment's targets.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxbias.data.pipeline import Segment, choice_segment, text_segment
from jaxbias.data.rows import MASK, OTHER, Choice, Cloze, Running, Text
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError
from jaxbias.evals.pool import Pool

Row = Choice | Cloze | Running | Text
PREFIXED, SPLIT = BOS = ("prefixed_bos", "split_bos")
SPANS, PIECES = ("all", "shared", "different"), ("one", "each", "growing")


@dataclasses.dataclass(frozen=True)
class Asked:
  """`wanted[id]`: an array for each option; empty of a Text, whose answer is the segment `text[id]` as a whole.

  `averaged`: rows whose answer is the log of the mean probability, not the summed log-probability. `failed`: rows that
  cannot be asked, and why; they are in no other field.
  """

  segments: tuple[Segment, ...]
  wanted: dict[str, tuple[np.ndarray, ...]]
  text: dict[str, int]
  averaged: frozenset[str]
  failed: dict[str, str]
  truncated: int

  @property
  def tokens(self) -> int:
    """Inputs that the model reads, padding apart."""
    return sum(len(segment.tokens) for segment in self.segments)

  def of_options(self, values: Sequence[np.ndarray]) -> dict[str, list[tuple[np.ndarray, ...]]]:
    """Arrays over all targets, segment after segment, as arrays over the tokens of each option of each row."""
    first = np.cumsum([0, *(len(segment.target) for segment in self.segments)])
    return {identity: [tuple(value[first[where[:, 0]] + where[:, 1]] for value in values) for where in options]
            for identity, options in self.wanted.items()}


@dataclasses.dataclass(frozen=True)
class Reading:
  """How rows are read. `truncate="left"`: a text past the window loses tokens on its left; None: its row fails."""

  tokenizer: Tokenizer
  causal: bool
  max_positions: int
  bos: str = PREFIXED
  truncate: str | None = None
  switch: int | None = None  # positions past which a text is rotated by another table (LongRoPE)

  def __post_init__(self):
    if self.bos not in BOS or self.truncate not in (None, "left"):
      raise UserError(f"bos is one of {', '.join(BOS)} and truncate left or nothing, not {self.bos}, {self.truncate}.")

  def enclosing(self) -> tuple[list[int], list[int]]:
    """What stands before and behind every text, by the model's kind."""
    if self.causal:
      return [self.tokenizer.start_id] if self.bos == PREFIXED else [], []
    return [self.tokenizer.special("cls")], [self.tokenizer.special("sep")]

  def check(self) -> None:
    """Raises UserError for a tokenizer that lacks what scoring needs."""
    if self.causal:
      _ = self.tokenizer.start_id
    else:
      _ = [self.tokenizer.special(name) for name in ("mask", "cls", "sep")]


def ask(rows: Sequence[Row], reading: Reading) -> Asked:
  """Raises UserError for two rows of one id, and for a model or tokenizer that cannot answer a row of such a type."""
  if not all(isinstance(row, Text) for row in rows):
    reading.check()
  texts = list(dict.fromkeys(text for row in rows for text in _texts(row, reading)))
  ids = dict(zip(texts, reading.tokenizer.encode_batch(texts), strict=True))
  pool, wanted, text, averaged, failed, truncated = Pool(), {}, {}, set(), {}, 0
  for row in rows:
    if row.id in wanted or row.id in failed:
      raise UserError(f"two rows have the id {row.id}; ids have to be unique.")
    asking = _Asking(reading, ids, pool)
    try:
      wanted[row.id] = tuple(_ASKED[type(row)](asking, row))
    except UserError as error:
      failed[row.id] = str(error)
      continue
    truncated += asking.truncated
    if isinstance(row, Text):
      text[row.id] = asking.whole
    if isinstance(row, Cloze) and row.pieces == "growing":
      averaged.add(row.id)
  return Asked(pool.segments(), wanted, text, frozenset(averaged), failed, truncated)


def _texts(row: Row, reading: Reading) -> tuple[str, ...]:
  """The strings of a row that are tokenised."""
  if isinstance(row, Choice):
    return row.context, *row.options
  if isinstance(row, Cloze):
    return _spelled(row, reading.tokenizer), *row.options
  return (row.text,)


def _spelled(row: Cloze, tokenizer: Tokenizer) -> str:
  mask = tokenizer.backend.id_to_token(tokenizer.special("mask"))
  return row.text.replace(MASK, mask).replace(OTHER, mask)


class _Asking:
  """One row on its way into the pool."""

  def __init__(self, reading: Reading, ids: dict[str, list[int]], pool: Pool):
    self.reading, self.ids, self.pool = reading, ids, pool
    self.truncated, self.whole = False, -1

  def choice(self, row: Choice) -> list[np.ndarray]:
    _one_of("span", row.span, SPANS)
    start, end = self.reading.enclosing()
    context, options = self.ids[row.context], [self.ids[option] for option in row.options]
    _something(options)
    if row.ended:
      options = [[*option, self._end()] for option in options]
    lengths = [len(option) - self.reading.causal + len(end) for option in options]  # a last token conditions nothing
    longest = int(np.argmax(lengths))
    context = self._fit(context, len(start) + lengths[longest], f"option {longest + 1} and its context")
    counting = [range(len(option)) for option in options]
    if row.span != "all":
      texts = [start + context + option + end for option in options]
      counting = _compared(row.span, texts, len(start + context), len(end))
    if not self.reading.causal:
      before = [*start, *context]
      return [self._masked(before, option, end, kept) for option, kept in zip(options, counting, strict=True)]
    return [found[list(kept)] for found, kept in zip(self._causal(context, options), counting, strict=True)]

  def cloze(self, row: Cloze) -> list[np.ndarray]:
    _one_of("pieces", row.pieces, PIECES)
    tokenizer = self.reading.tokenizer
    (start, end), text = self.reading.enclosing(), self.ids[_spelled(row, tokenizer)]
    kinds = re.findall(f"{re.escape(MASK)}|{re.escape(OTHER)}", row.text)
    places = [i for i, token in enumerate(text) if token == tokenizer.mask_id]
    if len(places) != len(kinds) or MASK not in kinds:
      raise UserError(f"`text` needs {MASK} at least once, and each of its masks has to be one token.")
    options = [self.ids[option] for option in row.options]
    _something(options)
    asked = [place for place, kind in zip(places, kinds, strict=True) if kind == MASK]
    most = max(map(len, options)) if row.pieces != "one" else 1
    needed = len(text) + len(asked) * (most - 1)
    kept = self._fit(text[: asked[0]], needed - asked[0] + 2, "the text and its longest option")
    dropped = asked[0] - len(kept)
    asked = {place - dropped for place in asked}
    fill = lambda pieces: _filled(text[dropped:], asked, pieces, start, end)
    return [self._pieces(row.pieces, option, fill) for option in options]

  def running(self, row: Running) -> list[np.ndarray]:
    most = self.reading.max_positions
    window = row.window or most
    stride = row.stride or window
    if not 2 <= window <= most:
      raise UserError(f"windows of {window} tokens are asked for; the model has {most} positions.")
    if not 1 <= stride <= window:
      raise UserError(f"a stride of {stride} tokens leaves gaps between windows of {window}.")
    ids = self.ids[row.text]
    ids = [self.reading.tokenizer.start_id, *ids] if row.prefixed else ids
    found = [self.pool.add(text_segment(ids[begin:end], first - begin))
             for begin, first, end in rolling(len(ids), window, stride, row.prefixed)]
    if not found:
      raise UserError("the text has no token that another one precedes; there is nothing to score.")
    return [np.concatenate(found)]

  def text(self, row: Text) -> list[np.ndarray]:
    ids = self.ids[row.text]
    if not ids:
      raise UserError("the text has no tokens.")
    start, end = ([], []) if self.reading.causal else self.reading.enclosing()
    ids = self._fit(ids, len(start + end), "the text")
    self.whole = self.pool.number(_segment([*start, *ids, *end], [], []))
    return []

  def _end(self) -> int:
    if not self.reading.causal or self.reading.tokenizer.eos_id is None:
      raise UserError("the options are to end with the end-of-text token, which takes a causal model whose tokenizer "
                      "names one (`eos_token` in its tokenizer_config.json).")
    return self.reading.tokenizer.eos_id

  def _fit(self, cut: list[int], rest: int, what: str) -> list[int]:
    """`cut` without what is too much on its left, if that is allowed; `rest`: positions that stay."""
    most = self.reading.max_positions
    over = len(cut) + rest - most
    if over <= 0:
      return cut
    if self.reading.truncate != "left" or over > len(cut):
      raise UserError(f"{what} take {len(cut) + rest} positions, the model has {most}; shorten the text.")
    self.truncated = True
    return cut[over:]

  def _causal(self, context: list[int], options: list[list[int]]) -> list[np.ndarray]:
    start = self.reading.tokenizer.start_id
    if self.reading.bos == PREFIXED:
      return self._behind([start, *context], options)
    if context:
      return self._behind(context, options)
    first = {token: self._behind([start], [[token]])[0] for token, *_ in options}
    found = [first[option[0]] for option in options]
    for token in first:
      longer = [number for number, option in enumerate(options) if option[0] == token and len(option) > 1]
      if longer:
        rest = self._behind([token], [options[number][1:] for number in longer])
        for number, others in zip(longer, rest, strict=True):
          found[number] = np.concatenate([found[number], others])
    return found

  def _behind(self, context: list[int], options: list[list[int]]) -> list[np.ndarray]:
    """Each distinct option behind what all share; apart where some are so long that the model reads them otherwise."""
    distinct, switch = list(dict.fromkeys(map(tuple, options))), self.reading.switch
    long = {len(context) + len(option) - 1 > switch for option in distinct} if switch else {False}
    found = {}
    for group in ([distinct] if len(long) == 1 else [[option] for option in distinct]):
      segment, parts = choice_segment(context, [list(option) for option in group])
      where = self.pool.add(segment)
      found |= {option: where[part] for option, part in zip(group, parts, strict=True)}
    return [found[tuple(option)] for option in options]

  def _masked(self, before: list[int], option: list[int], end: list[int], kept: Sequence[int]) -> np.ndarray:
    """One copy of the text for each token that counts, with that token masked."""
    text, mask = [*before, *option, *end], self.reading.tokenizer.mask_id
    places = [len(before) + i for i in kept]
    copies = (_segment([*text[:at], mask, *text[at + 1 :]], [at], [text[at]]) for at in places)
    return np.concatenate([np.zeros((0, 2), np.int64), *map(self.pool.add, copies)])

  def _pieces(self, how: str, option: list[int], fill: Callable) -> np.ndarray:
    mask = self.reading.tokenizer.mask_id
    if how == "growing":  # of several places StereoSet asks the first
      asked = []
      for k, piece in enumerate(option):
        text, places = fill([*option[:k], mask])
        asked.append(self.pool.add(_segment(text, [places[0] + k], [piece])))
      return np.concatenate(asked)
    wanted = option[:1] if how == "one" else option
    text, places = fill([mask] * len(wanted))
    at = [place + k for place in places for k in range(len(wanted))]
    return self.pool.add(_segment(text, at, wanted * len(places)))


_ASKED = {Choice: _Asking.choice, Cloze: _Asking.cloze, Running: _Asking.running, Text: _Asking.text}


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise UserError(f"`{name}` is `{value}`, not one of {', '.join(known)}.")


def _something(options: list[list[int]]) -> None:
  if not options:
    raise UserError("the row has no options.")
  if not all(options):
    raise UserError(f"option {options.index([]) + 1} has no tokens; there is nothing to score.")


def _segment(tokens: Sequence[int], at: Sequence[int], target: Sequence[int]) -> Segment:
  ints = lambda x: np.asarray(x, np.int32)
  return Segment(*map(ints, (tokens, range(len(tokens)), [0] * len(tokens), at, target, [])))


def _filled(text: Sequence[int], asked: set[int], pieces: list[int], start: list[int], end: list[int]):
  """The text with `pieces` at each place that is asked, and where they begin."""
  out, places = list(start), []
  for i, token in enumerate(text):
    if i in asked:
      places.append(len(out))
      out += pieces
    else:
      out.append(token)
  return out + end, places


def _compared(span: str, texts: Sequence[Sequence[int]], before: int, behind: int) -> list[list[int]]:
  """The tokens of each option that the two texts share, or in which they differ; an option's text has `before` tokens
  before it and `behind` tokens after it. Found over the whole texts, as CrowS-Pairs' metric.py does."""
  if len(texts) != 2:
    raise UserError(f"`span` {span} compares two options, the row has {len(texts)}.")
  kept: tuple[list[int], list[int]] = ([], [])
  for tag, *bounds in difflib.SequenceMatcher(None, *texts).get_opcodes():
    if (tag == "equal") == (span == "shared"):
      kept[0].extend(range(*bounds[:2]))
      kept[1].extend(range(*bounds[2:]))
  inside = lambda found, text: [i - before for i in found if before <= i < len(text) - behind]
  return [inside(found, text) for found, text in zip(kept, texts, strict=True)]


def rolling(tokens: int, window: int, stride: int, prefixed: bool) -> list[tuple[int, int, int]]:
  """(begin, first, end) of each window: tokens[first:end] are scored given those from `begin` on.

  prefixed: `window` inputs, as lm-evaluation-harness' rolling log-likelihood; the last window reaches back as far as
  it can. Otherwise `window` tokens, the first of which is context, as in Hugging Face's recipe for fixed-length models.
  """
  out, done = [], 1
  if prefixed:
    while done < tokens:
      end = min(done + (stride if out else window), tokens)
      out.append((max(0, end - 1 - window), done, end))
      done = end
    return out
  for begin in range(0, tokens, stride):
    end = min(begin + window, tokens)
    first = max(done, begin + 1)
    if first < end:
      out.append((begin, first, end))
    done = end
    if end == tokens:
      break
  return out
