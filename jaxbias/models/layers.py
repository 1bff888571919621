"""Norms, rotary positions, attention, MLP and the LoRA-aware projection, as small Linen modules.

Every parameter names its logical axes where it is made; initialisation, sharding, restore and import read
that one declaration. Axis letters as in `jaxbias.types`; H heads, G kv heads, C channels of a head, F mlp.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxbias.models.config import ModelConfig

SITES = ("residual_in", "attention_out", "mlp_out", "residual_out")  # activations of a block that have names


@flax.struct.dataclass
class Edit:
  """A change of one named activation: x -> keep * x + value. keep 0 replaces or ablates, keep 1 adds (steering).

  Leaves broadcast against [L, B, T, D]; the layer axis must be present, because the scan over layers slices it.
  """

  keep: jax.Array
  value: jax.Array


@flax.struct.dataclass
class Context:
  """What every layer reads besides its input: the mask and the rotary tables, made once per forward."""

  mask: jax.Array  # bool [B, 1, T, T], true where a query may look
  cos: jax.Array  # float32 [B, T, 1, C]
  sin: jax.Array  # float32 [B, T, 1, C]


def attention_mask(segment_BT: jax.Array, branch_BT: jax.Array | None = None) -> jax.Array:
  """bool [B, 1, T, T]: earlier positions of the same segment, in the shared prefix or in the same branch.

  Padding sees padding, so that no softmax row is empty; nobody else sees it.
  """
  T = segment_BT.shape[1]
  seen = segment_BT[:, :, None] == segment_BT[:, None, :]
  if branch_BT is not None:
    seen &= (branch_BT[:, None, :] == 0) | (branch_BT[:, :, None] == branch_BT[:, None, :])
  return (seen & jnp.tri(T, dtype=bool))[:, None]


def rotary_tables(position_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """cos and sin [B, T, 1, C], the two halves of a head turning together (Su et al. 2021, Hugging Face's order)."""
  inverse = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = position_BT[..., None].astype(jnp.float32) * inverse
  angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHC: jax.Array, context: Context) -> jax.Array:
  """Rotary position embedding of queries or keys, in float32."""
  x = x_BTHC.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x * context.cos + turned * context.sin).astype(x_BTHC.dtype)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019)."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
    return (normed * scale).astype(x.dtype)


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
  """x W (+ b), plus scale * x A B when the `lora` collection holds an adapter for it (Hu et al. 2021)."""

  features: int
  axes: tuple[str, str]
  bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, lora_scale: jax.Array | None) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    y = x @ kernel.astype(x.dtype)
    if self.bias:
      y += self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]), (self.features,))
    if self.has_variable("lora", "a"):
      a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
      y += low_rank(x, a.astype(x.dtype), (b * lora_scale).astype(x.dtype))
    return y


class Attention(nn.Module):
  """Causal self-attention with grouped key-value heads."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, lora_scale: jax.Array | None) -> jax.Array:
    c = self.config
    B, T, D = x_BTD.shape
    project = lambda heads, name, axis: Projection(heads * c.head_dim, ("embed", axis), c.attention_bias, name=name)(
      x_BTD, lora_scale
    ).reshape(B, T, heads, c.head_dim)
    q_BTHC = rotate(project(c.num_heads, "q", "heads"), context)
    k_BTGC = rotate(project(c.num_kv_heads, "k", "kv_heads"), context)
    v_BTGC = project(c.num_kv_heads, "v", "kv_heads")
    mixed = jax.nn.dot_product_attention(q_BTHC, k_BTGC, v_BTGC, mask=context.mask, scale=c.head_dim**-0.5)
    out = Projection(D, ("heads", "embed"), c.attention_bias, name="o")
    return out(mixed.reshape(B, T, c.num_heads * c.head_dim), lora_scale)


class MLP(nn.Module):
  """Gated linear unit: down(silu(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, lora_scale: jax.Array | None) -> jax.Array:
    c = self.config
    gate = Projection(c.mlp_size, ("embed", "mlp"), c.mlp_bias, name="gate")(x_BTD, lora_scale)
    up = Projection(c.mlp_size, ("embed", "mlp"), c.mlp_bias, name="up")(x_BTD, lora_scale)
    return Projection(c.hidden_size, ("mlp", "embed"), c.mlp_bias, name="down")(nn.silu(gate) * up, lora_scale)
