"""Packing loses no token and invents none; what a step reads is a function of (seed, step)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxbias.data.pipeline import (
  PASS_LENGTH,
  PASS_TOKENS,
  ROW_LENGTHS,
  Segment,
  Shape,
  choice_segment,
  cost,
  draw,
  pack,
  packed_batches,
  place,
  place_in,
  plan,
  text_segment,
  union,
)


def seen_from(segment: Segment, t: int) -> list[int]:
  """What position t of a segment is conditioned on, by `types.Batch`'s definition of branches, in reading order."""
  seen = [s for s in range(t + 1) if segment.branch[s] in (0, segment.branch[t])]
  assert_array_equal(segment.position[seen], range(len(seen)))
  return segment.tokens[seen].tolist()


def check_choices(context: list[int], options: list[list[int]]) -> Segment:
  """Every option is scored as if it stood alone behind the context, and nothing is read twice."""
  segment, parts = choice_segment(context, options)
  assert len(parts) == len(options)
  for option, part in zip(options, parts, strict=True):
    text = context + option
    assert len(part) == len(option)
    for i, p in enumerate(part):
      assert segment.target[p] == option[i]
      assert seen_from(segment, segment.score_at[p]) == text[: len(context) + i]
  assert len(segment.score_at) == len(segment.target) == len(set(np.concatenate(parts)))
  shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*options, strict=False))))
  own = sum(max(len(option) - shared - 1, 0) for option in options)
  last_is_target_only = all(len(option) == shared for option in options)
  assert len(segment.tokens) == len(context) + shared + own - last_is_target_only
  assert {a.dtype for a in (segment.tokens, segment.position, segment.branch, segment.target)} == {np.dtype(np.int32)}
  return segment


@pytest.mark.parametrize("context", [[9], [9, 8, 7]])
@pytest.mark.parametrize("options", [
  [[1, 2, 3], [1, 2, 4, 5], [6]],  # a shared prefix of none
  [[1, 2, 3], [1, 2, 4, 5], [1, 6]],  # of one
  [[1, 2, 3], [1, 2, 4]],  # of all but the last
  [[1, 2], [1, 2, 3, 4]],  # one option begins another
  [[1], [1, 2], [1, 2, 3]],
  [[1, 2, 3], [1, 2, 3]],  # the same twice
  [[1, 2, 3]],  # one only
  [[1]],
  [[1], [2]],
])  # fmt: skip
def test_options_behind_a_shared_context(context, options):
  check_choices(context, options)


def test_options_behind_a_shared_context_at_random():
  rng = np.random.default_rng(0)
  for _ in range(300):
    draw_ids = lambda n: rng.integers(0, 2, n).tolist()  # two words only, so that prefixes are often shared
    check_choices(draw_ids(rng.integers(1, 4)), [draw_ids(rng.integers(1, 6)) for _ in range(rng.integers(1, 5))])


def test_a_shared_prefix_is_read_once():
  segment = check_choices([9, 8], [[1, 2, 3, 4], [1, 2, 5, 6]])
  assert segment.tokens.tolist() == [9, 8, 1, 2, 3, 5]
  assert segment.branch.tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_text_scores_every_token_from_its_start(start):
  ids = [11, 12, 13, 14, 15, 16]
  segment = text_segment(ids, start, score=True, kl=True)
  assert segment.tokens.tolist() == ids[:-1] and not segment.branch.any()
  assert segment.target.tolist() == ids[start:]
  assert [seen_from(segment, t) for t in segment.score_at] == [ids[:n] for n in range(start, len(ids))]
  assert_array_equal(segment.kl_at, segment.score_at)
  silent = text_segment(ids, start, score=False, kl=False)
  assert len(silent.score_at) == len(silent.target) == len(silent.kl_at) == 0


def random_segments(count: int, longest: int = 30, seed: int = 0) -> list[Segment]:
  """Texts of distinct tokens, so that a token found in a packed row tells where it came from."""
  rng = np.random.default_rng(seed)
  ids = itertools.count(1)
  out = []
  for i in range(count):
    n = int(rng.integers(2, longest))
    tokens = [next(ids) for _ in range(n)]
    out.append(text_segment(tokens, int(rng.integers(1, n)), score=i % 5 > 0, kl=i % 3 == 0))
  return out


