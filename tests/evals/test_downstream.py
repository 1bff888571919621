"""Fine-tuning on a downstream task: what a model reads, and what is pooled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.glue import Example
from jaxbias.errors import UserError
from jaxbias.evals import downstream
from jaxbias.finetune import Drawn
from jaxbias.losses import classification
from jaxbias.losses.context import LossContext
from jaxbias.models import language_model
from tests.evals.answering import WORDS, alone, load
from tests.train import Workplace

BOTH = pytest.mark.parametrize("name", ["llama", "bert"])
RNG = np.random.default_rng(7)


def examples(texts: list[str]) -> list[Example]:
  return [Example(f"e{n}", (text,), n % 2) for n, text in enumerate(texts)]


# What the model reads


@BOTH
def test_a_text_is_cut_on_its_right_and_counted(name):
  model = load(name)
  causal, tokenizer = model.config.causal, model.tokenizer
  texts = ["the cat sat on a mat", "the cat"]
  found = downstream.encode(examples(texts), tokenizer, causal, 6)
  ids = tokenizer.encode_batch(texts)
  before, behind = ([tokenizer.start_id], []) if causal else ([tokenizer.cls_id], [tokenizer.sep_id])
  room = 6 - len(before + behind)
  assert found.truncated == 1 and len(ids[0]) > room
  assert [list(s.tokens) for s in found.segments] == [[*before, *text[:room], *behind] for text in ids]
  with pytest.raises(UserError, match="--max-length=1 leaves no room"):
    downstream.encode(examples(texts), tokenizer, causal, 1)


def test_a_pair_is_read_with_something_between_and_the_longer_text_is_cut_first():
  bert = load("bert")
  pair = [Example("e", ("the cat sat on a mat", "she is he"), 0)]
  (a, b), t = bert.tokenizer.encode_batch(pair[0].texts), bert.tokenizer
  whole, cut = (downstream.encode(pair, t, False, n) for n in (128, 9))
  assert list(whole.segments[0].tokens) == [t.cls_id, *a, t.sep_id, *b, t.sep_id] and whole.truncated == 0
  assert list(cut.segments[0].tokens) == [t.cls_id, *a[:3], t.sep_id, *b, t.sep_id] and cut.truncated == 1


def test_a_causal_pair_has_a_line_break_between(tmp_path_factory):
  tokenizer = language_model.load(str(Workplace.of(tmp_path_factory).folder / "model")).tokenizer
  (segment,) = downstream.encode([Example("e", ("the cat", "a hat"), 0)], tokenizer, True, 64).segments
  assert tokenizer.decode(segment.tokens[1:]) == "the cat\na hat" and segment.tokens[0] == tokenizer.start_id


@pytest.mark.parametrize("lengths,room,kept", [((9,), 5, [5]), ((3, 4), 7, [3, 4]), ((9, 2), 7, [5, 2]),
                                               ((2, 9), 7, [2, 5]), ((9, 9), 7, [4, 3]), ((5, 3), 7, [4, 3])])
def test_how_much_of_each_text_stays(lengths, room, kept):
  found = downstream._cut(lengths, room)
  assert sorted(found) == sorted(kept)
  assert all(n <= length for n, length in zip(found, lengths, strict=True))


# Pooling and the head


def packed(model, count: int = 9) -> tuple[Drawn, object]:
  """A few texts of several lengths side by side in a row, and the batch."""
  drawn = [" ".join(RNG.choice(WORDS, n % 5 + 1)) for n in range(count)]
  given = examples(drawn)
  segments = downstream.encode(given, model.tokenizer, model.config.causal, 64).segments
  source = Drawn(given, segments, count, seed=3, shards=1)
  return source, source.batch(0, source.shape(1))[0]


@BOTH
def test_pooling_on_packed_rows_is_that_of_each_text_alone(name):
  model = load(name)
  source, batch = packed(model)
  assert batch.label.shape[1] > 1, "several texts in a row"
  inputs = [jnp.asarray(x) for x in (batch.tokens, batch.segment, batch.position)]
  out, captures = model.module.apply({"params": model.params}, *inputs, capture=("stack_out",))
  state = out if model.config.causal else captures["stack_out"]
  found = np.asarray(classification.pooled(state, inputs[1], batch.label.shape[1], last=model.config.causal))
  members = source.members(0)
  for b, s in np.argwhere(batch.row >= 0):
    ids = list(source.segments[members[batch.row[b, s]]].tokens)
    assert_allclose(found[b, s], alone(model, ids)[1][-1 if model.config.causal else 0], atol=2e-5)
  head = {"w": RNG.normal(size=(found.shape[-1], 3)), "b": RNG.normal(size=3)}
  expected = [alone(model, list(s.tokens))[1][-1 if model.config.causal else 0] for s in source.segments]
  assert_allclose(downstream.predict(model, source.segments, head), expected @ head["w"] + head["b"], atol=1e-4)


def context(model, batch) -> LossContext:
  state = jnp.asarray(RNG.normal(size=(*batch.tokens.shape, 5)), jnp.float32)
  batch = jax.tree.map(jnp.asarray, batch)
  return LossContext(batch, jnp.zeros(batch.target.shape), hidden_BTD=state, captures={"stack_out": state},
                     causal=model.config.causal)  # fmt: skip


@BOTH
def test_the_heads_gradient_is_that_of_finite_differences(name):
  _, batch = packed(load(name))
  ctx, C = context(load(name), batch), 3
  params = {"w": jnp.asarray(RNG.normal(size=(5, C)), jnp.float32), "b": jnp.asarray(RNG.normal(size=C), jnp.float32)}
  loss = jax.jit(lambda params: classification.classify(ctx, "general", params).metric.value())
  gradient, eps = jax.grad(loss)(params), 1e-2
  for leaf in params:
    for at in np.ndindex(params[leaf].shape):
      moved = [float(loss(params | {leaf: params[leaf].at[at].add(sign * eps)})) for sign in (1, -1)]
      assert_allclose(gradient[leaf][at], (moved[0] - moved[1]) / (2 * eps), atol=2e-4)


@BOTH
def test_only_the_pooled_positions_of_texts_have_a_gradient(name):
  model = load(name)
  _, batch = packed(model)
  ctx = context(model, batch)
  params = {"w": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32), "b": jnp.zeros(2)}

  def loss(state):
    moved = LossContext(ctx.batch, ctx.logprob_BP, hidden_BTD=state, captures={"stack_out": state}, causal=ctx.causal)
    return classification.classify(moved, "general", params).metric.value()

  reached = {tuple(at) for at in np.argwhere(np.abs(np.asarray(jax.grad(loss)(ctx.hidden_BTD))).sum(-1) > 0)}
  ends = set()
  for b, row in enumerate(batch.segment):
    for s in range(1, row.max() + 1):
      ends.add((b, int(np.flatnonzero(row == s)[-1 if model.config.causal else 0])))
  assert reached == ends and len(ends) == 9


def test_a_head_of_zeros_costs_log_c_and_labels_of_no_text_cost_nothing():
  model = load("llama")
  _, batch = packed(model)
  zeros = {"w": jnp.zeros((5, 4)), "b": jnp.zeros(4)}
  found = classification.classify(context(model, batch), "general", zeros)
  assert_allclose(found.metric.value(), np.log(4), rtol=1e-6)
  assert found.metric.weight == 9 == found.notes["accuracy"].weight
  assert_allclose(found.notes["accuracy"].value(), 5 / 9)  # equal logits say class 0, which has the even ids


