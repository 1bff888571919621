"""Where the terms of an objective pull: norms of their gradients, and cosines between them.

Gradients are those of the weighted terms, so that they add up to the gradient that a step follows (before clipping), on
the leaves of the model that train; a loss's own parameters, which no other term touches, are left out. A cosine below
0: what helps one term harms the other.

Axis letter: K terms of the objective, in its order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.distributed import on_host
from jaxbias.losses.registry import Objective
from jaxbias.models.transformer import Transformer
from jaxbias.train.step import loss
from jaxbias.train.transforms import of_chosen_layers
from jaxbias.types import Batch, TrainState

ROUNDING = 1e-5  # of a gradient's size: float32, and sums in another order


@functools.lru_cache(maxsize=16)
def program(module: Transformer, objective: Objective) -> Callable:
  """Jitted (state, frozen, batch, coefficients as the train step's) -> the terms' gradients, every leaf [K, ...].

  Weights are traced, and the objective is linear in them: each term is the objective with the other weights 0. One
  forward pass serves all, K backward passes follow it.
  """

  def alone(params, chosen_K: jax.Array, state: TrainState, frozen: Mapping, batch: Batch, coefficients: Mapping):
    weighted = {term.key: coefficients[term.key] | {"weight": coefficients[term.key]["weight"] * chosen_K[k]}
                for k, term in enumerate(objective.terms)}  # fmt: skip
    total, _ = loss(module, objective, state.replace(params=params), frozen, batch, weighted, {})
    return total

  @jax.jit
  def gradients(state: TrainState, frozen: Mapping, batch: Batch, coefficients: Mapping):
    one_hot_KK = jnp.eye(len(objective.terms))
    of = jax.vmap(jax.grad(alone), in_axes=(None, 0, None, None, None, None))
    found = of(state.params, one_hot_KK, state, frozen, batch, coefficients["losses"])
    found = {name: leaves for name, leaves in found.items() if name != "losses"}
    chosen = coefficients.get("remedy", {}).get("layers")  # of the others nothing trains
    return found if chosen is None else jax.vmap(of_chosen_layers, in_axes=(0, None))(found, chosen)

  return gradients


@jax.jit
def products(gradients: Mapping) -> jax.Array:
  """Inner products of the terms' gradients over all leaves, float32 [K, K]."""
  each = (jnp.reshape(leaf, (leaf.shape[0], -1)).astype(jnp.float32) for leaf in jax.tree.leaves(gradients))
  return sum(jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST) for flat in each)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, more):
  return jax.tree.map(jnp.add, total, more)


def measure(
  module: Transformer, objective: Objective, state: TrainState, frozen: Mapping, batches: Sequence[Batch],
  coefficients: Mapping,
) -> np.ndarray:  # fmt: skip
  """`products` of the terms' mean gradients over `batches`, float64 [K, K]."""
  of = program(module, objective)
  total = of(state, frozen, batches[0], coefficients)
  for batch in batches[1:]:
    total = _add(total, of(state, frozen, batch, coefficients))
  [product_KK] = on_host([products(total)])
  return product_KK.astype(np.float64) / len(batches) ** 2


def describe(keys: Sequence[str], product_KK: np.ndarray) -> dict[str, dict[str, float | None]]:
  """{"norm": {term, and `total`}, "cosine": {"one | other"}}; no cosine (None) where a gradient is 0, or so small
  beside the largest that it may be rounding alone, as a divergence's from the start model at the start."""
  norm_K = np.sqrt(np.maximum(np.diag(product_KK), 0.0))
  norms = dict(zip(keys, norm_K.tolist(), strict=True)) | {"total": float(np.sqrt(max(product_KK.sum(), 0.0)))}
  least, cosines = ROUNDING * norm_K.max(), {}
  for i, one in enumerate(keys):
    for j, other in enumerate(keys[i + 1 :], start=i + 1):
      known = min(norm_K[i], norm_K[j]) > least
      cosine = np.clip(product_KK[i, j] / (norm_K[i] * norm_K[j]), -1.0, 1.0) if known else None
      cosines[f"{one} | {other}"] = None if cosine is None else float(cosine)
  return {"norm": norms, "cosine": cosines}
