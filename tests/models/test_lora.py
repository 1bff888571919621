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
from jaxbias.models.layers import Projection, low_rank
from jaxbias.models.lora import LoraConfig, init_lora, lora_axes, lora_scale, merge, stack, unmerge
from jaxbias.models.transformer import Transformer, abstract_variables
from tests.models import tiny_config

CONFIG = tiny_config()
MODULE = Transformer(CONFIG)
LORA = LoraConfig(rank=2, alpha=6.0)
SCALE = lora_scale(LORA, CONFIG.num_layers)
TOKENS = np.arange(14).reshape(2, 7)




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


# Layer ranges, dropout, stacks


@pytest.mark.parametrize("layers", [(), (0, 1), (1, 3), (2, 3)])
def test_a_range_of_layers_adapts_these_and_no_others(params, trained, layers):
  scale = lora_scale(LoraConfig(rank=2, alpha=6.0, layers=layers), 3)
  first, end = layers or (0, 3)
  assert scale["scale"].tolist() == [3.0 if first <= i < end else 0.0 for i in range(3)]
  inside = jax.tree.map(lambda leaf: jnp.where((jnp.arange(3) >= first)[:, None, None] &
                                               (jnp.arange(3) < end)[:, None, None], leaf, 0.0), trained)  # fmt: skip
  ranged = hidden({"params": params, "lora": trained, "lora_scale": scale})
  assert_allclose(ranged, hidden({"params": params, "lora": inside, "lora_scale": SCALE}), atol=1e-6)


@pytest.mark.parametrize("layers", [(2, 2), (-1, 2), (1, 4)])
def test_a_range_outside_the_model_is_refused(layers):
  with pytest.raises(UserError, match="lora.layers.*layers 0 to 2"):
    lora_scale(LoraConfig(layers=layers), 3)


def test_merging_and_unmerging_gives_the_base_back(params, trained):
  back = unmerge(merge(params, trained, SCALE), trained, SCALE)
  jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), back, params)


def test_a_stack_of_adapters_runs_as_each_alone(params, trained):
  others = [random_like(trained, seed) for seed in (7, 8)]
  position = jnp.broadcast_to(jnp.arange(7), (2, 7))

  @jax.jit
  def each(lora):
    variables = {"params": params, "lora": lora, "lora_scale": SCALE}
    return MODULE.apply(variables, TOKENS, jnp.ones((2, 7), int), position)[0]

  together = jax.vmap(each)(stack([trained, *others]))
  for found, lora in zip(together, [trained, *others], strict=True):
    assert_allclose(found, each(lora), atol=1e-5)


def test_dropout_acts_with_a_key_only_and_is_unbiased(params, trained):
  """One projection: the mean over keys of drop(x) A B is x A B, and the base is never touched."""
  module = Projection(5, ("embed", "mlp"), lora_dropout=0.5)
  rng = np.random.default_rng(0)
  x, w, a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 8), (8, 5), (8, 2), (2, 5)))
  variables = {"params": {"kernel": w}, "lora": {"a": a, "b": b}}
  plain = module.apply(variables, x, 1.0)
  assert_allclose(plain, x @ w + x @ a @ b, rtol=1e-4, atol=1e-5)
  draw = jax.jit(jax.vmap(lambda key: module.apply(variables, x, 1.0, rngs={"dropout": key})))
  drawn = draw(jax.random.split(jax.random.key(0), 20_000))
  assert np.abs(drawn[0] - plain).max() > 0.1
  spread = drawn.std(0) / np.sqrt(len(drawn))
  assert (np.abs(drawn.mean(0) - plain) < 5 * spread).all()


def test_layers_draw_their_own_dropout(params, trained):
  module = MODULE.clone(lora_dropout=0.5)
  variables = {"params": params, "lora": trained, "lora_scale": SCALE}
  position, ones = jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.ones((2, 7), int)
  run = jax.jit(lambda key: module.apply(variables, TOKENS, ones, position, rngs={"dropout": key})[0])
  first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
  assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
