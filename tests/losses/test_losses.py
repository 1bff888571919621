"""Every registered loss: its closed forms, its gradient, the published code's numbers, and what may not change it.

A loss that is added to the registry is asked here for its value at the reference, and is then held to the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

import jaxbias.losses  # noqa: F401, registers the losses
from jaxbias.data.pipeline import pack, place, text_segment, union
from jaxbias.errors import UserError
from jaxbias.losses.likelihood import ga, kl, sft
from jaxbias.losses.logprobs import forward_kl, gather_positions, token_logprobs
from jaxbias.losses.preference import dpo, npo
from jaxbias.losses.registry import LOSSES, LossContext, evaluate, parse
from jaxbias.models.lora import LoraConfig, init_lora, lora_scale
from jaxbias.models.transformer import Head, Transformer, abstract_variables
from jaxbias.models.transformer import head as model_head
from jaxbias.train.step import make_train_step
from jaxbias.types import ROLES, Batch, Metric, TrainState
from tests.models import tiny_config

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "biasunlearn_oracle.json").read_text())
BETAS = pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 1.0])
EVERY_LOSS = pytest.mark.parametrize("name", sorted(LOSSES))


pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Text:
  """A segment: the log-probability of each of its answer tokens under policy and reference, and KL per position."""

  role: str
  logprob: np.ndarray
  ref: np.ndarray
  kl: np.ndarray
  pair: int  # texts with the same number are twins


def text(role: str, logprob, ref=None, kl=(), pair: int = -1) -> Text:
  logprob = np.atleast_1d(logprob)
  return Text(role, logprob, logprob if ref is None else np.atleast_1d(ref), np.asarray(kl), pair)


def context(rows: list[list[Text]], spare: int = 0, filler: float = 0.0) -> LossContext:
  """Texts packed as given, with `spare` unused segments and positions in every row, which hold `filler`."""
  B, S = len(rows), max(map(len, rows)) + spare
  P, K = (max(sum(len(getattr(t, what)) for t in row) for row in rows) + spare for what in ("logprob", "kl"))
  full = lambda n, value, dtype=np.int32: np.full((B, n), value, dtype)
  role, pair, score_segment, kl_segment = full(S, -1), full(S, -1), full(P, 0), full(K, 0)
  logprob, ref, kl_BK = (full(n, filler, np.float32) for n in (P, P, K))
  for b, row in enumerate(rows):
    p = k = 0
    for s, t in enumerate(row):
      role[b, s] = ROLES.index(t.role)
      twins = [i * S + j for i, r in enumerate(rows) for j, u in enumerate(r) if u.pair == t.pair >= 0 and u is not t]
      pair[b, s] = twins[0] if twins else -1
      logprob[b, p : p + len(t.logprob)], ref[b, p : p + len(t.ref)] = t.logprob, t.ref
      score_segment[b, p : p + len(t.logprob)] = s + 1
      kl_BK[b, k : k + len(t.kl)], kl_segment[b, k : k + len(t.kl)] = t.kl, s + 1
      p, k = p + len(t.logprob), k + len(t.kl)
  zeros = np.zeros((B, 1), np.int32)
  batch = Batch(
    tokens=zeros, segment=zeros, position=zeros, score_at=zeros, target=zeros, score_segment=jnp.asarray(score_segment),
    role=jnp.asarray(role), pair=jnp.asarray(pair), ref_logprob=jnp.asarray(ref), kl_segment=jnp.asarray(kl_segment),
  )  # fmt: skip
  return LossContext(batch, jnp.asarray(logprob), jnp.asarray(kl_BK))


def texts(at_reference: bool = False) -> list[Text]:
  """Three pairs, a forget text and a retain text without twin, two general texts, of many lengths."""
  rng = np.random.default_rng(0)
  draw = lambda n: -rng.exponential(2.0, n)

  def make(role, n, pair=-1):
    logprob, ref, positions = draw(n), draw(n), rng.exponential(1.0, n if role == "general" else 0)
    return text(role, logprob, logprob if at_reference else ref, 0 * positions if at_reference else positions, pair)

  return [
    make("forget", 1, 0), make("retain", 4, 0), make("general", 3), make("forget", 2, 1), make("retain", 3, 1),
    make("general", 5), make("forget", 6, 2), make("retain", 2, 2), make("retain", 1), make("forget", 4),
  ]  # fmt: skip


def value(name: str, ctx: LossContext, **coefficients: float) -> Metric:
  return compiled(name, ctx.batch, ctx.logprob_BP, ctx.kl_BK, {**LOSSES[name].coefficients, **coefficients})


@functools.partial(jax.jit, static_argnums=0)
def compiled(name, batch, logprob_BP, kl_BK, coefficients) -> Metric:
  return LOSSES[name].function(LossContext(batch, logprob_BP, kl_BK), LOSSES[name].on, **coefficients)


@jax.jit
@jax.value_and_grad
def npo_of_one(log_ratio: jax.Array, beta: float) -> jax.Array:
  """NPO of one text whose log-ratio is given, and its derivative."""
  ctx = context([[text("forget", 0.0)]])
  return value("npo", dataclasses.replace(ctx, logprob_BP=jnp.full((1, 1), log_ratio)), beta=beta).value()


# At the reference


def at_reference(name: str) -> float:
  def token_mean(role):
    return np.mean([t.logprob.mean() for t in texts() if t.role == role])

  known = {
    "sft": -token_mean("retain"),
    "ga": token_mean("forget"),
    "kl": 0.0,
    "npo": 2 / 0.1 * np.log(2),
    "dpo": np.log(2),
  }
  assert name in known, f"say here what `{name}` is when the policy is the reference"
  return known[name]


@EVERY_LOSS
def test_the_value_at_the_reference(name):
  found = value(name, context([texts(at_reference=True)]))
  assert_allclose(found.value(), at_reference(name), rtol=1e-6, atol=1e-6)


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
    return float(dpo(context([pair]), "retain", beta).value()), float(dpo(context([pair]), "forget", beta).value())

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


def test_kl_is_zero_and_flat_at_the_reference_and_positive_elsewhere():
  rng = np.random.default_rng(0)
  ref, other = (rng.standard_normal((2, 3, 11)).astype(np.float32) for _ in range(2))
  head = Head(jnp.eye(11))

  def of(logits):
    ctx = context([[text("general", 0.0, kl=np.zeros(3))]] * 2)
    return kl(dataclasses.replace(ctx, kl_BK=forward_kl(logits, head, ref, head)), "general").value()

  there, slope = jax.value_and_grad(of)(ref)
  assert_allclose(there, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-7)
  for step in (0.01, 0.1, 1.0):
    assert of(ref + step * other) > there
  assert_allclose(of(ref + 3.0), 0.0, atol=1e-5)  # a constant added to all logits is no change


# Gradients


@EVERY_LOSS
def test_the_gradient_is_the_finite_difference(name):
  """Through log-softmax, along random directions of the logits of a model that is no longer the reference."""
  ctx, head = context([texts()[:4], texts()[4:]]), Head(jnp.eye(7))
  B, P, K = len(ctx.batch.role), ctx.logprob_BP.shape[1], ctx.kl_BK.shape[1]
  rng = np.random.default_rng(1)
  target, ref_logits = jnp.asarray(rng.integers(0, 7, (B, P))), jnp.asarray(rng.standard_normal((B, K, 7)), jnp.float32)
  point, *directions = (
    [jnp.asarray(rng.standard_normal((B, n, 7)), jnp.float32) for n in (P, K)] for _ in range(4)
  )  # fmt: skip

  @jax.jit
  @jax.value_and_grad
  def loss(logits):
    scored, compared = token_logprobs(logits[0], head, target), forward_kl(logits[1], head, ref_logits, head)
    return value(name, dataclasses.replace(ctx, logprob_BP=scored, kl_BK=compared)).value()

  _, slope = loss(point)
  h = 1e-2
  for direction in directions:
    ahead, behind = (loss([x + sign * h * d for x, d in zip(point, direction, strict=True)])[0] for sign in (1, -1))
    along = sum(jnp.vdot(g, d) for g, d in zip(slope, direction, strict=True))
    assert abs(along) > 2e-3, "a direction that shows something"
    assert_allclose((ahead - behind) / (2 * h), along, rtol=2e-3, atol=1e-4)


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


@EVERY_LOSS
def test_metrics_of_a_split_batch_add_up(name):
  all_texts = texts()
  first, second = (value(name, context([part])) for part in (all_texts[:3], all_texts[3:]))
  whole = value(name, context([all_texts]))
  assert_allclose((first + second).value(), whole.value(), rtol=1e-6)
  assert abs((first.value() + second.value()) / 2 - whole.value()) > 1e-4, "a mean of means would differ"


@EVERY_LOSS
def test_a_loss_reads_its_role_alone(name):
  """Texts of other roles (twins apart) may be anything."""
  loss, all_texts = LOSSES[name], texts()
  reads = {loss.on} | (set(ROLES[:2]) if "pairs" in loss.needs else set())
  changed = [t if t.role in reads else dataclasses.replace(t, logprob=t.logprob * 9, ref=t.ref - 5) for t in all_texts]
  assert_array_equal(value(name, context([changed])).value(), value(name, context([all_texts])).value())
  other = next(role for role in ROLES if role != loss.on)
  if "ref_distribution" not in loss.needs:  # those get positions of their role only
    moved = loss.function(context([all_texts]), other, **loss.coefficients)
    assert moved.value() != value(name, context([all_texts])).value()


# The published code's numbers (specs/biasunlearn.md, section 4)


def answers(entry: dict, which: str) -> list[np.ndarray]:
  """Log-probability of each answer token of each sequence, from the oracle's logits. float64."""
  inputs = entry["inputs"]
  logits = np.array(inputs[which])
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  out = []
  for b, (labels, start) in enumerate(zip(inputs["labels"], inputs["start_locs"], strict=True)):
    out.append(np.array([log_p[b, t - 1, labels[t]] for t in range(max(start, 1), len(labels)) if labels[t] != -100]))
  return out


