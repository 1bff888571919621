"""Adapters: they start as nothing, merge into the base, and differentiate as the product that they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.errors import UserError
from jaxbias.models.layers import low_rank
from jaxbias.models.lora import LoraConfig, init_lora, lora_axes, lora_scale, merge
from jaxbias.models.transformer import Transformer, abstract_variables
from tests.models import tiny_config

CONFIG = tiny_config()
MODULE = Transformer(CONFIG)
LORA = LoraConfig(rank=2, alpha=6.0)
SCALE = lora_scale(LORA, CONFIG.num_layers)
TOKENS = np.arange(14).reshape(2, 7)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_like(tree, seed: int, size: float = 0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def params():
  return random_like(nn.unbox(abstract_variables(MODULE)), seed=0)


@pytest.fixture(scope="module")
def trained(params):
  """Adapters with both factors away from zero, as after some steps."""
  return random_like(init_lora(jax.random.key(0), params, LORA), seed=1)


@jax.jit
def hidden(variables):
  position = jnp.broadcast_to(jnp.arange(7), (2, 7))
  return MODULE.apply(variables, TOKENS, jnp.ones((2, 7), int), position)[0]


def test_the_adapted_model_starts_as_the_base_exactly(params):
  adapters = init_lora(jax.random.key(0), params, LORA)
  assert_array_equal(hidden({"params": params, "lora": adapters, "lora_scale": SCALE}), hidden({"params": params}))


def test_adapters_start_as_peft_draws_them(params):
  adapters = flatten_dict(init_lora(jax.random.key(3), params, LORA))
  again, other = (flatten_dict(init_lora(jax.random.key(seed), params, LORA)) for seed in (3, 4))
  kernels = {path[:-1]: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}
  assert {path[:-1] for path in adapters} == set(kernels) and len(kernels) == 7
  draws = []
  for path, kernel in kernels.items():
    a, b = adapters[(*path, "a")], adapters[(*path, "b")]
    assert (a.shape, b.shape) == ((3, kernel.shape[1], 2), (3, 2, kernel.shape[2]))
    assert not b.any() and float(jnp.abs(a).max()) <= kernel.shape[1] ** -0.5
    assert float(jnp.abs(a).max()) > 0.7 * kernel.shape[1] ** -0.5
    assert_array_equal(a, again[(*path, "a")])
    draws += [a, other[(*path, "a")]]
  assert len({np.asarray(draw)[0, :3].tobytes() for draw in draws}) == len(draws), "two projections share their draw"


def test_merging_equals_applying(params, trained):
  base, adapted = hidden({"params": params}), hidden({"params": params, "lora": trained, "lora_scale": SCALE})
  merged = merge(params, trained, SCALE)
  assert_allclose(hidden({"params": merged}), adapted, atol=1e-4)
  assert np.abs(adapted - base).max() > 0.1, "the adapters must do something"
  kernel, (a, b) = params["layers"]["mlp"]["up"]["kernel"], (trained["layers"]["mlp"]["up"][x] for x in "ab")
  assert_allclose(merged["layers"]["mlp"]["up"]["kernel"][1], kernel[1] + 6.0 / 2 * a[1] @ b[1], rtol=1e-5, atol=1e-6)


def test_a_layer_whose_scale_is_zero_is_left_alone(params, trained):
  """Same as an adapter whose factors are zero in that layer, and no adapter at all when every layer's is zero."""
  without = jax.tree.map(lambda leaf: leaf.at[1].set(0.0), trained)
  muted = hidden({"params": params, "lora": trained, "lora_scale": {"scale": SCALE["scale"].at[1].set(0.0)}})
  assert_allclose(muted, hidden({"params": params, "lora": without, "lora_scale": SCALE}), atol=1e-6)
  silent = hidden({"params": params, "lora": trained, "lora_scale": {"scale": jnp.zeros(3)}})
  assert_array_equal(silent, hidden({"params": params}))


@pytest.mark.parametrize("targets", [("q",), ("v", "down")])
def test_only_the_targets_are_adapted(params, targets):
  config = LoraConfig(rank=2, targets=targets)
  adapters = random_like(init_lora(jax.random.key(0), params, config), seed=2)
  assert {path[-2] for path in flatten_dict(adapters)} == set(targets)
  before, after = (flatten_dict(tree) for tree in (params, merge(params, adapters, lora_scale(config, 3))))
  changed = {path[-2] for path in before if not np.array_equal(before[path], after[path])}
  assert changed == set(targets)
  adapted = hidden({"params": params, "lora": adapters, "lora_scale": lora_scale(config, 3)})
  assert_allclose(adapted, hidden({"params": merge(params, adapters, lora_scale(config, 3))}), atol=1e-4)


def test_an_unknown_target_is_named_with_the_nearest(params):
  with pytest.raises(UserError, match="`gates`, which this model has not; did you mean `gate`?"):
    init_lora(jax.random.key(0), params, LoraConfig(targets=("q", "gates")))


@pytest.mark.parametrize("targets", [("q",), LORA.targets])
def test_axes_have_the_structure_and_the_rank_of_the_factors(params, targets):
  config = LoraConfig(rank=2, targets=targets)
  factors = flatten_dict(init_lora(jax.random.key(0), params, config))
  axes = flatten_dict(lora_axes(abstract_variables(MODULE), config))
  assert axes.keys() == factors.keys()
  assert all(isinstance(axes[path], PartitionSpec) and len(axes[path]) == factors[path].ndim for path in axes)
  assert axes["layers", "attention", "q", "a"] == PartitionSpec("layers", "embed", None)
  assert axes["layers", "attention", "q", "b"] == PartitionSpec("layers", None, "heads")


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_the_low_rank_product_differentiates_as_a_product(shape):
  rng = np.random.default_rng(0)
  x, a, b, weight = (
    jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, (4, 2), (2, 6), (*shape[:-1], 6))
  )
  ours, theirs = (
    jax.jit(jax.value_and_grad(lambda x, a, b, f=f: (f(x, a, b) * weight).sum(), argnums=(0, 1, 2)))(x, a, b)
    for f in (low_rank, lambda x, a, b: (x @ a) @ b)
  )
  jax.tree.map(lambda u, v: assert_allclose(u, v, rtol=1e-5, atol=1e-5), ours, theirs)
  check_grads(low_rank, (x, a, b), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
