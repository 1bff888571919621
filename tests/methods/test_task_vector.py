"""A task vector is learned and taken away: the factor of the adapters, in evaluation and when a run is loaded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias import methods
from jaxbias.models import adapted
from jaxbias.models.lora import LoraConfig, init_lora, lora_scale, merge, scaled
from jaxbias.models.transformer import Transformer, abstract_variables
from jaxbias.train.checkpoint import Checkpoints
from jaxbias.types import TrainState
from tests.models import tiny_config

LORA = LoraConfig(rank=2, alpha=6.0, targets=("q", "up"))


@pytest.fixture(scope="module")
def trained() -> tuple[Transformer, dict, dict]:
  """A model, its parameters, and adapters that are no longer zero."""
  module, rng = Transformer(tiny_config(num_layers=2)), np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
  params = jax.tree.map(draw, nn.unbox(abstract_variables(module)))
  lora = jax.tree.map(draw, init_lora(jax.random.key(0), params, LORA))
  return module, params, {"lora": lora, "lora_scale": lora_scale(LORA, 2)}


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.4, 1.0])
def test_the_scaled_model_is_the_base_plus_so_much_of_the_difference(trained, factor):
  module, params, adapters = trained
  tokens = jnp.arange(6)[None]
  inputs = (tokens, jnp.ones_like(tokens), tokens)
  found, _ = module.apply({"params": params, **scaled(adapters, factor)}, *inputs)
  whole = merge(params, adapters["lora"], adapters["lora_scale"])
  between = jax.tree.map(lambda base, new: base + factor * (new - base), params, whole)
  assert_allclose(found, module.apply({"params": between}, *inputs)[0], atol=2e-5)


def test_the_task_vector_learns_what_is_to_be_forgotten_and_is_taken_away():
  variant = methods.variant("task_vector")
  assert variant["adapter_scale"] == -1.0 and variant["losses"]["sft"]["on"] == "forget"
  assert methods.variant("sft")["adapter_scale"] == 1.0


@pytest.mark.parametrize("spec,factor", [({"adapter_scale": -1.0}, -1.0), ({}, 1.0)])
def test_a_run_is_loaded_as_it_was_evaluated(trained, tmp_path, spec, factor):
  module, _, adapters = trained
  state = TrainState(jnp.int32(3), adapters["lora"], {})
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  about = {"model": "base", "lora": dataclasses.asdict(LORA), "variant": "mine", "variants": {"mine": spec}}
  checkpoints.save(state, about)
  checkpoints.close()
  found = adapted.find(tmp_path).read(module.config)
  assert_array_equal(found["lora_scale"]["scale"], [factor * 3.0] * 2)