def forget_context() -> LossContext:
  entry = ORACLE["lm_and_npo"]
  rows = zip(answers(entry, "logits_theta"), answers(entry, "logits_ref"), strict=True)
  return context([[text("forget", theta, ref)] for theta, ref in rows])


def test_sums_and_means_of_sequences_are_the_published_codes():
  ctx, exact = forget_context(), ORACLE["lm_and_npo"]["float64"]
  assert_array_equal(ctx.tokens_BS[:, 0], exact["n_answer_tokens"])
  assert_allclose(ctx.logprob_BS[:, 0], exact["seq_sum_logp_theta"], rtol=1e-6)
  assert_allclose(ctx.ref_logprob_BS[:, 0], exact["seq_sum_logp_ref"], rtol=1e-6)
  assert_allclose(sft(ctx, "forget").value(), exact["lm_loss_gd_theta"], rtol=1e-6)
  assert_allclose(ga(ctx, "forget").value(), exact["lm_loss_ga_theta"], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_of_summed_log_probabilities_is_the_papers(beta):
  expected = ORACLE["lm_and_npo"]["float64"]["npo_alternatives"][str(beta)]
  found = npo(forget_context(), "forget", beta).value()
  assert_allclose(found, expected["npo_seq_sum_then_batch_mean(paper formula)"], rtol=1e-6)
  if beta == 0.1:
    assert_allclose(found, 15.926613970487736, rtol=1e-6)


@pytest.mark.parametrize("beta", ["1e-06", "0.01", "0.1", "0.5", "1.0"])
def test_the_npo_formula_on_one_log_ratio_is_the_published_codes(beta):
  """Their batch is one log-ratio, minus the difference of the two cross-entropies; here it is one text's."""
  expected = ORACLE["lm_and_npo"]["float64"]["npo_repo_batch_level"][beta]
  loss, slope = npo_of_one(-expected["neg_log_ratio"], float(beta))
  assert_allclose(loss, expected["loss"], rtol=1e-6)
  assert_allclose(-slope, expected["dloss_dCE"], rtol=1e-6)


def test_retention_is_the_published_codes():
  entry = ORACLE["retention"]
  ctx = context([[text("retain", lp) for lp in answers(entry, "logits_theta")]])
  assert_allclose(sft(ctx, "retain").value(), entry["lm_loss_gd_float64"], rtol=1e-6)


def test_the_anchor_is_the_true_divergence_over_real_tokens_only():
  inputs, exact = ORACLE["kl"]["inputs"], ORACLE["kl"]["float64"]
  theta, ref = (jnp.asarray(inputs[f"logits_{which}"], jnp.float32) for which in ("theta", "ref"))
  mask, head = np.array(inputs["attention_mask"]), Head(jnp.eye(theta.shape[-1]))
  each = np.asarray(forward_kl(theta, head, ref, head))
  real, everything = (
    context([[text("general", 0.0, kl=row[keep > 0])] for row, keep in zip(each, which, strict=True)])
    for which in (mask, np.ones_like(mask))
  )
  assert_allclose(kl(real, "general").value(), exact["true_forward_KL_mean_nonpad"], rtol=1e-6)
  assert_allclose(kl(everything, "general").value(), exact["true_forward_KL_mean_all_positions"], rtol=1e-6)
  # theirs is a cross-entropy over padding too: a constant apart, so the same gradient over the same positions
  slope = jax.grad(lambda logits: forward_kl(logits, head, ref, head).mean())(theta)
  assert_allclose(slope, exact["grad_logits_theta"], atol=1e-6)


@pytest.mark.parametrize("weights,key", [
  ((0.5, 0.3, 0.2), "w=0.5,0.3,0.2 (README/run.sh)"), ((0.4, 0.4, 0.2), "w=0.4,0.4,0.2 (paper appendix, second-hand)")
])  # fmt: skip
def test_the_weighted_sum_is_the_published_codes(weights, key):
  total = ORACLE["total_loss_float64"]
  log_ratio = -ORACLE["lm_and_npo"]["float64"]["npo_repo_batch_level"]["0.1"]["neg_log_ratio"]
  anchor = text("general", 0.0, kl=[total["parts"]["kl"]])
  ctx = context([[text("forget", log_ratio, 0.0), text("retain", -total["parts"]["retain"]), anchor]])
  names = ("npo", "sft", "kl")
  objective, coefficients = parse({name: {"weight": w} for name, w in zip(names, weights, strict=True)})
  out = evaluate(objective, ctx, coefficients)
  assert_allclose(out.parts["npo"].value(), total["parts"]["forget"], rtol=1e-6)
  assert_allclose(out.total, total[key], rtol=1e-6)


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
  assert objective.terms[0][:3] == (name, name, loss.on) and coefficients == {name: {"weight": 1.0, **loss.coefficients}}
  assert loss.on in objective.roles and objective.needs == set(loss.needs)
  other = next(role for role in ROLES if role != loss.on)
  objective, coefficients = parse({name: {"on": other, "weight": 3}})
  assert objective.terms[0][:3] == (name, name, other) and coefficients[name]["weight"] == 3.0
  assert (other in objective.kl_roles) == ("ref_distribution" in loss.needs)


def step_inputs(objective):
  """A tiny model, fresh adapters, and a batch of one text a role whose reference is the model itself."""
  module = Transformer(tiny_config(hidden_size=8, mlp_size=12, num_layers=2, num_heads=2, num_kv_heads=1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), nn.unbox(abstract_variables(module))
  )
  segments = [text_segment(rng.integers(0, 23, 8), 3, score=True, kl=role == "general") for role in ROLES]
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
  objective, coefficients = parse({name: {} for name in sorted(LOSSES)})
  step, state, frozen, batch = step_inputs(objective)
  start = jax.tree.map(np.asarray, state.params)
  traced = lambda rate, losses: jax.tree.map(jnp.float32, {"learning_rate": rate, "losses": losses})
  state, metrics = step(state, frozen, batch, traced(0.0, coefficients))
  jax.tree.map(assert_array_equal, state.params, start)  # a learning rate of zero, and the copy is not donated
  parts = {name: float(part) for name, part in metrics["parts"].items()}
  assert_allclose([parts["npo"], parts["dpo"], parts["kl"]], [20 * np.log(2), np.log(2), 0.0], rtol=1e-5, atol=1e-5)
  assert bool(metrics["finite"]) and parts["sft"] > 0 > parts["ga"]

  weights = {name: 0.1 * (i + 1) for i, name in enumerate(sorted(LOSSES))}
  changed = {name: {**settings, "weight": weights[name]} for name, settings in coefficients.items()}
  changed["npo"]["beta"] = 0.5
  state, metrics = step(state, frozen, batch, traced(1e-2, changed))
  parts["npo"] = 4 * np.log(2)
  assert_allclose(metrics["loss"], sum(weights[name] * parts[name] for name in parts), rtol=1e-5)
  state, metrics = step(state, frozen, batch, traced(1e-2, changed))
  assert abs(float(metrics["parts"]["dpo"]) - np.log(2)) > 1e-6, "the second step moved the adapters"
  assert int(state.step) == 3 and step._cache_size() == 1
