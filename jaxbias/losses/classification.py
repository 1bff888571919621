"""A linear head that classifies texts: the loss with which a model is fine-tuned on a downstream task.

Axis letters as in `types`, and C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxbias.losses.context import LossContext
from jaxbias.losses.logprobs import gather_positions
from jaxbias.losses.registry import LOSSES, Found, Objective, Term, register_loss
from jaxbias.models.config import ModelConfig
from jaxbias.types import Metric

ON = "general"  # the role that classified texts play in a batch
KEY = "classify"  # of the head among a run's parameters, and of the loss among its parts
SCALE = 0.02  # of the head's weights at the start, as Hugging Face draws them


def init_head(key: jax.Array, config: ModelConfig, classes: int) -> dict[str, jax.Array]:
  """{"w": [D, C], "b": [C]}, float32; D is what the head reads: see `pooled`."""
  D = config.table_size if config.causal else config.hidden_size
  return {"w": SCALE * jax.random.normal(key, (D, classes)), "b": jnp.zeros(classes)}


def pooled(state_BTD: jax.Array, segment_BT: jax.Array, slots: int, last: bool) -> jax.Array:
  """The state at the first or the last token of each text of a packed row, [B, S, D]. That of an empty slot means
  nothing."""
  member_BST = segment_BT[:, None] == jnp.arange(1, slots + 1)[:, None]
  first_BS = member_BST.argmax(-1)
  at_BS = jnp.maximum(first_BS + member_BST.sum(-1) - 1, 0) if last else first_BS
  return gather_positions(state_BTD, at_BS)


def class_logits(head: Mapping, pooled_XD: jax.Array) -> jax.Array:
  """x W + b, [..., C] in float32."""
  x_XD = pooled_XD.astype(jnp.float32)
  return jnp.einsum("...d,dc->...c", x_XD, head["w"], precision=jax.lax.Precision.HIGHEST) + head["b"]


def classify(ctx: LossContext, on: str, params: Mapping) -> Found:
  """Cross-entropy of the right class, nats, mean over texts: -log softmax(x W + b)[label].

  x is the state at the last token of a causal model, as its vocabulary's head reads it (Radford et al. 2018), and at
  the first token, [CLS], of a masked one (Devlin et al. 2019), without BERT's pooling layer. Note: accuracy, 0 to 1.
  """
  state_BTD = ctx.hidden_BTD if ctx.causal else ctx.captures["stack_out"]
  label_BS = ctx.batch.label
  logits_BSC = class_logits(params, pooled(state_BTD, ctx.batch.segment, label_BS.shape[1], last=ctx.causal))
  logprob_BSC = jax.nn.log_softmax(logits_BSC)
  right_BS = jnp.take_along_axis(logprob_BSC, jnp.maximum(label_BS, 0)[..., None], axis=-1)[..., 0]
  labelled_BS = ctx.rows(on) & (label_BS >= 0)
  hit_BS = (logits_BSC.argmax(-1) == label_BS).astype(jnp.float32)
  return Found(Metric.over(-right_BS, labelled_BS), notes={"accuracy": Metric.over(hit_BS, labelled_BS)})


def objective(classes: int) -> Objective:
  """`classify` alone, with a head of so many classes. It is no loss of a config's: their texts have no labels."""
  name = f"{KEY}_{classes}"
  if name not in LOSSES:
    init = functools.partial(init_head, classes=classes)
    register_loss(name, on=ON, needs=("hidden", "stack_out", "no_targets"), init_params=init)(classify)
  return Objective((Term(KEY, name, ON),))
