"""Norms, rotary positions, attention, MLP and the LoRA-aware projection, as small Linen modules.

Every parameter names its logical axes where it is made; initialisation, sharding, restore and import read
that one declaration. Axis letters as in `jaxbias.types`; S positions that are looked at (T of them, or a cache's),
H heads, G kv heads, C channels of a head, R channels that rotary positions turn.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxbias.models.attention import attend
from jaxbias.models.config import ModelConfig, Rope

SITES = ("residual_in", "attention_out", "mlp_out", "residual_out")  # activations of a block that have names
STACK_OUT = "stack_out"  # captured only: [B, T, D] behind the last block, without a layer axis

ACTIVATIONS = {
  "silu": nn.silu,
  "relu": nn.relu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@flax.struct.dataclass
class Edit:
  """A change of one named activation: x -> keep * x + value. keep 0 replaces or ablates, keep 1 adds (steering).

  Leaves broadcast against [L, B, T, D]; the layer axis must be present, because the scan over layers slices it.
  """

  keep: jax.Array
  value: jax.Array


@flax.struct.dataclass
class Cache:
  """Keys and values of every layer, [L, B, S, G, C], and what their slots hold, int32 [B, S] (segment 0 = nothing).

  New tokens are written from slot `length` on, the same for all rows.
  """

  k: jax.Array
  v: jax.Array
  segment: jax.Array
  position: jax.Array
  length: jax.Array  # int32 []


@flax.struct.dataclass
class Context:
  """What every layer reads besides its input, made once per forward: a mask for each kind of layer, rotary tables."""

  masks: tuple[jax.Array, ...]  # bool [B, 1, T, S], true where a query may look
  cos: tuple[jax.Array, ...]  # float32 [B, T, 1, R]
  sin: tuple[jax.Array, ...]  # float32 [B, T, 1, R]
  write_at: jax.Array | None = None  # int32 []: the cache slot of the first new token
  mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class PerLayer:
  """What a layer has of its own; the leading layer axis is cut by the scan."""

  kind: jax.Array  # int32 []: index into `config.kinds`
  number: jax.Array  # int32 []: 0 for the first layer
  lora_scale: jax.Array | None  # float32 []
  edits: dict[str, Edit]


def visible(
  query: tuple[jax.Array, ...], key: tuple[jax.Array, ...], causal: bool, window: int | None = None
) -> jax.Array:
  """bool [B, 1, T, S]: positions of the same segment, in the shared prefix or in the same branch, not later than the
  query in a causal model, and less than `window` away (in positions, which restart behind a shared prefix).

  query, key: (segment, position, branch), int32 [B, T] and [B, S] each. Padding sees padding, so that no softmax row
  is empty; nobody else sees it.
  """
  (seg_q, pos_q, branch_q), (seg_k, pos_k, branch_k) = query, key
  seen = seg_q[:, :, None] == seg_k[:, None, :]
  if branch_q is not None:
    seen &= (branch_k[:, None, :] == 0) | (branch_q[:, :, None] == branch_k[:, None, :])
  ahead = pos_k[:, None, :] - pos_q[:, :, None]
  if causal:
    seen &= ahead <= 0
  if window is not None:
    seen &= jnp.abs(ahead) < window
  return seen[:, None]


def rotary_tables(rope: Rope, position_BT: jax.Array, segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin [B, T, 1, R], the two halves of the turned channels together (Su et al. 2021, Hugging Face's order)."""
  angle = position_BT[..., None].astype(jnp.float32) * jnp.asarray(rope.inverse, jnp.float32)
  if rope.long_inverse is not None:
    same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    longest_BT = jnp.where(same_BTS, position_BT[:, None, :], 0).max(-1) + 1
    longer = position_BT[..., None].astype(jnp.float32) * jnp.asarray(rope.long_inverse, jnp.float32)
    angle = jnp.where(longest_BT[..., None] > rope.original_positions, longer, angle)
  angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
  return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def rotate(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary position embedding of queries or keys, in float32; channels past the table's stay as they are."""
  turned, rest = jnp.split(x_BTHC, [cos.shape[-1]], axis=-1)
  x = turned.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  turned = (x * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x_BTHC.dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def select(options: tuple[jax.Array, ...], index: jax.Array) -> jax.Array:
  """options[index] for a traced index; nothing is copied where there is no choice."""
  return options[0] if len(options) == 1 else jax.lax.select_n(index, *options)


class Norm(nn.Module):
  """RMS norm (Zhang and Sennrich 2019), Gemma's with 1 + scale, or layer norm (Ba et al. 2016); in float32."""

  kind: str
  eps: float
  axis: str | None = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    make = lambda name, init: self.param(name, nn.with_logical_partitioning(init, (self.axis,)), (x.shape[-1],))
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = make("scale", zeros if self.kind == "rms_offset" else ones).astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    if self.kind == "layer":
      x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
    normed *= 1 + scale if self.kind == "rms_offset" else scale
    if self.kind == "layer":
      normed += make("bias", zeros).astype(jnp.float32)
    return normed.astype(x.dtype)


@jax.custom_vjp
def low_rank(x: jax.Array, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
  """(x A) B. Its derivative contracts over tokens with the thin factor on the left, so that only arrays of R columns
  are ever transposed; the rule that JAX derives transposes x and the output's gradient, a quarter of a CPU step."""
  return (x @ a_IR) @ b_RO


def _low_rank_forward(x, a, b):
  thin = x @ a
  return thin @ b, (x, a, b, thin)


def _low_rank_backward(kept, dy):
  x, a, b, thin = kept
  dthin = dy @ b.T
  da = jnp.einsum("...r,...i->ri", dthin, x).T
  db = jnp.einsum("...r,...o->ro", thin, dy)
  return dthin @ a.T, da, db


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Projection(nn.Module):
  """x W (+ b), plus scale * drop(x) A B when the `lora` collection holds an adapter for it (Hu et al. 2021)."""

  features: int
  axes: tuple[str | None, str | None]
  bias: bool = False
  lora_dropout: float = 0.0  # applied where a `dropout` key is given: in training

  @nn.compact
  def __call__(self, x: jax.Array, lora_scale: jax.Array | None = None) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    y = x @ kernel.astype(x.dtype)
    if self.bias:
      bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]), (self.features,))
      y += bias.astype(x.dtype)
    if self.has_variable("lora", "a"):
      a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
      dropped = nn.Dropout(self.lora_dropout, deterministic=not self.has_rng("dropout"))(x)
      y += low_rank(dropped, a.astype(x.dtype), (b * lora_scale).astype(x.dtype))
    return y