def check_packed(segments, places, shape: Shape) -> dict[str, np.ndarray]:
  """Everything of every segment stands in its place, and everywhere else is padding."""
  arrays = pack(segments, places, shape)
  B, T, P, K, S = shape
  sizes = {"tokens": T, "segment": T, "position": T, "branch": T, "score_at": P, "target": P, "score_segment": P,
           "kl_at": K, "kl_segment": K, "kl_target": K}  # fmt: skip
  assert {name: a.shape for name, a in arrays.items()} == {name: (B, n) for name, n in sizes.items()}
  for segment, at in zip(segments, places, strict=True):
    row = {name: a[at.b] for name, a in arrays.items()}
    mine = np.flatnonzero(row["segment"] == at.s + 1)
    assert at.s < S
    assert_array_equal(mine, np.arange(at.t, at.t + len(segment.tokens)))  # contiguous, and nobody else's
    for name in ("tokens", "position", "branch"):
      assert_array_equal(row[name][mine], getattr(segment, name))
    scored = row["score_segment"] == at.s + 1
    assert_array_equal(row["target"][scored], segment.target)
    assert_array_equal(row["tokens"][row["score_at"][scored]], segment.tokens[segment.score_at])
    compared = row["kl_segment"] == at.s + 1
    assert_array_equal(row["tokens"][row["kl_at"][compared]], segment.tokens[segment.kl_at])
    assert_array_equal(row["kl_target"][compared], segment.kl_target)
  for name, of in (("segment", "tokens"), ("score_segment", "target"), ("kl_segment", "kl_at")):
    assert (arrays[name] > 0).sum() == sum(len(getattr(segment, of)) for segment in segments)
  assert not arrays["tokens"][arrays["segment"] == 0].any()
  return arrays


@pytest.mark.parametrize("scored", [None, 35, 5])
@pytest.mark.parametrize("count,length", [(1, 32), (7, 32), (60, 48), (60, 128)])
def test_every_token_of_every_segment_is_placed_exactly_once(count, length, scored):
  segments = random_segments(count)
  places, shape = place(segments, length, scored)
  assert shape.T == length
  arrays = check_packed(segments, places, shape)
  for b in range(shape.B):
    members = [segment for segment, at in zip(segments, places, strict=True) if at.b == b]
    targets = sum(len(segment.target) for segment in members)
    assert members and (scored is None or targets <= scored or len(members) == 1)
    assert sorted(at.s for at in places if at.b == b) == list(range(len(members)))
  assert (arrays["segment"] > 0).any(axis=1).all()


def test_the_cap_on_scored_positions_holds_among_segments_without_any():
  """A row may hold more scored positions than the cap only if one segment brings them all."""
  segments = [text_segment(range(12), 1), *(text_segment(range(3), 2, score=False) for _ in range(3))]
  places, shape = place(segments, 64, scored=4)
  check_packed(segments, places, shape)
  assert shape.P == 11


def test_longer_segments_are_placed_first_so_that_rows_fill():
  segments = random_segments(200, longest=40)
  _, shape = place(segments, 64)
  used = sum(len(segment.tokens) for segment in segments)
  assert used / (shape.B * shape.T) > 0.95


def test_short_segments_fill_rows_that_long_ones_begin():
  ids = iter(range(1, 10**6))
  of = lambda n: text_segment([next(ids) for _ in range(n + 1)], 1)
  segments = [of(n) for n in (5, 90, 30, 60, 6, 7)]
  places, shape = place(segments, 100, opens=60)
  assert [at and at.b for at in places] == [None, 0, 1, 1, 1, 0]  # 5 tokens fit nowhere and may begin no row
  assert shape.B == 2
  assert place(segments, 100, opens=60, rows=3)[0][0].b == 2
  kept = [i for i, at in enumerate(places) if at]
  check_packed([segments[i] for i in kept], [places[i] for i in kept], shape)


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("name,lengths", [
  ("short", lambda rng: rng.integers(4, 40, 800)),
  ("middling", lambda rng: rng.integers(60, 190, 800)),
  ("alike", lambda rng: rng.integers(130, 145, 400)),
  ("a long tail", lambda rng: np.r_[rng.lognormal(4, 0.7, 800).astype(int).clip(2, 1500), 1600]),
  ("windows", lambda rng: np.r_[np.full(64, 1024), 100]),
])  # fmt: skip
def test_a_pass_takes_few_shapes_and_little_padding(name, lengths, shards):
  tokens = lengths(np.random.default_rng(0))
  batches = packed_batches([text_segment(range(n + 1), max(1, n - 9)) for n in tokens], shards)
  shapes = {shape for *_, shape in batches}
  padded = 1 - tokens.sum() / sum(shape.B * shape.T for *_, shape in batches)
  print(f"{name}, {shards} shards: {len(shapes)} shapes, {100 * padded:.1f} % padding")
  assert len(shapes) <= 4 and padded < 0.1


