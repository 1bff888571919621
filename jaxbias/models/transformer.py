"""One scanned decoder stack: tokens in, hidden states out. The vocabulary is met in `losses/logprobs.py` only.

  hidden, captures = model.apply({"params": base, "lora": adapters, "lora_scale": scale}, batch.tokens, ...)

Without the `lora` collection the same call is the frozen base, so policy and reference are one function.
Layers run under `nn.scan`: one layer is compiled whatever the depth, and stacked parameters carry a leading
L axis. Edits travel in as per-layer inputs, captures come out as per-layer outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbias.models.config import ModelConfig
from jaxbias.models.layers import MLP, SITES, Attention, Context, Edit, RMSNorm, attention_mask, rotary_tables

# What the backward pass keeps of a block: the matrix products. Norms, activations and attention weights are cheaper to
# compute again than to write and read, on a CPU as on an accelerator.
MATRIX_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


class Block(nn.Module):
  """Pre-norm attention and MLP, each added to the residual stream."""

  config: ModelConfig
  capture: tuple[str, ...]

  @nn.compact
  def __call__(self, x_BTD: jax.Array, per_layer: tuple, context: Context):
    lora_scale, edits = per_layer
    captured = {}

    def site(name: str, value: jax.Array) -> jax.Array:
      if name in edits:
        value = (edits[name].keep * value + edits[name].value).astype(value.dtype)
      if name in self.capture:
        captured[name] = value
      return value

    x = site("residual_in", x_BTD)
    normed = RMSNorm(self.config.norm_eps, name="attention_norm")(x)
    x += site("attention_out", Attention(self.config, name="attention")(normed, context, lora_scale))
    normed = RMSNorm(self.config.norm_eps, name="mlp_norm")(x)
    x += site("mlp_out", MLP(self.config, name="mlp")(normed, lora_scale))
    return site("residual_out", x), captured


class Transformer(nn.Module):
  """A decoder-only language model up to its head's input. With `remat` the backward pass keeps only each block's
  input: less memory, a third more arithmetic."""

  config: ModelConfig
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    position_BT: jax.Array,
    branch_BT: jax.Array | None = None,
    edits: Mapping[str, Edit] | None = None,
    capture: tuple[str, ...] = (),
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Hidden states after the final norm [B, T, D], and captures {site: [L, B, T, D]}.

    Raises ValueError for a site that is not one of `layers.SITES`.
    """
    c = self.config
    edits = dict(edits or {})
    unknown = sorted((set(edits) | set(capture)) - set(SITES))
    if unknown:
      raise ValueError(f"no activation is named {unknown[0]!r}; the sites of a block are {', '.join(SITES)}")
    dtype = jnp.dtype(c.dtype)

    embed_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    embedding_VD = self.param("embedding", embed_init, (c.vocab_size, c.hidden_size))
    if not c.tied_head:  # read by `head_matrix`, declared here so that it is initialised and sharded like the rest
      self.param("head", embed_init, (c.vocab_size, c.hidden_size))
    x_BTD = embedding_VD.astype(dtype)[tokens_BT]

    lora_scale_L = self.get_variable("lora_scale", "scale") if self.has_variable("lora_scale", "scale") else None
    context = Context(attention_mask(segment_BT, branch_BT), *rotary_tables(position_BT, c.head_dim, c.rope_theta))
    block = nn.remat(Block, prevent_cse=False, policy=None if self.remat else MATRIX_PRODUCTS)
    stack = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, tuple(capture), name="layers")
    x_BTD, captures = stack(x_BTD, (lora_scale_L, edits), context)
    return RMSNorm(c.norm_eps, name="final_norm")(x_BTD), captures


def head_matrix(params: Mapping, config: ModelConfig) -> jax.Array:
  """The output embedding [V, D]: logits are hidden @ head.T."""
  return params["embedding"] if config.tied_head else params["head"]


def abstract_variables(model: Transformer) -> dict:
  """Shapes and logical axes of every parameter, as boxed jax.ShapeDtypeStruct leaves; nothing is allocated."""
  one = jnp.zeros((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), one, one, one)["params"]