class Attention(nn.Module):
  """Self-attention with grouped key-value heads. With a cache (keys and values of all layers, [L, B, S, G, C] each)
  the new ones are written into it and it is returned: what is not new is read, but never copied."""

  config: ModelConfig
  lora_dropout: float

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, context: Context, layer: PerLayer, cache: tuple[jax.Array, jax.Array] | None
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    c = self.config
    B, T, D = x_BTD.shape

    def project(name: str, heads: int, axis: str) -> jax.Array:
      dense = Projection(heads * c.head_dim, ("embed", axis), c.qkv_bias, self.lora_dropout, name=name)
      x = dense(x_BTD, layer.lora_scale)
      if c.qk_norm == "whole" and name != "v":
        x = Norm(c.norm, c.norm_eps, axis, name=f"{name}_norm")(x)
      x = x.reshape(B, T, heads, c.head_dim)
      if c.qk_norm == "head" and name != "v":
        x = Norm(c.norm, c.norm_eps, None, name=f"{name}_norm")(x)
      if c.ropes and name != "v":
        rope = jnp.asarray([kind.rope for kind in c.kinds])[layer.kind]
        x = rotate(x, select(context.cos, rope), select(context.sin, rope))
      return x

    q_BTHC = project("q", c.num_heads, "heads")
    k_BSGC, v_BSGC = project("k", c.num_kv_heads, "kv_heads"), project("v", c.num_kv_heads, "kv_heads")
    if c.inverse_layer_scale:
      q_BTHC = (q_BTHC / (layer.number + 1)).astype(q_BTHC.dtype)
    if cache is not None:
      at = (layer.number, 0, context.write_at, 0, 0)
      put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
      cache = put(cache[0], k_BSGC), put(cache[1], v_BSGC)
      k_BSGC, v_BSGC = (jax.lax.dynamic_index_in_dim(old, layer.number, keepdims=False) for old in cache)
    mask = select(context.masks, layer.kind)
    mixed = attend(q_BTHC, k_BSGC, v_BSGC, mask, c.score_scale, c.attention_softcap)
    out = Projection(D, ("heads", "embed"), c.output_bias, self.lora_dropout, name="o")
    return out(mixed.reshape(B, T, c.num_heads * c.head_dim), layer.lora_scale), cache


class MLP(nn.Module):
  """down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate."""

  config: ModelConfig
  lora_dropout: float

  @nn.compact
  def __call__(self, x_BTD: jax.Array, layer: PerLayer) -> jax.Array:
    c, f = self.config, ACTIVATIONS[self.config.activation]
    make = lambda name, size, axes: Projection(size, axes, c.mlp_bias, self.lora_dropout, name=name)
    up = make("up", c.mlp_size, ("embed", "mlp"))(x_BTD, layer.lora_scale)
    if c.gated_mlp:
      h = f(make("gate", c.mlp_size, ("embed", "mlp"))(x_BTD, layer.lora_scale)) * up
    else:
      h = f(up)
    return make("down", c.hidden_size, ("mlp", "embed"))(h, layer.lora_scale)
