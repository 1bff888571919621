"""Every registered loss: its closed forms, its gradient, the published code's numbers, and what may not change it.

A loss that is added to the registry is asked here for its value at the reference, and is then held to the rest.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.pipeline import pack, place, text_segment, union
from jaxbias.errors import UserError
from jaxbias.losses import likelihood, preference, unlearning
from jaxbias.losses.context import LossContext
from jaxbias.losses.likelihood import ga, sft
from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.losses.registry import LOSSES, parse
from jaxbias.losses.unlearning import npo
from jaxbias.models.lora import LoraConfig, init_lora, lora_scale
from jaxbias.models.transformer import Head, Transformer, abstract_variables
from jaxbias.models.transformer import head as model_head
from jaxbias.train.step import make_train_step
from jaxbias.types import ROLES, Batch, Metric, TrainState
from tests.models import tiny_config

BETAS = pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 1.0])
MODULES = (likelihood, preference, unlearning)  # losses of groups and of class statistics have files of their own
NAMES = sorted(name for name, loss in LOSSES.items() if loss.function.__module__ in [m.__name__ for m in MODULES])
EVERY_LOSS = pytest.mark.parametrize("name", NAMES)
BATCH_LEVEL = {"kto"}  # whose mean depends on what shares a batch: the reference point


pytestmark = pytest.mark.usefixtures("quick_compilation")


V, L = 7, 2  # words and blocks of the models that are made up here


@dataclasses.dataclass(frozen=True)
class Text:
  """A segment: of each answer token the log-probability, the state before it (logits, here) and the token, under policy
  and reference."""

  role: str
  logprob: np.ndarray
  ref: np.ndarray
  hidden: np.ndarray
  ref_hidden: np.ndarray
  target: np.ndarray
  pair: int  # texts with the same number are twins


def text(role: str, logprob, ref=None, pair: int = -1, hidden=None, ref_hidden=None, target=None) -> Text:
  logprob = np.atleast_1d(logprob)
  hidden = np.zeros((len(logprob), V)) if hidden is None else hidden
  return Text(role, logprob, logprob if ref is None else np.atleast_1d(ref), hidden,
              hidden if ref_hidden is None else ref_hidden,
              np.zeros(len(logprob), int) if target is None else target, pair)  # fmt: skip


def context(rows: list[list[Text]], spare: int = 0, filler: float = 0.0) -> LossContext:
  """Texts packed as given, with `spare` unused segments and positions in every row, which hold `filler`."""
  B, S = len(rows), max(map(len, rows)) + spare
  P = max(sum(len(t.logprob) for t in row) for row in rows) + spare
  width = rows[0][0].hidden.shape[-1]
  full = lambda shape, value, dtype=np.int32: np.full((B, *shape), value, dtype)
  role, pair, segment, target = full((S,), -1), full((S,), -1), full((P,), 0), full((P,), 0)
  logprob, ref = (full((P,), filler, np.float32) for _ in range(2))
  hidden, ref_hidden = (full((P, width), filler, np.float32) for _ in range(2))
  for b, row in enumerate(rows):
    p = 0
    for s, t in enumerate(row):
      role[b, s] = ROLES.index(t.role)
      twins = [i * S + j for i, r in enumerate(rows) for j, u in enumerate(r) if u.pair == t.pair >= 0 and u is not t]
      pair[b, s] = twins[0] if twins else -1
      span = np.s_[b, p : p + len(t.logprob)]
      logprob[span], ref[span], target[span], segment[span] = t.logprob, t.ref, t.target, s + 1
      hidden[span], ref_hidden[span] = t.hidden, t.ref_hidden
      p += len(t.logprob)
  at = np.broadcast_to(np.arange(P, dtype=np.int32), (B, P))
  role, pair, segment, target, ref, at = map(jnp.asarray, (role, pair, segment, target, ref, at))
  batch = Batch(
    tokens=target, segment=segment, position=at, score_at=at, target=target, score_segment=segment, role=role,
    pair=pair, ref_logprob=ref, kl_at=at, kl_segment=segment, kl_target=target, ref_hidden=jnp.asarray(ref_hidden),
  )  # fmt: skip
  return with_hidden(LossContext(batch, jnp.asarray(logprob), head=Head(jnp.eye(width)), ref_head=Head(jnp.eye(width))),
                     jnp.asarray(hidden))  # fmt: skip


def with_hidden(ctx: LossContext, hidden: jax.Array) -> LossContext:
  """The context of a model whose last states are `hidden`, and whose first block gives twice that."""
  blocks = lambda x: {"residual_out": jnp.stack([2 * x, x])}
  return dataclasses.replace(ctx, kl_hidden_BKD=hidden, hidden_BTD=hidden, captures=blocks(hidden),
                             base_captures=blocks(ctx.batch.ref_hidden))  # fmt: skip


def texts(at_reference: bool = False) -> list[Text]:
  """Three pairs, a forget text and a retain text without twin, two general texts, two mismatched, of many lengths."""
  rng = np.random.default_rng(0)

  def make(role, n, pair=-1):
    logprob, ref = -rng.exponential(2.0, (2, n))
    hidden, ref_hidden = rng.standard_normal((2, n, V))
    if role == "mismatched":
      ref = ref - 3.0  # so that the model has moved, by KTO's estimate
    ref, ref_hidden = (logprob, hidden) if at_reference else (ref, ref_hidden)
    return text(role, logprob, ref, pair, hidden, ref_hidden, rng.integers(0, V, n))

  return [
    make("forget", 1, 0), make("retain", 4, 0), make("general", 3), make("forget", 2, 1), make("retain", 3, 1),
    make("general", 5), make("forget", 6, 2), make("retain", 2, 2), make("retain", 1), make("forget", 4),
    make("mismatched", 3), make("mismatched", 2),
  ]  # fmt: skip


def value(name: str, ctx: LossContext, on: str | None = None, **settings) -> Metric:
  """A loss with its defaults, but for `settings`."""
  loss = LOSSES[name]
  numbers = {**loss.coefficients, **{k: v for k, v in settings.items() if k in loss.coefficients}}
  options = tuple((k, v) for k, v in settings.items() if k in loss.options)
  arrays = {field: getattr(ctx, field) for field in ARRAYS}
  return compiled(name, on or loss.on, options, ctx.batch, arrays, numbers)


ARRAYS = ("logprob_BP", "kl_hidden_BKD", "captures", "base_captures", "head", "ref_head")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compiled(name, on, options, batch, arrays, coefficients) -> Metric:
  return LOSSES[name].function(LossContext(batch, **arrays), on, **coefficients, **dict(options))


@jax.jit
@jax.value_and_grad
def npo_of_one(log_ratio: jax.Array, beta: float) -> jax.Array:
  """NPO of one text whose log-ratio is given, and its derivative."""
  ctx = context([[text("forget", 0.0)]])
  return value("npo", dataclasses.replace(ctx, logprob_BP=jnp.full((1, 1), log_ratio)), beta=beta).value()


# At the reference


def at_reference(name: str) -> float:
  every = texts(at_reference=True)

  def mean(role, of):
    return np.mean([of(t) for t in every if t.role == role])

  def paired(of):
    """The mean of of(chosen, rejected) over the pairs, each given as log-probabilities of its tokens."""
    twins = [[next(t.logprob for t in every if (t.role, t.pair) == (role, n)) for role in ("retain", "forget")]
             for n in range(3)]  # fmt: skip
    return np.mean([of(*pair) for pair in twins])

  def adjusted(t):
    p = np.take_along_axis(softmax(t.hidden), t.target[:, None], -1)[:, 0]
    rest = 1 - p + p * np.exp(-10)
    return -10 * p * np.exp(-10) / rest - np.log(rest)

  def steered(t):
    u = np.asarray(jax.random.uniform(jax.random.key(0), (V,)))
    return np.mean((2 * t.hidden - 20 * u / np.linalg.norm(u)) ** 2)

  softplus = lambda x: np.logaddexp(0, x)
  less = lambda logp: np.log(1 - np.exp(logp) + 1e-6)
  odds = lambda logp: logp.mean() - less(logp.mean())
  known = {
    "sft": -mean("retain", lambda t: t.logprob.mean()),
    "ga": mean("forget", lambda t: t.logprob.mean()),
    "kl": 0.0,
    "npo": 2 / 0.1 * np.log(2),
    "simnpo": mean("forget", lambda t: 2 / 2.5 * softplus(2.5 * t.logprob.mean())),
    "unlikelihood": -mean("forget", lambda t: less(t.logprob).mean()),
    "wga": mean("forget", lambda t: (np.exp(t.logprob) * t.logprob).mean()),
    "satimp": mean("forget", lambda t: (np.exp(5 * t.logprob + less(t.logprob)) * t.logprob).mean()),
    "undial": np.concatenate([adjusted(t) for t in every if t.role == "forget"]).mean(),
    "rmu": mean("forget", steered),
    "rmu_retain": 0.0,
    "dpo": np.log(2),
    "simpo": paired(lambda won, lost: softplus(1.0 - 2.0 * (won.mean() - lost.mean()))),
    "orpo": paired(lambda won, lost: softplus(odds(lost) - odds(won))),
    "ram": paired(lambda won, lost: -won.sum() + 1e-4 * lost.sum()),
    "kto": 0.5,
  }
  assert name in known, f"say here what `{name}` is when the policy is the reference"
  return known[name]


def softmax(logits: np.ndarray) -> np.ndarray:
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@EVERY_LOSS
def test_the_value_at_the_reference(name):
  found = value(name, context([texts(at_reference=True)]))
  assert_allclose(found.value(), at_reference(name), rtol=3e-6, atol=1e-6)


@BETAS
def test_npo_at_the_reference_is_two_over_beta_log_two_and_ascends(beta):
  """Its gradient there is that of gradient ascent on the summed log-probability, whatever beta."""
  ctx = context([texts(at_reference=True)])

  def npo_of(logprob):
    return npo(dataclasses.replace(ctx, logprob_BP=logprob), "forget", beta).value()

  def ascent(logprob):
    ctx_BS = dataclasses.replace(ctx, logprob_BP=logprob)
    return Metric.over(ctx_BS.logprob_BS, ctx_BS.rows("forget")).value()

  assert_allclose(npo_of(ctx.logprob_BP), 2 / beta * np.log(2), rtol=1e-6)
  slope = jax.grad(npo_of)(ctx.logprob_BP)
  assert_allclose(slope, jax.grad(ascent)(ctx.logprob_BP), rtol=1e-6)
  assert_allclose(slope.sum(), np.mean([len(t.logprob) for t in texts() if t.role == "forget"]), rtol=1e-5)


def test_npo_becomes_gradient_ascent_as_beta_vanishes():
  for log_ratio in (-5.0, 0.0, 3.0):
    assert_allclose(npo_of_one(log_ratio, 1e-6)[1], 1.0, atol=1e-5)
    assert_allclose(npo_of_one(log_ratio, 1e-3)[0] - 2e3 * np.log(2), log_ratio, atol=1e-2)


@BETAS
def test_npos_slope_is_bounded_where_ascents_is_not(beta):
  """dL / d log pi = 2 sigmoid(beta r): 0 once the text is forgotten, at most 2, finite however far the policy is."""
  ratios = np.array([-1e4, -50.0, -1.0, 0.0, 1.0, 50.0, 1e4])
  values, slopes = np.transpose([npo_of_one(r, beta) for r in ratios])
  assert_allclose(slopes, 2 * np.exp(-np.logaddexp(0, -beta * ratios)), atol=1e-6)
  assert np.isfinite(values).all() and (np.diff(slopes) >= 0).all()


@BETAS
def test_dpo_and_its_mirror_image(beta):
  """Chosen and rejected exchanged: L(-m) - L(m) = beta m (Rafailov et al. 2023, eq. 7), and both are log 2 at m = 0."""

  def of(ratio_chosen, ratio_rejected):
    pair = [text("retain", ratio_chosen, 0.0, pair=0), text("forget", ratio_rejected, 0.0, pair=0)]
    return tuple(float(value("dpo", context([pair]), on, beta=beta).value()) for on in ("retain", "forget"))

  assert_allclose(of(-3.0, -3.0), np.log(2), rtol=1e-6)
  (forward, mirrored), (swapped, _) = of(1.5, -0.7), of(-0.7, 1.5)
  assert_allclose(mirrored, swapped, rtol=1e-6)
  assert_allclose(mirrored - forward, beta * 2.2, rtol=1e-4)
  assert_allclose(of(1.5 + 4, -0.7 + 4), of(1.5, -0.7), rtol=1e-5)  # only the difference counts


def test_sft_and_gradient_ascent_are_opposite():
  ctx = context([texts()])
  of = lambda loss: lambda logprob: loss(dataclasses.replace(ctx, logprob_BP=logprob), "retain").value()
  both = [jax.value_and_grad(of(loss))(ctx.logprob_BP) for loss in (sft, ga)]
  jax.tree.map(lambda x, y: assert_array_equal(x, -y), *both)
  assert both[0][0] > 0


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_kl_is_zero_and_flat_at_the_reference_and_positive_elsewhere(divergence):
  rng = np.random.default_rng(0)
  ref, other = (jnp.asarray(rng.standard_normal((2, 3, V)), jnp.float32) for _ in range(2))
  start = context([[text("general", np.zeros(3), hidden=row)] for row in ref])
  of = lambda logits: value("kl", with_hidden(start, logits), divergence=divergence).value()
  there, slope = jax.value_and_grad(of)(ref)
  assert_allclose(there, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)
  for step in (0.01, 0.1, 1.0):
    assert of(ref + step * other) > there
  assert_allclose(of(ref + 3.0), 0.0, atol=1e-5)  # a constant added to all logits is no change


# Gradients


HELD = {"wga": (1.0, 0.0), "satimp": (5.0, 1.0)}  # exponents of p and 1 - p in a weight that has no gradient


@pytest.mark.parametrize("name,settings", [
  *((name, {}) for name in NAMES if name not in HELD),
  *((name, {option: choice}) for name in NAMES if name not in HELD
    for option, choices in LOSSES[name].options.items() for choice in choices[1:]),
])  # fmt: skip
def test_the_gradient_is_the_finite_difference(name, settings):
  """Through log-softmax, along random directions of the logits of a model that is no longer the reference."""
  ctx = context([texts()[:4], texts()[4:]])
  B, P = ctx.logprob_BP.shape
  rng = np.random.default_rng(1)
  draw = lambda: jnp.asarray(rng.standard_normal((2, B, P, V)), jnp.float32)
  point, *directions = (draw() for _ in range(4))
  held = ctx.within("mismatched", ctx.batch.score_segment)  # KTO's reference point is a constant

  @jax.jit
  @jax.value_and_grad
  def loss(logits):
    scored = token_logprobs(logits[0], ctx.head, ctx.batch.target)
    moved = dataclasses.replace(with_hidden(ctx, logits[1]), logprob_BP=scored)
    return value(name, moved, **settings).value()

  _, slope = loss(point)
  h, size = 1e-2, 0.0
  for direction in directions:
    direction = jnp.where(held[..., None], 0.0, direction)
    ahead, behind = (loss(point + sign * h * direction)[0] for sign in (1, -1))
    along = jnp.vdot(slope, direction)
    size = max(size, abs(along))
    assert_allclose((ahead - behind) / (2 * h), along, rtol=3e-3, atol=2e-4)
  assert size > 3e-3, "a direction that shows something"


@pytest.mark.parametrize("name", HELD)
def test_a_held_weights_slope_is_the_weight_itself(name):
  """d/d log p of w log p with w held: w over the number of tokens and texts, whatever the slope of w."""
  a, b = HELD[name]
  ctx = context([[text("forget", [-0.2, -3.0]), text("forget", -1.5)]])
  slope = jax.grad(lambda x: value(name, dataclasses.replace(ctx, logprob_BP=x)).value())(ctx.logprob_BP)
  p = np.exp([-0.2, -3.0, -1.5])
  assert_allclose(slope[0], p**a * (1 - p) ** b / [4, 4, 2], rtol=1e-5)


def test_ktos_reference_point_has_no_gradient():
  ctx = context([texts()])
  slope = jax.grad(lambda x: value("kto", dataclasses.replace(ctx, logprob_BP=x)).value())(ctx.logprob_BP)
  held = ctx.within("mismatched", ctx.batch.score_segment)
  assert not slope[held].any() and slope[ctx.within("forget", ctx.batch.score_segment)].all()


# What may not change a mean


def test_metric_never_reads_what_is_masked():
  def mean(x):
    return Metric.over(x, jnp.array([True, False, True])).value()

  found, slope = jax.value_and_grad(mean)(jnp.array([1.0, np.nan, 4.0]))
  assert_allclose(found, 2.5)
  assert_array_equal(slope, [0.5, 0.0, 0.5])
  assert Metric.over(jnp.array([np.nan]), jnp.array([False])).value() == 0.0


@EVERY_LOSS
def test_padding_order_and_packing_change_nothing(name):
  all_texts = texts()
  plain = value(name, context([all_texts]))
  assert plain.weight > 0
  layouts = {
    "one text a row": context([[t] for t in all_texts]),
    "backwards": context([all_texts[::-1]]),
    "mixed rows": context([all_texts[5:], all_texts[2:5], all_texts[:2]]),
    "padding": context([all_texts[:3], all_texts[3:]], spare=3, filler=np.nan),
  }
  for what, ctx in layouts.items():
    found = value(name, ctx)
    assert_allclose(found.value(), plain.value(), rtol=1e-6, err_msg=what)
    assert_array_equal(found.weight, plain.weight, err_msg=what)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BATCH_LEVEL])
def test_metrics_of_a_split_batch_add_up(name):
  all_texts = texts()
  parts, whole_context = [context([part]) for part in (all_texts[:2], all_texts[2:])], context([all_texts])
  first, second, whole = (value(name, ctx) for ctx in (*parts, whole_context))
  assert_allclose((first + second).value(), whole.value(), rtol=1e-6)
  assert abs((first.value() + second.value()) / 2 - whole.value()) > 1e-4, "a mean of means would differ"

  def slopes(ctx):  # of the sums, which is what accumulation adds
    of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).sum
    return jax.grad(of)((ctx.logprob_BP, ctx.hidden_BTD))

  for *pieces, together in zip(*map(slopes, (*parts, whole_context)), strict=True):
    assert_allclose(np.concatenate(pieces, axis=1), together, rtol=1e-5, atol=1e-7)


@EVERY_LOSS
def test_a_loss_reads_its_role_alone(name):
  """Texts of other roles (twins apart) may be anything."""
  loss, all_texts = LOSSES[name], texts()
  reads = {loss.on, *loss.reads} | (set(ROLES[:2]) if "pairs" in loss.needs else set())
  other_text = lambda t: dataclasses.replace(t, logprob=t.logprob * 9, ref=t.ref - 5, hidden=-t.hidden)
  changed = [t if t.role in reads else other_text(t) for t in all_texts]
  assert_array_equal(value(name, context([changed])).value(), value(name, context([all_texts])).value())
  other = next(role for role in ROLES if role != loss.on)
  assert value(name, context([all_texts]), other).value() != value(name, context([all_texts])).value()


# What is missing


@EVERY_LOSS
def test_a_role_that_is_not_there_counts_nothing_and_costs_nothing(name):
  loss = LOSSES[name]
  ctx = context([[text("general" if loss.on != "general" else "forget", [-1.0, -2.0])]])
  of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).value()
  found, slope = jax.value_and_grad(of)((ctx.logprob_BP, ctx.hidden_BTD))
  assert found == 0 and not any(leaf.any() for leaf in slope)


@EVERY_LOSS
def test_an_empty_answer_and_a_missing_twin_are_left_out(name):
  """They neither count nor poison what is there, in value and gradient."""
  empty = lambda role, pair=-1: text(role, np.zeros(0), pair=pair)
  all_texts, odd = texts(), [*map(empty, ROLES), empty("forget", 7), empty("retain", 7)]
  if "pairs" in LOSSES[name].needs:
    odd += [text("retain", -1.0, pair=8), empty("forget", 8)]
  plain, found = (value(name, context([rows])) for rows in (all_texts, all_texts + odd))
  assert_allclose(found.value(), plain.value(), rtol=1e-6)
  assert found.weight == plain.weight
  ctx = context([all_texts + odd])
  of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).value()
  assert all(np.isfinite(leaf).all() for leaf in jax.grad(of)((ctx.logprob_BP, ctx.hidden_BTD)))


@EVERY_LOSS
def test_a_certain_and_an_impossible_token_give_finite_slopes(name):
  rows = [text(t.role, np.where(np.arange(len(t.logprob)) % 2, -200.0, 0.0), t.ref, t.pair, 100 * t.hidden,
               t.ref_hidden, t.target) for t in texts()]  # fmt: skip
  ctx = context([rows])
  of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).value()
  found, slope = jax.value_and_grad(of)((ctx.logprob_BP, ctx.hidden_BTD))
  assert np.isfinite(found) and all(np.isfinite(leaf).all() for leaf in slope)


# Composing


@pytest.mark.parametrize("losses,message", [
  ({"nop": {}}, "there is no loss `nop`; did you mean `npo`?"),
  ({"npo": {"on": "forgot"}}, "losses.npo.on = `forgot` is not a role; did you mean `forget`?"),
  ({"npo": {"betta": 1.0}}, "losses.npo has no coefficient `betta`; did you mean `beta`?"),
  ({"sft": {"wieght": 1.0}}, "losses.sft has no coefficient `wieght`; did you mean `weight`?"),
  ({}, "`losses` is empty"),
])  # fmt: skip
def test_what_a_config_may_not_say(losses, message):
  with pytest.raises(UserError) as error:
    parse(losses)
  assert message in str(error.value)


@EVERY_LOSS
def test_what_a_config_says_and_what_it_leaves_out(name):
  loss = LOSSES[name]
  objective, coefficients = parse({name: {}})
  assert dict(objective.terms[0].options) == {option: choices[0] for option, choices in loss.options.items()}
  assert objective.terms[0][:3] == (name, name, loss.on)
  assert coefficients == {name: {"weight": 1.0, **loss.coefficients}}
  assert loss.on in objective.roles and objective.needs == set(loss.needs)
  other = next(role for role in ROLES if role != loss.on)
  objective, coefficients = parse({name: {"on": other, "weight": 3}})
  assert objective.terms[0][:3] == (name, name, other) and coefficients[name]["weight"] == 3.0
  assert (other in objective.kl_roles) == ("ref_hidden" in loss.needs)


def step_inputs(objective):
  """A tiny model, fresh adapters, and a batch of one text a role whose reference is the model itself."""
  module = Transformer(tiny_config(hidden_size=8, mlp_size=12, num_layers=2, num_heads=2, num_kv_heads=1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), nn.unbox(abstract_variables(module))
  )
  segments = [text_segment(rng.integers(0, 23, 8), 3, score=True, kl=True) for role in ROLES]
  places, shape = place(segments, 16)
  shape = union([shape], 1)
  arrays = pack(segments, places, shape)
  arrays.pop("branch")
  role, pair = np.full((2, shape.B, shape.S), -1, np.int32)
  for number, at in enumerate(places):
    role[at.b, at.s] = number
    if number < 2:
      twin = places[1 - number]
      pair[at.b, at.s] = twin.b * shape.S + twin.s
  forward = jax.jit(lambda *inputs: module.apply({"params": params}, *inputs)[0])
  hidden = forward(*(arrays[name] for name in ("tokens", "segment", "position")))
  head = model_head(params, module.config)
  ref_logprob = token_logprobs(gather_positions(hidden, arrays["score_at"]), head, arrays["target"])
  batch = Batch(**arrays, role=role, pair=pair, ref_logprob=ref_logprob,
                ref_hidden=gather_positions(hidden, arrays["kl_at"]))  # fmt: skip
  config, tx = LoraConfig(rank=2, targets=("q", "up")), optax.scale_by_adam()
  lora = init_lora(jax.random.key(0), params, config)
  state = TrainState(jnp.int32(0), lora, tx.init(lora))
  return make_train_step(module, objective, tx), state, {"params": params, "lora_scale": lora_scale(config, 2)}, batch


def test_a_step_of_all_losses_starts_at_the_closed_forms_and_never_compiles_again():
  objective, coefficients = parse({name: {} for name in NAMES})
  step, state, frozen, batch = step_inputs(objective)
  start = jax.tree.map(np.asarray, state.params)
  traced = lambda rate, losses: jax.tree.map(jnp.float32, {"learning_rate": rate, "losses": losses})
  state, metrics = step(state, frozen, batch, traced(0.0, coefficients))
  jax.tree.map(assert_array_equal, state.params, start)  # a learning rate of zero, and the copy is not donated
  parts = {name: float(part) for name, part in metrics["parts"].items()}
  start_of = {"npo": 20 * np.log(2), "dpo": np.log(2), "kl": 0.0, "kto": 0.5, "rmu_retain": 0.0}
  assert_allclose([parts[name] for name in start_of], list(start_of.values()), rtol=1e-5, atol=1e-5)
  assert bool(metrics["finite"]) and parts["sft"] > 0 > parts["ga"]

  weights = {name: 0.1 * (i + 1) for i, name in enumerate(NAMES)}
  changed = {name: {**settings, "weight": weights[name]} for name, settings in coefficients.items()}
  changed["npo"]["beta"] = 0.5
  state, metrics = step(state, frozen, batch, traced(1e-2, changed))
  parts["npo"] = 4 * np.log(2)
  assert_allclose(metrics["loss"], sum(weights[name] * parts[name] for name in parts), rtol=1e-5)
  state, metrics = step(state, frozen, batch, traced(1e-2, changed))
  assert abs(float(metrics["parts"]["dpo"]) - np.log(2)) > 1e-6, "the second step moved the adapters"
  assert int(state.step) == 3 and step._cache_size() == 1


@pytest.mark.parametrize("vary", ["seeds", "settings"])
def test_four_seeds_or_settings_train_together_as_they_do_alone(vary):
  """One program, `vmap` over four states or four sets of coefficients, three steps."""
  objective, defaults = parse({"npo": {}, "sft": {}, "kl": {"divergence": "reverse"}, "simpo": {}, "undial": {}})
  step, state, frozen, batch = step_inputs(objective)
  states, settings = [state] * 4, [{"learning_rate": 1e-2, "losses": defaults}] * 4
  if vary == "seeds":
    draw = lambda seed: init_lora(jax.random.key(seed), frozen["params"], LoraConfig(rank=2, targets=("q", "up")))
    states = [state.replace(params=draw(seed)) for seed in range(4)]
  else:
    npo_settings = ((0.1, 0.1), (1.0, 0.1), (1.0, 0.5), (3.0, 1.0))
    losses = [{**defaults, "npo": {"weight": weight, "beta": beta}} for weight, beta in npo_settings]
    settings = [{"learning_rate": 1e-2 * (i + 1), "losses": mine} for i, mine in enumerate(losses)]
  settings = [jax.tree.map(jnp.float32, mine) for mine in settings]
  stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  together, four = stack(states), jax.jit(jax.vmap(step, in_axes=(0, None, None, 0)))
  for _ in range(3):
    together, metrics = four(together, frozen, batch, stack(settings))
  alone = []
  for mine, its in zip(states, settings, strict=True):
    mine = jax.tree.map(jnp.copy, mine)
    for _ in range(3):
      mine, last = step(mine, frozen, batch, its)
    alone.append((mine, last))
  jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-5, atol=1e-5), (together, metrics), stack(alone))
  assert float(jnp.ptp(metrics["loss"])) > 1e-3


def test_a_reference_asked_in_the_step_is_the_cached_one():
  objective, coefficients = parse({name: {} for name in NAMES})
  step, state, frozen, batch = step_inputs(objective)
  state = state.replace(params=jax.tree.map(lambda x: x + 0.1, state.params))  # no longer the start model
  traced = jax.tree.map(jnp.float32, {"learning_rate": 1e-2, "losses": coefficients})
  copy = jax.tree.map(jnp.copy, state)
  cached = step(state, frozen, batch, traced)
  asked = step(copy, frozen, batch.replace(ref_logprob=None, ref_hidden=None), traced)
  jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-5), cached, asked)
  assert cached[1]["parts"]["rmu_retain"] > 0


def test_a_loss_without_a_reference_does_not_ask_for_one():
  assert "ref_logprob" in parse({"dpo": {}})[0].needs
  assert "ref_logprob" not in parse({"dpo": {"reference": "none"}})[0].needs
  assert parse({"kto": {}})[0].roles == {"forget", "retain", "mismatched"}


def test_two_divergences_of_one_batch_read_their_own_roles():
  ctx = context([texts()])
  both = [value("kl", ctx, on).value() for on in ("general", "retain")]
  alone = [value("kl", context([[t for t in texts() if t.role == on]]), on).value() for on in ("general", "retain")]
  assert_allclose(both, alone, rtol=1e-5)


def test_the_published_anchor_divides_by_padded_texts():
  ctx = context([texts()])
  plain, padded = (value("kl", ctx, divergence="cross_entropy", over=over) for over in ("tokens", "padded"))
  assert_allclose(padded.value(), plain.sum / 200, rtol=1e-6)  # two texts of 100


# What the specs' closed forms say about these losses


@pytest.mark.parametrize("form", ["sigmoid", "ipo", "hinge"])
def test_smoothing_by_a_half_makes_a_pair_symmetric(form):
  pair = [text("retain", -1.0, 0.3, pair=0), text("forget", -4.0, 0.1, pair=0)]
  of = lambda on, **how: float(value("dpo", context([pair]), on, form=form, **how).value())
  assert_allclose(of("retain", smoothing=0.5), of("forget", smoothing=0.5), rtol=1e-6)
  assert_allclose(of("retain", smoothing=0.2), 0.8 * of("retain") + 0.2 * of("forget"), rtol=1e-6)


def test_ipo_is_zero_where_the_margin_is_one_over_two_beta():
  pair = [text("retain", -1.0, -1.0, pair=0), text("forget", -7.0, -2.0, pair=0)]
  assert_allclose(value("dpo", context([pair]), form="ipo", beta=0.1).value(), 0.0, atol=1e-9)


def test_dpo_of_the_composed_model_against_its_proposal_is_reference_free_dpo():
  """log(P Q / Z) - log P = log Q - log Z, and Z is the same for both answers (RAM, section 2.2)."""
  rng = np.random.default_rng(0)
  q, p, z = rng.normal(-3, 1, 2), rng.normal(-9, 2, 2), -1.3
  composed, proposal = q + p - z, p
  sides = ("retain", "forget")
  whole = context([[text(role, composed[i], proposal[i], pair=0) for i, role in enumerate(sides)]])
  aligner = context([[text(role, q[i], 0.0, pair=0) for i, role in enumerate(sides)]])
  for beta in (0.1, 0.5, 1.0):
    free = value("dpo", aligner, reference="none", beta=beta).value()
    assert_allclose(value("dpo", whole, beta=beta).value(), free, rtol=1e-5)


def test_rams_alpha_is_the_weight_of_the_rejected_and_zero_is_likelihood():
  ctx = context([[t for t in texts() if t.pair >= 0]])
  assert_array_equal(value("ram", ctx, alpha=0.0).value(), value("sft", ctx, reduction="seq_sum").value())
  slope = jax.grad(lambda alpha: value("ram", ctx, alpha=alpha).value())(0.3)
  assert_allclose(slope, np.mean([t.logprob.sum() for t in texts() if t.role == "forget" and t.pair >= 0]), rtol=1e-5)


def test_ktos_reference_point_shifts_both_sides_and_is_never_negative():
  def of(z, r_wanted, r_unwanted):
    rows = [text("retain", r_wanted, 0.0), text("forget", r_unwanted, 0.0), text("mismatched", z, 0.0)]
    return float(value("kto", context([rows]), beta=0.5, desirable=1.0, undesirable=2.0).value())

  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  for z in (0.0, 1.5):
    expected = (1 - sigmoid(0.5 * (2.0 - z)) + 2 * (1 - sigmoid(0.5 * (z + 1.0)))) / 2
    assert_allclose(of(z, 2.0, -1.0), expected, rtol=1e-5)
  assert of(-4.0, 2.0, -1.0) == of(0.0, 2.0, -1.0)


def test_satimp_without_importance_is_wga():
  ctx = context([texts()])
  assert_allclose(value("satimp", ctx, beta1=1.0, beta2=0.0).value(), value("wga", ctx, alpha=1.0).value(), rtol=1e-6)
  assert_allclose(value("wga", ctx, alpha=0.0).value(), value("ga", ctx).value(), rtol=1e-6)


def test_undial_without_strength_is_the_divergence():
  ctx = context([texts()])
  assert_allclose(value("undial", ctx, strength=0.0).value(), value("kl", ctx, "forget").value(), rtol=1e-6)


def test_npos_one_sigmoid_a_batch_depends_on_what_shares_it():
  halves = [context([part]) for part in (texts()[:4], texts()[4:])]
  how = {"reduction": "batch_token_mean"}
  apart = np.mean([value("npo", ctx, **how).value() for ctx in halves])
  assert abs(value("npo", context([texts()]), **how).value() - apart) > 1e-4
