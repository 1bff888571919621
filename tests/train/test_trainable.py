"""What a run trains: chosen leaves of the base, and a loss that would train nothing."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxbias.errors import UserError
from jaxbias.losses.registry import parse
from jaxbias.train import trainable

PARAMS = {"embedding": jnp.ones((3, 2)), "layers": {"mlp": {"up": {"kernel": jnp.ones((2, 2, 4))}}}}


def test_patterns_choose_leaves_and_a_stray_one_is_named():
  chosen = lambda *patterns: set(trainable.chosen_leaves(PARAMS, patterns))
  assert chosen("embedding") == {("embedding",)}
  assert chosen("layers/mlp/*") == {("layers", "mlp", "up", "kernel")}
  assert len(chosen("*")) == 2 and chosen() == set()
  with pytest.raises(UserError, match="train.base has `embeding`.*did you mean `embedding`"):
    chosen("embeding")


def test_base_leaves_take_the_place_of_the_frozen_ones():
  frozen = {"params": PARAMS, "lora_scale": {"scale": jnp.ones(2)}}
  trained = {"base": {"embedding": jnp.zeros((3, 2))}, "losses": {"contrast": {"w": jnp.ones(1)}}}
  found = trainable.collections(trained, frozen)
  assert found.keys() == {"params", "lora_scale"}
  assert not found["params"]["embedding"].any() and found["params"]["layers"] == PARAMS["layers"]
  assert trainable.collections({"layers": {"a": 1}}, frozen)["lora"] == {"layers": {"a": 1}}


def test_a_loss_on_weights_that_do_not_train_is_refused():
  objective = lambda gradient: parse({"nc3": {"gradient": gradient}})[0]
  with pytest.raises(UserError, match="losses.nc3 has gradient = `weights`.*train.base="):
    trainable.check(objective("weights"), PARAMS, ())
  trainable.check(objective("weights"), PARAMS, ("embedding",))
  trainable.check(objective("both"), PARAMS, ())
