"""What a run trains: adapters, chosen leaves of the base, parameters that belong to a loss; one tree of float32 leaves.

  {"layers": {...}}   the `lora` collection        {"base": {...}}   the leaves of `params` that config.train.base names
  {"losses": {key: {...}}}   for example a contrast head
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from jaxbias.errors import UserError, did_you_mean
from jaxbias.losses.registry import Objective
from jaxbias.models.config import ModelConfig
from jaxbias.models.lora import LoraConfig, LowRank, init_lora, lora_axes

STREAMS = {"adapters": 0, "dropout": 1, "losses": 2, "mixout": 3}  # what a run's key is folded with; kept for ever


def chosen_leaves(params: Mapping, patterns: Sequence[str]) -> dict[tuple[str, ...], jax.Array]:
  """{path: leaf} of the base that match a pattern such as `embedding`, `layers/mlp/*` or `*`.

  Raises UserError for a pattern that matches nothing, with the nearest path.
  """
  leaves = flatten_dict(dict(params))
  names = {"/".join(path): path for path in leaves}
  found = {}
  for pattern in patterns:
    matched = fnmatch.filter(names, pattern)
    if not matched:
      raise UserError(f"train.base has `{pattern}`, which matches no parameter; {did_you_mean(pattern, names)}")
    found |= {names[name]: leaves[names[name]] for name in matched}
  return found


def check(objective: Objective, params: Mapping, base: Sequence[str]) -> None:
  """Raises UserError for a loss whose gradient goes to the head's weights alone where these do not train."""
  head = {("head",), ("embedding",)} & set(chosen_leaves(params, base))
  for term in objective.terms:
    if dict(term.options).get("gradient") == "weights" and not head:
      raise UserError(f"losses.{term.key} has gradient = `weights`, and the head's weights do not train; give another "
                      "gradient, or train.base=('embedding',), or ('head',) for a model with a head of its own.")


def init(
  key: jax.Array, params: Mapping, lora: LoraConfig, base: Sequence[str], objective: Objective, config: ModelConfig
) -> dict:
  """Fresh adapters, float32 copies of the chosen base leaves, and the losses' own parameters."""
  tree = init_lora(jax.random.fold_in(key, STREAMS["adapters"]), params, lora) if lora.rank else {}
  if base:
    copies = {path: leaf.astype(jnp.float32) for path, leaf in chosen_leaves(params, base).items()}
    tree["base"] = unflatten_dict(copies)
  if own := objective.init_params(jax.random.fold_in(key, STREAMS["losses"]), config):
    tree["losses"] = own
  return tree


def axes(abstract: Mapping, logical: Mapping, boxed: Mapping, lora: LoraConfig, base: Sequence[str]) -> dict:
  """Logical axes of every leaf of `init`'s tree; a loss's own parameters are small, and whole on every device."""
  tree = lora_axes(boxed, lora) if lora.rank else {}
  if base:
    specs = flatten_dict(dict(logical))
    tree["base"] = unflatten_dict({path: specs[path] for path in flatten_dict(abstract["base"])})
  if "losses" in abstract:
    tree["losses"] = jax.tree.map(lambda _: PartitionSpec(), abstract["losses"])
  return tree


def collections(trainable: Mapping, frozen: Mapping) -> dict:
  """What the model is applied to. frozen: {"params", "lora_scale"}, and what else a step is given."""
  out = {name: frozen[name] for name in ("params", "lora_scale") if name in frozen}
  if "base" in trainable:
    out["params"] = unflatten_dict(flatten_dict(dict(frozen["params"])) | flatten_dict(dict(trainable["base"])))
  if "layers" in trainable:
    out["lora"] = {"layers": trainable["layers"]}
  return out


def displacement(trainable: Mapping, frozen: Mapping) -> dict[str, jax.Array | LowRank]:
  """theta - theta_0 of every weight of the model that a run changes, by its path in `params`: of a kernel with adapters
  scale * A B. frozen: as for `collections`. A loss's own parameters have no start to return to and are not in it."""
  start = flatten_dict(dict(frozen["params"]))
  base = flatten_dict(dict(trainable.get("base", {})))
  moved = {path: leaf - start[path].astype(leaf.dtype) for path, leaf in base.items()}
  factors = flatten_dict({"layers": trainable.get("layers", {})})
  for path in sorted({path[:-1] for path in factors}):
    a, b, kernel = factors[(*path, "a")], factors[(*path, "b")], (*path, "kernel")
    # layers that share weights (ALBERT) share the factors; one that is left alone has a scale of 0
    scale = frozen["lora_scale"]["scale"].reshape(len(a), -1).max(axis=1)
    update = LowRank(a, b, scale)
    moved[kernel] = moved[kernel] + update.dense() if kernel in moved else update
  return {"/".join(path): each for path, each in sorted(moved.items())}
