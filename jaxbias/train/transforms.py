"""Remedies that change the step and not the objective: RecAdam, mixout, frozen layers. All of their numbers are traced.

A config's `remedy` section, or a variant's own, names them; `coefficients` makes of it what a step is given. A remedy
that is off is not in there, so that the compiled step is the one without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbias.errors import UserError
from jaxbias.losses.remedies import total_square
from jaxbias.models.config import ModelConfig
from jaxbias.models.lora import LowRank
from jaxbias.train.trainable import displacement


def coefficients(remedy: Mapping, steps: int, config: ModelConfig) -> dict:
  """{"remedy": {...}} of the remedies that are on, {} where none is. remedy: the merged section, as validated."""
  on = {}
  if gamma := remedy["recadam_gamma"]:
    midpoint = remedy["recadam_midpoint"] * steps
    on["recadam"] = {"gamma": gamma, "kappa": remedy["recadam_kappa"], "midpoint": midpoint}
  if remedy["mixout"]:
    on["mixout"] = remedy["mixout"]
  if remedy["layers"]:
    on["layers"] = layer_mask(tuple(remedy["layers"]), config)
  return {"remedy": on} if on else {}


def layer_mask(layers: tuple[int, int], config: ModelConfig) -> np.ndarray:
  """1 for each set of stacked weights that trains, 0 for the others, float32 [G].

  Raises UserError for a range that is empty, leaves the model, or divides layers that share weights.
  """
  (first, end), shared = layers, config.num_layers // config.groups
  if not 0 <= first < end <= config.num_layers:
    raise UserError(f"remedy.layers = {layers}; the model has layers 0 to {config.num_layers - 1}, and the second "
                    "number is the layer behind the last.")
  if first % shared or end % shared:
    raise UserError(f"remedy.layers = {layers} divides layers that share their weights; give multiples of {shared}.")
  group = np.arange(config.groups)
  return ((group >= first // shared) & (group < end // shared)).astype(np.float32)


def of_chosen_layers(tree: Mapping, mask_G: jax.Array) -> dict:
  """Gradients or updates with those of the other layers 0. What is not stacked by layer stays as it is."""

  def masked(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    stacked = path[0] == "layers" or path[:2] == ("base", "layers")
    return leaf * mask_G.reshape(-1, *[1] * (leaf.ndim - 1)) if stacked else leaf

  return unflatten_dict({path: masked(path, leaf) for path, leaf in flatten_dict(dict(tree)).items()})


def mixout(key: jax.Array, start: jax.Array, moved: jax.Array, p: jax.Array) -> jax.Array:
  """((1 - M) w + M w_0 - p w_0) / (1 - p), M ~ Bernoulli(p), w = w_0 + moved (Lee, Cho and Kang 2020, eq. 5).

  Written as w_0 + (1 - M) (w - w_0) / (1 - p): dropout of the displacement, w_0 itself where nothing moved.
  """
  back = jax.random.bernoulli(key, p, moved.shape)
  return start.astype(moved.dtype) + jnp.where(back, 0.0, moved / (1 - p))


def mixed(key: jax.Array, trainable: Mapping, frozen: Mapping, p: jax.Array) -> dict:
  """What the model is applied to in a training step under mixout: as `trainable.collections`, the displacement of each
  weight thinned out. Adapters are multiplied out for it: the mask is of the kernel's weights, as when these train."""
  params = flatten_dict(dict(frozen["params"]))
  for i, (name, moved) in enumerate(displacement(trainable, frozen).items()):
    path, moved = tuple(name.split("/")), moved.dense() if isinstance(moved, LowRank) else moved
    params[path] = mixout(jax.random.fold_in(key, i), params[path], moved, p)
  return {"params": unflatten_dict(params)}


def recall(step: jax.Array, params: Mapping, frozen: Mapping, recadam: Mapping) -> dict:
  """What `recalling` needs of one step, which counts from 1 as the published code does: k = sigma(kappa (t - t_0)), and
  the pull (1 - k) gamma d/d theta of 1/2 ||theta - theta_0||^2, for full weights gamma (1 - k) (theta - theta_0)."""
  k = jax.nn.sigmoid(recadam["kappa"] * (step + 1 - recadam["midpoint"]))
  slope = jax.grad(lambda leaves: 0.5 * total_square(displacement(leaves, frozen).values()))(params)
  return {"k": k, "pull": jax.tree.map(lambda x: (1 - k) * recadam["gamma"] * x, slope)}


def recalling(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """k(t) times what `inner` (Adam) makes of the gradient of the losses, plus the pull towards the start, which does not
  pass through its moments: RecAdam (Chen et al. 2020, algorithm 1). With no `recall=` it is `inner`.

  A loss's own parameters have no start: they move as `inner` says.
  """

  def update(updates, state, params=None, *, recall: Mapping | None = None, **_):
    updates, state = inner.update(updates, state, params)
    if recall is not None:
      annealed = jax.tree.map(lambda u, pull: recall["k"] * u + pull, updates, recall["pull"])
      updates = annealed | {name: updates[name] for name in ("losses",) if name in updates}
    return updates, state

  return optax.GradientTransformationExtraArgs(inner.init, update)
