"""What is taught of a group's texts, from the file's rows to the gradient at every logit, where BOS, EOS and padding
are one token as in GPT-2."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.pipeline import Shape
from jaxbias.data.rows import Group, Member
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import parse
from jaxbias.methods.recipes import grouped
from jaxbias.models.transformer import Head
from jaxbias.train.batches import Sampler, tokenise
from jaxbias.types import Batch
from tests.losses.calls import call
from tests.losses.oracles.case import scored
from tests.losses.oracles.ram import whole_numbers

END, V = 2, 30
SOURCE, ANSWERS = "1 2 3", {"p": " 4 5", "q": " 6 7 8 1", "n": " 9"}


@functools.cache
def batch(labels: str) -> Batch:
  """One group in one packed row: two positives, the first of them the original, and a negative."""
  kinds = {"p": "original", "q": "framing", "n": "stereotype"}
  members = {name: Member(name, text, kinds[name]) for name, text in ANSWERS.items()}
  recipe = grouped([Group("g", SOURCE, (members["p"], members["q"]), (members["n"],))], labels=labels)
  tokenizer = dataclasses.replace(whole_numbers(), bos_id=None, eos_id=END, pad_id=END)
  objective, _ = parse({"group_ce": {"denominator": "batch_all"}})
  sampler = Sampler(tokenise(recipe, objective, tokenizer, 32), objective,
                    {"groups": 1, "positives": 2, "negatives": 1}, None, 0, 1)  # fmt: skip
  return jax.tree.map(jnp.asarray, sampler.batch(0, Shape(1, 32, 32, 1, 4))[0])


def loss(logits: jax.Array, b: Batch, **how) -> jax.Array:
  head = Head(jnp.eye(V))
  ctx = LossContext(b, scored(logits, b.score_at, head, b.target), head=head)
  return call("group_ce", ctx, **how).metric.value()


def positions(b: Batch, segment: int) -> np.ndarray:
  return np.flatnonzero(b.segment[0] == segment)


def taught(labels: str, **how) -> dict[str, list[int]]:
  """The positions within each text, its start token being 0, whose logits the loss moves."""
  b = batch(labels)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(*b.tokens.shape, V)), jnp.float32)
  moved = np.abs(jax.grad(loss)(logits, b, **how)).sum(-1)[0] > 0
  length = {5 + i: name for name, i in (("p", 1), ("q", 3), ("n", 0))}  # start, three of the source, the answer
  where = {length[len(at)]: at for at in (positions(b, s) for s in (1, 2, 3))}
  return {name: np.flatnonzero(moved[at]).tolist() for name, at in where.items()}


def test_the_sources_last_position_predicts_the_first_word_and_the_answers_last_the_end():
  """Nothing moves at the source's other positions: its own words are no targets."""
  assert taught("to_end") == {"p": [3, 4, 5], "q": [], "n": []}
  assert taught("to_end", row="last_positive") == {"p": [], "q": [3, 4, 5, 6, 7], "n": []}
  assert taught("to_end", row="all_positives") == {"p": [3, 4, 5], "q": [3, 4, 5, 6, 7], "n": []}


def test_as_published_neither_the_first_word_nor_the_end_is_taught():
  assert taught("inside", row="last_positive") == {"p": [], "q": [4, 5, 6], "n": []}


@pytest.mark.parametrize("labels,counts", [("to_end", (3, 5, 2)), ("inside", (1, 3, 0))])
def test_the_published_denominator_is_the_share_of_labels(labels, counts):
  b = batch(labels)
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(*b.tokens.shape, V)), jnp.float32)
  row = loss(logits, b, row="last_positive")
  published = loss(logits, b, row="last_positive", denominator="batch_all")
  assert_allclose(published, row * counts[1] / sum(counts), rtol=1e-5)


def test_a_start_token_that_is_the_padding_token_is_read():
  """Masks come from lengths: every text begins with the id of padding, and all of its positions are its own."""
  b = batch("to_end")
  starts = [positions(b, segment)[0] for segment in (1, 2, 3)]
  assert all(b.tokens[0, at] == END and b.position[0, at] == 0 for at in starts)
  assert sorted(len(positions(b, segment)) for segment in (1, 2, 3)) == [5, 6, 8]
  assert int((b.segment > 0).sum()) == 19