def test_a_union_holds_each_of_its_shapes_in_round_numbers():
  shapes = [Shape(3, 64, 9, 0, 4), Shape(2, 64, 31, 17, 2)]
  assert union(shapes, shards=1) == Shape(3, 64, 32, 24, 4)
  assert union(shapes, shards=4) == Shape(4, 64, 32, 24, 4)
  assert union([Shape(1, 16, 0, 0, 1)], shards=1) == Shape(1, 16, 8, 0, 1)  # at least some scored positions


@pytest.mark.parametrize("shards", [1, 4])
def test_a_plan_holds_every_batch_and_costs_least(shards):
  batches = [random_segments(12, seed=seed) for seed in range(4)]
  shape = plan(batches, shards)
  assert shape.B % shards == 0
  longest = max(len(segment.tokens) for batch in batches for segment in batch)
  for batch in batches:
    places, need = place_in(batch, shape)
    assert all(have >= n for have, n in zip(shape, need, strict=True))
    check_packed(batch, places, shape)
  for length in [n for n in ROW_LENGTHS if n >= longest][:16]:
    assert cost(shape) <= cost(union((place(batch, length)[1] for batch in batches), shards))


def test_rows_of_texts_with_different_tasks_are_alike():
  """Texts that are scored and texts that are compared lie side by side, not each kind in rows of its own."""
  batch = [text_segment(range(13), 1, score=i < 16, kl=i >= 16) for i in range(24)]
  shape = plan([batch])
  scored, compared = (sum(len(getattr(s, of)) for s in batch) for of in ("target", "kl_at"))
  assert shape.B * (shape.P + shape.K) <= 1.25 * (scored + compared)
  as_they_come = place(batch, 48)[1]
  assert as_they_come.B * (as_they_come.P + as_they_come.K) > 1.5 * (scored + compared)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("count,longest", [(1, 30), (150, 60), (400, 30), (40, 400)])
def test_a_pass_covers_every_segment_once(count, longest, shards):
  segments = random_segments(count, longest)
  batches = packed_batches(segments, shards)
  assert sorted(i for indices, *_ in batches for i in indices) == list(range(count))
  for indices, places, shape in batches:
    check_packed([segments[i] for i in indices], places, shape)
    assert shape.B % shards == 0 and shape.B <= max(1, PASS_TOKENS // shape.T) * shards
    assert not shape.T % 16
    assert shape.T >= min(PASS_LENGTH, sum(len(segments[i].tokens) for i in indices) // shards)
  lengths = {shape.T for *_, shape in batches}
  assert len({shape for *_, shape in batches}) == len(lengths), "one compiled program a length"


@pytest.mark.parametrize("shards", [1, 4, 8])
@pytest.mark.parametrize("tokens", [[20], [20, 20], [30, 10, 12], [25] * 8, [25] * 20, [200, 10, 10]])
def test_a_set_smaller_than_the_devices_is_padded_to_short_rows(tokens, shards):
  """A shard reads about its share, or the longest text: not PASS_LENGTH tokens each."""
  batches = packed_batches([text_segment(range(n + 1), 1) for n in tokens], shards)
  read = sum(shape.B * shape.T for *_, shape in batches)
  least = max(sum(tokens) / shards, max(tokens))
  assert read / shards < least + 48, "but for rounding, and for what packs badly"
  assert sum(len(indices) for indices, *_ in batches) == len(tokens)


@pytest.mark.parametrize("count,per_step", [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_reads_each_item_once(count, per_step):
  steps = 3 * count
  stream = np.concatenate([draw(count, per_step, step, (5, 0)) for step in range(steps)])
  epochs = stream.reshape(-1, count)
  for epoch in epochs:
    assert_array_equal(np.sort(epoch), np.arange(count))
  if count > 5:
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.9, "epochs have orders of their own"


def test_what_a_step_reads_depends_on_seed_and_step_alone():
  forwards = [draw(10, 4, step, (5, 0)).tolist() for step in range(12)]
  backwards = [draw(10, 4, step, (5, 0)).tolist() for step in reversed(range(12))][::-1]
  assert forwards == backwards
  for other in ((6, 0), (5, 1)):
    assert [draw(10, 4, step, other).tolist() for step in range(12)] != forwards
