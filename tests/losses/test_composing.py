"""What a config says, and the step that it composes: one program for every number, seeds and settings side by side."""

from __future__ import annotations

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
from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.losses.registry import LOSSES, parse
from jaxbias.models.lora import LoraConfig, init_lora, lora_scale
from jaxbias.models.transformer import Transformer, abstract_variables
from jaxbias.models.transformer import head as model_head
from jaxbias.train.step import make_train_step
from jaxbias.types import ROLES, Batch, TrainState
from tests.losses.texts import EVERY_LOSS, NAMES
from tests.models import tiny_config


@pytest.mark.parametrize("losses,message", [
  ({"nop": {}}, "there is no loss `nop`; did you mean `npo`?"),
  ({"npo": {"on": "forgot"}}, "losses.npo.on = `forgot` is not a role; did you mean `forget`?"),
  ({"npo": {"betta": 1.0}}, "losses.npo has no coefficient `betta`; did you mean `beta`?"),
  ({"sft": {"wieght": 1.0}}, "losses.sft has no coefficient `wieght`; did you mean `weight`?"),
  ({"npo": {"weight": float("nan")}}, "losses.npo.weight = nan; it has to be a finite number."),
  ({"distill": {"temperature": 0.0}}, "losses.distill.temperature = 0.0; it has to be a finite number above 0."),
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


@functools.cache
def all_losses():
  """One program for two tests: (coefficients, step, state, frozen, batch) of every loss with its defaults."""
  objective, coefficients = parse({name: {} for name in NAMES})
  return coefficients, *step_inputs(objective)


def test_a_step_of_all_losses_starts_at_the_closed_forms_and_never_compiles_again():
  coefficients, step, state, frozen, batch = all_losses()
  state, start, programs = jax.tree.map(jnp.copy, state), jax.tree.map(np.asarray, state.params), step._cache_size()
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
  assert int(state.step) == 3 and step._cache_size() <= programs + 1


@functools.cache
def several_losses():
  """One program for two tests, alone and side by side."""
  objective, defaults = parse({"npo": {}, "sft": {}, "kl": {"divergence": "reverse"}, "simpo": {}, "undial": {}})
  step, state, frozen, batch = step_inputs(objective)
  return defaults, step, jax.jit(jax.vmap(step, in_axes=(0, None, None, 0))), state, frozen, batch


@pytest.mark.parametrize("vary", ["seeds", "settings"])
def test_four_seeds_or_settings_train_together_as_they_do_alone(vary):
  """One program, `vmap` over four states or four sets of coefficients, three steps."""
  defaults, step, four, state, frozen, batch = several_losses()
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
  together = stack(states)
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
  coefficients, step, state, frozen, batch = all_losses()
  state = jax.tree.map(jnp.copy, state)
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
