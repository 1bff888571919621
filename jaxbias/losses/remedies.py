"""What holds a model near its start while it learns something else: penalties on weights, distillation.

theta are the model's own weights, whatever trains: with adapters the displacement of a kernel is the effective one,
scale * A B, so that one coefficient means the same for adapters and for weights that train themselves (train.base).
lambda is the loss's `weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxbias.losses.context import LossContext
from jaxbias.losses.logprobs import tempered_kl
from jaxbias.losses.registry import NO_ROLE, register_loss
from jaxbias.models.lora import LowRank
from jaxbias.types import Metric


@register_loss("l2sp", on=NO_ROLE, needs=("moved", "no_targets"))
def l2sp(ctx: LossContext, on: str) -> Metric:
  """1/2 ||theta - theta_0||^2, summed over weights (Li, Grandvalet and Davoine 2018, eq. 2, for the shared weights)."""
  return _once(0.5 * total_square(ctx.moved.values()))


@register_loss("ewc", on=NO_ROLE, needs=("moved", "fisher", "no_targets"))
def ewc(ctx: LossContext, on: str) -> Metric:
  """1/2 sum_i F_i (theta_i - theta_0,i)^2, F of mean 1 (Kirkpatrick et al. 2017, eq. 3; train/fisher.py makes F)."""
  return _once(0.5 * sum(_weighted_square(moved, ctx.fisher[path]) for path, moved in ctx.moved.items()))


@register_loss("distill", on="general", needs=("ref_hidden",), coefficients={"temperature": 2.0})
def distill(ctx: LossContext, on: str, temperature: jax.Array | float) -> Metric:
  """T^2 KL(reference^T || policy^T) over the vocabulary, mean over tokens, nats; p^T is softmax(logits / T).

  Hinton et al. 2015, section 2, and learning without forgetting (Li and Hoiem 2016). T^2 keeps the gradient's size
  the same whatever T, where logits differ little. With T = 1 it is `kl`.
  """
  each_BK = tempered_kl(ctx.kl_hidden_BKD, ctx.head, ctx.batch.ref_hidden, ctx.ref_head, temperature)
  return Metric.over(each_BK, ctx.within(on, ctx.batch.kl_segment))


def total_square(moved: Iterable[jax.Array | LowRank]) -> jax.Array:
  """Sum of squares of every displacement. Of scale * A B it is scale^2 <A'A, BB'>: two r x r products a layer, and
  nothing of the kernel's size."""
  return sum(map(_square, moved))


def _square(moved: jax.Array | LowRank) -> jax.Array:
  if not isinstance(moved, LowRank):
    return (moved**2).sum()
  inner = jnp.einsum("lir,lis->lrs", moved.a, moved.a, precision="highest")
  outer = jnp.einsum("lro,lso->lrs", moved.b, moved.b, precision="highest")
  return (moved.scale**2 * (inner * outer).sum((1, 2))).sum()


def _weighted_square(moved: jax.Array | LowRank, weight: jax.Array) -> jax.Array:
  """sum_i w_i d_i^2. Adapters are multiplied out one layer at a time, in the backward pass once more."""
  if not isinstance(moved, LowRank):
    return (weight * moved**2).sum()
  one_layer = lambda layer: (layer[0] * LowRank(*(x[None] for x in layer[1])).dense()[0] ** 2).sum()
  return jax.lax.map(jax.checkpoint(one_layer), (weight, moved)).sum()


def _once(value: jax.Array) -> Metric:
  """A sum that is the same on whatever rows a step reads."""
  return Metric(value, jnp.float32(1.0))
