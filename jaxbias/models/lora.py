"""Low-rank adapters (Hu et al. 2021): where they go, how they start, how they merge.

An adapter is two collections beside `params`: `lora`, the trained factors a [L, in, r] and b [L, r, out] of each
adapted projection, and `lora_scale`, one factor per layer (alpha / r, or 0 for a layer that is left alone).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbias.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """`targets` are projection names (q, k, v, o, gate, up, down); the update is scaled by alpha / rank.

  `layers`: the first adapted layer and the one behind the last; () for all. Every layer has factors whatever the range
  and the range is traced, so that early, late and all layers share one compiled step.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
  layers: tuple[int, ...] = ()
  dropout: float = 0.0  # of the input of A, in training


def target_kernels(params: Mapping, config: LoraConfig) -> dict[tuple[str, ...], jax.Array]:
  """{path of the projection: its kernel [L, in, out]} for every adapted projection."""
  leaves = flatten_dict(dict(params)).items()
  kernels = {path[:-1]: leaf for path, leaf in leaves if path[0] == "layers" and path[-1] == "kernel"}
  names = {path[-1] for path in kernels}
  for target in config.targets:
    if target not in names:
      raise UserError(f"lora.targets has `{target}`, which this model has not; {did_you_mean(target, names)}")
  return {path: leaf for path, leaf in kernels.items() if path[-1] in config.targets}


def init_lora(key: jax.Array, params: Mapping, config: LoraConfig) -> dict:
  """a ~ U(-1/sqrt(in), 1/sqrt(in)) as peft draws it, b = 0: the adapted model starts as the base, exactly."""
  factors = {}
  for i, (path, kernel) in enumerate(sorted(target_kernels(params, config).items())):
    layers, fan_in, fan_out = kernel.shape
    bound = fan_in**-0.5
    a = jax.random.uniform(jax.random.fold_in(key, i), (layers, fan_in, config.rank), minval=-bound, maxval=bound)
    factors[(*path, "a")] = a
    factors[(*path, "b")] = jnp.zeros((layers, config.rank, fan_out))
  return unflatten_dict(factors)


def lora_axes(boxed_params: Mapping, config: LoraConfig) -> dict:
  """Logical axes of every factor: a keeps the kernel's input axis, b its output axis, the rank is whole."""
  specs = flatten_dict(nn.get_partition_spec(boxed_params))
  out = {}
  for path in target_kernels(nn.unbox(boxed_params), config):
    layers, fan_in, fan_out = specs[(*path, "kernel")]
    out[(*path, "a")] = jax.sharding.PartitionSpec(layers, fan_in, None)
    out[(*path, "b")] = jax.sharding.PartitionSpec(layers, None, fan_out)
  return unflatten_dict(out)


def lora_scale(config: LoraConfig, num_layers: int) -> dict:
  """The `lora_scale` collection: alpha / rank for every layer in the range, 0 for the others.

  Raises UserError for a range that is empty or leaves the model.
  """
  first, end = config.layers or (0, num_layers)
  if not 0 <= first < end <= num_layers:
    raise UserError(f"lora.layers = {config.layers}; the model has layers 0 to {num_layers - 1}, and the second number "
                    "is the layer behind the last.")
  layer = jnp.arange(num_layers)
  scale = config.alpha / max(config.rank, 1)
  return {"scale": jnp.where((layer >= first) & (layer < end), scale, 0.0).astype(jnp.float32)}


def group_scales(scale_L: np.ndarray, groups: int) -> np.ndarray:
  """One factor for each set of weights, [G]. Raises UserError where layers that share weights (ALBERT) differ in it."""
  by_group = np.asarray(scale_L, np.float32).reshape(groups, -1)
  if (by_group != by_group[:, :1]).any():
    raise UserError("layers that share their weights have different lora_scale; one set of weights cannot hold that.")
  return by_group[:, 0]


class LowRank(NamedTuple):
  """scale * A B of stacked layers, not multiplied yet: a [L, in, r], b [L, r, out], scale [L]."""

  a: jax.Array
  b: jax.Array
  scale: jax.Array

  def dense(self) -> jax.Array:
    """[L, in, out], float32."""
    return jnp.einsum("lir,lro,l->lio", *self, precision="highest")


def add_product(kernel: jax.Array, a: jax.Array, b: jax.Array, scale_L: jax.Array) -> jax.Array:
  """W + scale * A B of stacked layers, [L, in, out], in float32."""
  return kernel + LowRank(a, b, scale_L).dense()


def merge(params: Mapping, lora: Mapping, scale: Mapping) -> dict:
  """The base with every kernel replaced by W + scale * A B, in float32. `scale` is concrete, even under jit."""
  flat, factors = flatten_dict(dict(params)), flatten_dict(dict(lora))
  for path in {path[:-1] for path in factors}:
    a, b = factors[(*path, "a")], factors[(*path, "b")]
    flat[(*path, "kernel")] = add_product(flat[(*path, "kernel")], a, b, group_scales(scale["scale"], len(a)))
  return unflatten_dict(flat)


def unmerge(params: Mapping, lora: Mapping, scale: Mapping) -> dict:
  """The base again, from what `merge` made of it: equal up to the rounding of one sum and one difference."""
  return merge(params, lora, {"scale": -jnp.asarray(scale["scale"])})


def scaled(adapters: Mapping, factor: float, start: Mapping | None = None) -> dict:
  """The collections of the model theta_0 + factor * (theta - theta_0): -1 negates a task vector (Ilharco et al. 2023),
  a factor between 0 and 1 interpolates, 0 is the start model and 1 the trained one, both to the last bit.

  start: `params` of the start model, needed where `adapters` hold "params" of their own (train.base)."""
  out = dict(adapters)
  if factor == 1:
    return out
  if "lora_scale" in out:
    out["lora_scale"] = jax.tree.map(lambda scale: factor * scale, out["lora_scale"])
  if "params" in out:
    out["params"] = jax.tree.map(lambda new, old: along(old, new, factor), out["params"], dict(start))
  return out


def along(start: jax.Array, trained: jax.Array, factor: float) -> jax.Array:
  """start + factor * (trained - start) in the dtype of `trained`; a leaf that did not train is handed back."""
  if trained is start:
    return trained
  start = start.astype(trained.dtype)
  return start + factor * (trained - start)


def stack(adapters: Sequence[Mapping]) -> dict:
  """Several adapters of one shape as one tree with a leading axis, for `jax.vmap` over them on one frozen base:

  `jax.vmap(lambda lora: module.apply({"params": base, "lora": lora, "lora_scale": scale}, ...))(stack(adapters))`
  """
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
