"""Penalties on weights and distillation: closed forms, finite differences, and the start model, where nothing pulls."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias import methods
from jaxbias.data.rows import Split, Text, Triple
from jaxbias.errors import UserError
from jaxbias.losses.context import LossContext
from jaxbias.losses.likelihood import kl
from jaxbias.losses.registry import NO_ROLE, evaluate, parse
from jaxbias.losses.remedies import distill, ewc, l2sp
from jaxbias.methods.remedies import GRID
from jaxbias.models.lora import LowRank
from jaxbias.models.transformer import Head
from jaxbias.types import ROLES, Batch

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
UPDATE = LowRank(draw(2, 5, 3), draw(2, 3, 4), jnp.array([2.0, 0.5]))
MOVED = {"embedding": draw(6, 4), "layers/mlp/up/kernel": UPDATE}
FISHER = {"embedding": draw(6, 4) ** 2, "layers/mlp/up/kernel": draw(2, 5, 4) ** 2}


def on_weights(loss, moved=MOVED, fisher=FISHER) -> jax.Array:
  return loss(LossContext(None, None, moved=moved, fisher=fisher), NO_ROLE).value()


def multiplied_out(moved: dict) -> dict:
  return {path: each.dense() if isinstance(each, LowRank) else each for path, each in moved.items()}


def test_adapters_are_penalised_as_the_weights_that_they_add():
  dense = multiplied_out(MOVED)
  assert_allclose(on_weights(l2sp), sum((x**2).sum() for x in dense.values()) / 2, rtol=1e-5)
  assert_allclose(on_weights(ewc), sum((FISHER[path] * x**2).sum() for path, x in dense.items()) / 2, rtol=1e-5)
  assert_allclose(on_weights(l2sp), on_weights(l2sp, dense), rtol=1e-5)
  assert_allclose(on_weights(ewc), on_weights(ewc, dense), rtol=1e-5)
  assert_allclose(on_weights(ewc, fisher=jax.tree.map(jnp.ones_like, FISHER)), on_weights(l2sp), rtol=1e-5)


@pytest.mark.parametrize("loss", [l2sp, ewc])
def test_a_penaltys_gradient_is_the_finite_difference_and_zero_at_the_start(loss):
  of = jax.jit(lambda moved: on_weights(loss, moved))
  slope, h = jax.jit(jax.grad(of))(MOVED), 1e-2
  for seed in range(3):
    rng = np.random.default_rng(seed)
    along = jax.tree.map(lambda x, rng=rng: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), MOVED)
    ahead, behind = (of(jax.tree.map(lambda x, d, s=s: x + s * h * d, MOVED, along)) for s in (1, -1))
    inner = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, along)))
    assert_allclose((ahead - behind) / (2 * h), inner, rtol=3e-3, atol=1e-2)
    assert abs(inner) > 0.1
  start = {"embedding": jnp.zeros((6, 4)), "layers/mlp/up/kernel": UPDATE._replace(b=jnp.zeros_like(UPDATE.b))}
  assert of(start) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(jax.jit(jax.grad(of))(start)))


@pytest.mark.parametrize("strength,optimum", [(1.0, 0.5), (5.0, 1 / 6), (0.0, 1.0)])
def test_the_toy_problem_ends_where_it_should(strength, optimum):
  """1/2 (theta - 1)^2 + lambda/2 F theta^2 with start 0 has its minimum at 1 / (1 + lambda F)."""
  total = lambda theta: 0.5 * (theta - 1) ** 2 + strength * on_weights(ewc, {"w": theta}, {"w": jnp.float32(1.0)})
  slope, curvature = jax.grad(total)(jnp.float32(0.0)), jax.grad(jax.grad(total))(jnp.float32(0.0))
  assert_allclose(-slope / curvature, optimum, rtol=1e-6)  # one Newton step ends it


# Distillation


V, K = 7, 3


def compared(logits_BKV, ref_BKV, **head) -> LossContext:
  """Two rows of one general text each, the last position of the first one being padding."""
  segment = jnp.ones((2, K), jnp.int32).at[0, -1].set(0)
  zero = jnp.zeros((2, K), jnp.int32)
  role = jnp.full((2, 1), ROLES.index("general"))
  batch = Batch(zero, zero, zero, zero, zero, zero, role=role, kl_at=zero, kl_segment=segment, ref_hidden=ref_BKV)
  return LossContext(batch, None, logits_BKV, head=Head(jnp.eye(V), **head), ref_head=Head(jnp.eye(V), **head))


LOGITS, REF = draw(2, K, V), draw(2, K, V)


def distilled(logits, temperature, ref=REF, **head):
  return distill(compared(logits, ref, **head), "general", temperature).value()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("head", [{}, {"bias": draw(V), "softcap": 3.0}])
def test_distillation_is_the_tempered_divergence_with_its_slope(temperature, head):
  def plain(logits):
    if head:
      logits, ref = (3 * jnp.tanh((x + head["bias"]) / 3) for x in (logits, REF))
    else:
      ref = REF
    log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (ref, logits))
    each = temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return (each.sum() - each[0, -1]) / (2 * K - 1)

  found, slope = jax.value_and_grad(lambda x: distilled(x, temperature, **head))(LOGITS)
  expected, expected_slope = jax.value_and_grad(plain)(LOGITS)
  assert_allclose(found, expected, rtol=1e-5)
  assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-6)
  h, along = 1e-2, draw(2, K, V)
  ahead, behind = (distilled(LOGITS + s * h * along, temperature, **head) for s in (1, -1))
  assert_allclose((ahead - behind) / (2 * h), jnp.vdot(slope, along), rtol=5e-3, atol=2e-4)


def test_at_temperature_one_it_is_the_anchor_kl():
  ctx = compared(LOGITS, REF)
  assert_allclose(distill(ctx, "general", 1.0).value(), kl(ctx, "general", 100.0).value(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_is_distilled_at_the_start(temperature):
  value, slope = jax.value_and_grad(lambda x: distilled(x, temperature))(REF)
  assert_allclose(value, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)


def test_the_gradient_hardly_depends_on_the_temperature_where_logits_are_small():
  """Hinton et al. 2015, section 2.1: for logits far below T the T^2-scaled gradient is (z - v) / V, of centred logits.
  Without T^2 it would be 25 and 100 times smaller at T = 5 and 10."""
  ref, logits = 0.01 * REF, 0.01 * LOGITS
  slopes = [jax.grad(lambda x, t=t: distilled(x, t, ref))(logits) for t in (1.0, 5.0, 10.0)]
  size = np.abs(slopes[0]).max()
  for slope in slopes[1:]:
    assert np.abs(slope - slopes[0]).max() < 0.02 * size
  difference = (logits - ref) - (logits - ref).mean(-1, keepdims=True)
  assert_allclose(slopes[2][1], difference[1] / V / (2 * K - 1), atol=0.02 * size)


# In a config


def test_penalties_are_added_with_their_weight_and_ask_for_no_text():
  objective, coefficients = parse({"sft": {}, "l2sp": {"weight": 0.5}, "ewc": {"weight": 10.0}})
  assert objective.roles == objective.scored_roles == {"retain"} and not objective.kl_roles
  assert {"moved", "fisher"} <= objective.needs
  nothing = compared(LOGITS, REF)
  ctx = dataclasses.replace(nothing, logprob_BP=jnp.zeros((2, K)), moved=MOVED, fisher=FISHER)
  out = evaluate(objective, ctx, coefficients)
  assert_allclose(out.total, 0.5 * on_weights(l2sp) + 10 * on_weights(ewc), rtol=1e-6)
  for settings, said in [({"l2sp": {"on": "general"}, "sft": {}}, "losses.l2sp has no `on`"),
                         ({"l2sp": {}, "ewc": {}}, "losses has l2sp, ewc alone, which read no text"),
                         ({"sft": {}, "l2ps": {}}, "did you mean `l2sp`"),
                         ({"distill": {"temprature": 2.0}}, "did you mean `temperature`")]:  # fmt: skip
    with pytest.raises(UserError, match=said):
      parse(settings)


VARIANT = methods.variant("npo")


@pytest.mark.parametrize("remedy", [name for name in GRID if name != "fusion"])
def test_a_remedy_of_no_strength_is_no_remedy(remedy):
  assert methods.remedied(VARIANT, remedy, 0.0) == VARIANT


@pytest.mark.parametrize("remedy", GRID)
def test_every_strength_of_the_grid_gives_a_variant_and_leaves_the_old_one_alone(remedy):
  before = repr(VARIANT)
  made = [methods.remedied(VARIANT, remedy, strength) for strength in GRID[remedy]]
  assert repr(VARIANT) == before and len({repr(each) for each in made}) == len(GRID[remedy])
  for each in made:
    parse(each["losses"])


def test_replay_mixes_in_general_text_and_in_the_end_reads_nothing_else():
  some = methods.remedied(VARIANT, "replay", 0.25)["losses"]
  weights = {key: each["weight"] for key, each in some.items()}
  assert_allclose(list(weights.values()), [0.375, 0.225, 0.15, 0.25])
  assert weights.keys() == {*VARIANT["losses"], "sft:replay"}
  continued = methods.remedied(VARIANT, "replay", 1.0)["losses"]
  objective, coefficients = parse(continued)
  assert objective.roles == {"general"} and coefficients == {"sft:replay": {"weight": 1.0}}
  triple = Triple("1", "gender", "he", "he BLANK", ("he sat", "he ran", "he 12"), 3)
  recipe = methods.get(VARIANT["method"]).recipe(Split((triple,), (Text("2", "a fact"),)), 0)
  assert [row.text for role in objective.roles for row in recipe.rows(role)] == ["a fact"]


def test_what_a_remedy_is_given_and_what_it_refuses():
  made = methods.remedied(VARIANT, "distill", 10.0, temperature=1.0)
  assert made["losses"]["distill"] == {"weight": 10.0, "temperature": 1.0}
  both = methods.remedied(methods.remedied(VARIANT, "recadam", 5e3, kappa=0.2), "mixout", 0.5)
  assert both["remedy"] == {"recadam_gamma": 5e3, "recadam_kappa": 0.2, "mixout": 0.5}
  assert methods.remedied(VARIANT, "fusion", 0.3)["adapter_scale"] == 0.3
  assert methods.remedied(methods.variant("task_vector"), "fusion", 0.5)["adapter_scale"] == -0.5
  for remedy, strength, said in [("ewcc", 1.0, "there is no remedy `ewcc`; did you mean `ewc`"),
                                 ("mixout", 1.0, "cannot have the strength 1.0"), ("replay", 1.5, "cannot have"),
                                 ("l2sp", -1.0, "cannot have")]:  # fmt: skip
    with pytest.raises(UserError, match=said):
      methods.remedied(VARIANT, remedy, strength)
