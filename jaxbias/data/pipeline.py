"""From token lists to packed batches: deterministic, random-access, numpy until the last step.

A *segment* is one text, or several options behind their shared context. Segments are packed side by side into
rows of one length, so that few positions are padding and few shapes are compiled. Which texts a step reads is a
function of (seed, step): there is nothing to save but the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
ROW_LENGTHS = tuple(n for k in range(4, 16) for j in range(8, 16) if (n := 2**k * j // 8) % 8 == 0)  # of packed rows
PASS_TOKENS = 1024  # tokens a device reads in one call of a pass over a data set, rows permitting
PASS_LENGTH = 128  # a pass packs into rows of at least this many tokens, or of a shard's share if that is less
PASS_CLASSES = (PASS_LENGTH, 2 * PASS_LENGTH, 4 * PASS_LENGTH, 2**31)  # the longest segments that share a row length
ATTENTION = 2048  # tokens in a row at which attention costs about as much as all the rest, in a small model
STEP_ATTENTION = 512  # the same of a training step, with the passes over its probabilities
HEAD = 1 / 8  # a product of one position with the vocabulary, beside a token's way through the layers and back
SLACK = 1.5  # of scored positions in a row
SLACKS = (1.0, 1.1, 1.2, 1.5, 8.0)  # a training step's rows: from all alike to as they come
PLANNED_BATCHES = 16  # on which a row length is chosen
SAMPLE = 512  # segments from which a row length is chosen
ANSWER, ENTITY = 1, 2  # marks; an entity is part of its answer


@dataclasses.dataclass(frozen=True)
class Segment:
  """Inputs of one segment and what to read off them; every index is local to the segment.

  A token that conditions nothing (the last of a text or of an option) is a target only, never an input.
  """

  tokens: np.ndarray
  position: np.ndarray
  branch: np.ndarray
  score_at: np.ndarray
  target: np.ndarray
  kl_at: np.ndarray
  kl_target: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  marks: np.ndarray | None = None  # of a member of a group: 0 source, ANSWER, ENTITY


def text_segment(ids: Sequence[int], start: int, score: bool = True, kl: bool = False) -> Segment:
  """A text whose tokens ids[start:] are scored given those before; `start` is at least 1 (something must precede)."""
  ids = np.asarray(ids, np.int32)
  at = np.arange(start - 1, len(ids) - 1)
  none = at[:0]
  inputs = ids[:-1]
  return Segment(
    inputs, np.arange(len(inputs)), np.zeros_like(inputs),
    at if score else none, ids[at + 1] if score else none, at if kl else none, ids[at + 1] if kl else none,
  )  # fmt: skip


def member_segment(
  ids: Sequence[int], marks: Sequence[int], score_at: np.ndarray, target: np.ndarray, kl: bool = False
) -> Segment:
  """A member of a group: every token is read, the last one too, since its state may be pooled."""
  at = np.arange(len(ids), dtype=np.int32)
  compared = (score_at, target) if kl else (at[:0], at[:0])
  return Segment(np.asarray(ids, np.int32), at, np.zeros_like(at), score_at, target, *compared,
                 np.asarray(marks, np.int32))  # fmt: skip


def choice_segment(context: Sequence[int], options: Sequence[Sequence[int]]) -> tuple[Segment, list[np.ndarray]]:
  """Options behind their context: what they share is read once, the rest branches off.

  Returns the segment and, for each option, which scored positions add up to its log-probability.
  """
  shared = _common_prefix(options)
  tokens, position, branch = [*context, *options[0][:shared]], [], []
  if all(len(option) == shared for option in options):
    tokens.pop()  # one text only: its last token conditions nothing
  position, branch = list(range(len(tokens))), [0] * len(tokens)
  score_at = [len(context) - 1 + i for i in range(shared)]
  target = list(options[0][:shared])
  parts = []
  fork = len(context) + shared - 1  # the last shared position; every branch continues from it
  for number, option in enumerate(options, start=1):
    own = option[shared:]
    first = len(tokens)
    tokens += own[:-1]
    position += range(fork + 1, fork + 1 + len(own[:-1]))
    branch += [number] * len(own[:-1])
    begin = len(target)
    score_at += [fork, *range(first, first + len(own) - 1)][: len(own)]
    target += own
    parts.append(np.r_[0:shared, begin : len(target)])
  ints = lambda x: np.asarray(x, np.int32)
  return Segment(*map(ints, (tokens, position, branch, score_at, target, []))), parts


def _common_prefix(options: Sequence[Sequence[int]]) -> int:
  n = 0
  for tokens in zip(*options, strict=False):
    if len(set(tokens)) > 1:
      break
    n += 1
  return n


class Shape(NamedTuple):
  """The static sizes of a packed batch: rows, tokens a row, scored and compared positions a row, segments a row."""

  B: int
  T: int
  P: int
  K: int
  S: int


class Place(NamedTuple):
  """Where a segment went: packed row, its first token, its slot, its first scored / compared position."""

  b: int
  t: int
  s: int
  p: int
  k: int


def place(
  segments: Sequence[Segment], length: int, scored: int | None = None, compared: int | None = None, *, opens: int = 0,
  rows: int = 0,
) -> tuple[list[Place | None], Shape]:  # fmt: skip
  """Best-fit decreasing into rows of `length` tokens: where each segment goes, and the sizes that needs.

  `scored` and `compared` cap these positions of a row (a segment with more has a row of its own), which keeps rows
  alike. A segment of fewer than `opens` tokens fills a row but begins none beyond the first `rows`: where there is no
  room its place is None.
  """
  scored = scored or sum(len(segment.target) for segment in segments)
  compared = compared or sum(len(segment.kl_at) for segment in segments)
  open_rows: dict[int, list[int]] = {length: list(range(rows))}  # free tokens -> rows
  used: list[list[int]] = [[0, 0, 0, 0] for _ in range(rows)]  # per row: tokens, segments, scored, compared
  places: list[Place | None] = [None] * len(segments)
  for i in sorted(range(len(segments)), key=lambda i: -len(segments[i].tokens)):
    segment = segments[i]
    n, p, k = len(segment.tokens), len(segment.target), len(segment.kl_at)
    fits = (b for free in range(n, length + 1) for b in open_rows.get(free, ())
            if used[b][2] + p <= scored and used[b][3] + k <= compared)  # fmt: skip
    b = next(fits, None)
    if b is None:
      if n < opens:
        continue
      b = len(used)
      used.append([0, 0, 0, 0])
    else:
      open_rows[length - used[b][0]].remove(b)
    places[i] = Place(b, *used[b])
    used[b] = [have + more for have, more in zip(used[b], (n, 1, p, k), strict=True)]
    open_rows.setdefault(length - used[b][0], []).append(b)
  most = [max(column) for column in zip(*used, strict=True)]
  return places, Shape(len(used), length, most[2], most[3], most[1])


def place_in(segments: Sequence[Segment], planned: Shape) -> tuple[list[Place], Shape]:
  """As `plan` placed them: with the planned shape's positions as caps. A text that is longer than its rows, which no
  batch that was planned had, lengthens them to the next of LENGTHS."""
  longest = max(len(segment.tokens) for segment in segments)
  length = planned.T if longest <= planned.T else next((n for n in LENGTHS if n >= longest), longest)
  return place(segments, length, planned.P, planned.K)


def plan(batches: Iterable[Sequence[Segment]], shards: int = 1) -> Shape:
  """One shape that holds every batch: of some row lengths, and of rows more or less alike in their scored and compared
  positions, those that cost least on the first batches (`cost`)."""
  batches = list(batches)
  longest = max(len(segment.tokens) for batch in batches for segment in batch)

  def shape(some: Sequence[Sequence[Segment]], length: int, slack: float) -> Shape:
    rows = union((place(batch, length)[1] for batch in some), shards).B
    share = lambda of: _up(slack * max(sum(len(getattr(s, of)) for s in batch) for batch in some) / rows, 8)
    caps = share("target"), share("kl_at")
    return union((place(batch, length, *caps)[1] for batch in some), shards)

  tried = batches[:: _up(len(batches) / PLANNED_BATCHES, 1)]
  settings = [(n, slack) for n in [n for n in ROW_LENGTHS if n >= longest][:16] for slack in SLACKS]
  return shape(batches, *min(settings, key=lambda setting: cost(shape(tried, *setting))))


def cost(shape: Shape) -> float:
  """Of a training step, in tokens that go through the layers and back: padding counts, attention grows with the length
  of rows, a scored position takes two products with the vocabulary, and one that is compared with a reference three."""
  return shape.B * (shape.T * (1 + shape.T / STEP_ATTENTION) + HEAD * (2 * shape.P + 3 * shape.K))


def _up(n: float, step: int) -> int:
  """The multiple of `step` at or above n."""
  return step * math.ceil(n / step)


def grown(planned: Shape, need: Shape, shards: int) -> Shape:
  """`planned`, or where a batch needs more, that much more in eighths of it: few shapes whatever is drawn."""
  up = lambda have, needed: have if needed <= have else _up(needed, max(1, math.ceil(have / 8)))
  return union([Shape(*map(up, planned, need))._replace(T=max(planned.T, need.T))], shards)


def union(shapes: Iterable[Shape], shards: int) -> Shape:
  """The smallest shape that holds each of `shapes`, with rows that divide over `shards` and round position counts."""
  B, T, P, K, S = (max(column) for column in zip(*shapes, strict=True))
  return Shape(_up(B, shards), T, max(_up(P, 8), 8), _up(K, 8), S)


def pack(segments: Sequence[Segment], places: Sequence[Place], shape: Shape) -> dict[str, np.ndarray]:
  """The arrays of `types.Batch` that describe inputs and positions, with every segment in its place."""
  B, T, P, K, _ = shape
  zeros = lambda n: np.zeros((B, n), np.int32)
  out = {name: zeros(T) for name in ("tokens", "segment", "position", "branch")}
  out |= {name: zeros(P) for name in ("score_at", "target", "score_segment")}
  out |= {name: zeros(K) for name in ("kl_at", "kl_segment", "kl_target")}
  for segment, (b, t, s, p, k) in zip(segments, places, strict=True):
    span = np.s_[b, t : t + len(segment.tokens)]
    out["tokens"][span], out["segment"][span] = segment.tokens, s + 1
    out["position"][span], out["branch"][span] = segment.position, segment.branch
    span = np.s_[b, p : p + len(segment.target)]
    out["score_at"][span], out["target"][span] = segment.score_at + t, segment.target
    out["score_segment"][span] = s + 1
    span = np.s_[b, k : k + len(segment.kl_at)]
    out["kl_at"][span], out["kl_target"][span] = segment.kl_at + t, segment.kl_target
    out["kl_segment"][span] = s + 1
  if any(segment.marks is not None for segment in segments):
    marks = zeros(T)
    for segment, at in zip(segments, places, strict=True):
      if segment.marks is not None:
        marks[at.b, at.t : at.t + len(segment.tokens)] = segment.marks
    out |= {"answer": marks >= ANSWER, "entity": marks == ENTITY}
  return out


def packed_batches(
  segments: Sequence[Segment], shards: int = 1, tokens: int = PASS_TOKENS
) -> list[tuple[list[int], list[Place], Shape]]:
  """One pass over all segments: each batch's indices, places and shape; long rows first. At most one shape for each of
  PASS_CLASSES, and a device reads about `tokens` at a time. What long segments leave free is filled with short ones."""
  left, out = list(range(len(segments))), []
  while left:
    longest = max(len(segments[i].tokens) for i in left)
    opens = max((n + 1 for n in PASS_CLASSES if n < longest), default=0)
    length = _row_length([segments[i] for i in left], longest, opens, shards, tokens)
    chosen = [segments[i] for i in left]
    _, need = place(chosen, length, _scored(chosen, length), opens=opens)
    calls, rows_each = _calls(need.B, length, shards, tokens)
    places, need = place(chosen, length, _scored(chosen, length), opens=opens, rows=calls * rows_each)
    shape = union([need._replace(B=rows_each)], shards)
    batches: list[tuple[list[int], list[Place], Shape]] = [([], [], shape) for _ in range(calls)]
    for i, at in zip(left, places, strict=True):
      if at is not None:
        indices, local, _ = batches[at.b // rows_each]
        indices.append(i)
        local.append(at._replace(b=at.b % rows_each))
    out += [batch for batch in batches if batch[0]]
    left = [i for i, at in zip(left, places, strict=True) if at is None]
  return out


def _calls(rows: int, length: int, shards: int, tokens: int) -> tuple[int, int]:
  """Into how many calls `rows` packed rows go, and how many each reads, a multiple of `shards`: few empty rows."""
  fewest = -(-rows // (max(1, tokens // length) * shards))
  each = lambda calls: -(-rows // (calls * shards)) * shards
  calls = min(range(fewest, fewest + 3), key=lambda calls: calls * each(calls))
  return -(-rows // each(calls)), each(calls)


def _row_length(segments: Sequence[Segment], longest: int, opens: int, shards: int, tokens: int) -> int:
  """The length of rows that costs least: padding, and attention, which grows with the length. From a sample."""
  by_length = sorted(segments, key=lambda segment: -len(segment.tokens))
  sample = by_length[:: -(-len(segments) // SAMPLE)]
  share = -(-sum(len(segment.tokens) for segment in segments) // shards)  # a small set's rows get no longer than that
  base = -(-max(longest, min(PASS_LENGTH, share)) // 16) * 16

  def cost(length: int) -> float:
    places, need = place(sample, length, _scored(sample, length), opens=opens)
    calls, rows_each = _calls(-(-need.B * len(segments) // len(sample)), length, shards, tokens)
    placed = sum(len(segment.tokens) for segment, at in zip(sample, places, strict=True) if at)
    return calls * rows_each * length * (1 + length / ATTENTION) - placed * len(segments) / len(sample)

  return min(range(base, max(2 * base, tokens // 2) + 1, 32) if len(segments) > 1 else [base], key=cost)


def _scored(segments: Sequence[Segment], length: int) -> int:
  """How many scored positions a row should have at most, so that all rows have about as many."""
  share = sum(len(segment.target) for segment in segments) / sum(len(segment.tokens) for segment in segments)
  return max(1, int(SLACK * share * length), *(len(segment.target) for segment in segments))


def draw(count: int, per_step: int, step: int, key: tuple[int, ...]) -> np.ndarray:
  """Which of `count` items step `step` reads: every epoch is its own permutation, seeded by `key` and the epoch."""
  ticks = np.arange(step * per_step, (step + 1) * per_step)
  orders = {e: _order(count, (*key, int(e))) for e in np.unique(ticks // count)}
  return np.array([orders[tick // count][tick % count] for tick in ticks])


@functools.lru_cache(maxsize=8)
def _order(count: int, key: tuple[int, ...]) -> np.ndarray:
  """An epoch's permutation, which all its steps ask for."""
  order = np.random.default_rng(key).permutation(count)
  order.flags.writeable = False
  return order


def draw_mixture(
  parts: Sequence[tuple[int, float]], per_step: int, step: int, key: tuple[int, ...]
) -> np.ndarray:
  """As `draw`, from sources that lie one behind the other: (texts, weight) of each.

  Of the texts drawn up to any moment each source has its share by weight, of two sources to within half a text; each
  goes through its own epochs, so that a small one is read again while a large one is not through.
  """
  ticks = np.arange(step * per_step, (step + 1) * per_step)
  out, left, begin = np.empty_like(ticks), np.ones(len(ticks), bool), 0
  for number, (count, weight) in enumerate(parts):
    share = weight / sum(weight for _, weight in parts[number:])
    before, after = (np.floor(n * share + 0.5).astype(int) for n in (ticks, ticks + 1))  # of this source, so far
    mine = left & (after > before)
    out[mine] = [begin + _order(count, (*key, number, int(n) // count))[n % count] for n in before[mine]]
    ticks, left, begin = ticks - before, left & ~mine, begin + count
  return out
