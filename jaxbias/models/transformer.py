"""One scanned stack, decoder or encoder: tokens in, hidden states out.

The vocabulary is met in `losses/logprobs.py` only.

  hidden, captures = model.apply({"params": base, "lora": adapters, "lora_scale": scale}, batch.tokens, ...)

Without the `lora` collection the same call is the frozen base, so policy and reference are one function.
Layers run under `nn.scan`: one layer is compiled whatever the depth, and stacked parameters carry a leading
L axis. Edits travel in as per-layer inputs, captures come out as per-layer outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxbias.mesh import batch_shards, by_rows, gathered
from jaxbias.models.config import ModelConfig
from jaxbias.models.layers import (
  ACTIVATIONS,
  MLP,
  SITES,
  STACK_OUT,
  Attention,
  Cache,
  Context,
  Edit,
  Norm,
  PerLayer,
  Projection,
  rotary_tables,
  visible,
)  # fmt: skip

# What the backward pass keeps of a block: the matrix products. Norms, activations and attention weights are cheaper to
# compute again than to write and read, on a CPU as on an accelerator.
MATRIX_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@flax.struct.dataclass
class Head:
  """From the trunk's output to logits: softcap(hidden @ matrix.T + bias)."""

  matrix: jax.Array  # [V, D]
  bias: jax.Array | None = None  # [V]
  softcap: float | None = flax.struct.field(pytree_node=False, default=None)
  shards: int = flax.struct.field(pytree_node=False, default=1)  # into which the rows of a batch are cut


class Block(nn.Module):
  """Attention and MLP, each added to the residual stream; norms where `norm_order` has them."""

  config: ModelConfig
  capture: tuple[str, ...]
  lora_dropout: float = 0.0

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, tuple | None], layer: PerLayer, context: Context):
    (x_BTD, cache), c, captured = carry, self.config, {}

    def site(name: str, value: jax.Array) -> jax.Array:
      if name in layer.edits:
        value = (layer.edits[name].keep * value + layer.edits[name].value).astype(value.dtype)
      if name in self.capture:
        captured[name] = value
      return value

    norm = lambda name: Norm(c.norm, c.norm_eps, name=name)

    def entering(x: jax.Array, name: str) -> jax.Array:
      return norm(f"{name}_norm")(x) if c.norm_order in ("pre", "both") else x

    def leaving(x: jax.Array, name: str) -> jax.Array:
      if c.norm_order in ("output", "both"):
        x = norm(f"{name}_norm" if c.norm_order == "output" else f"{name}_post_norm")(x)
      return site(f"{name}_out", x)

    def joined(x: jax.Array, name: str) -> jax.Array:
      return norm(f"{name}_norm")(x) if c.norm_order == "post" else x

    x = site("residual_in", by_rows(x_BTD, context.mesh))
    attention, mlp = Attention(c, self.lora_dropout, name="attention"), MLP(c, self.lora_dropout, name="mlp")
    attended, cache = attention(entering(x, "attention"), context, layer, cache)
    attended = leaving(attended, "attention")
    if c.parallel_residual:
      x = x + attended + leaving(mlp(entering(x, "mlp"), layer), "mlp")
    else:
      x = joined(x + attended, "attention")
      x = joined(x + leaving(mlp(entering(x, "mlp"), layer), "mlp"), "mlp")
    return (site("residual_out", x), cache), captured


class SharedBlock(nn.Module):
  """One block's weights applied `length` times (ALBERT's groups of layers)."""

  config: ModelConfig
  capture: tuple[str, ...]
  lora_dropout: float
  length: int
  policy: object

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, tuple | None], layers: PerLayer, context: Context):
    stack = nn.scan(
      nn.remat(Block, prevent_cse=False, policy=self.policy),
      variable_broadcast=("params", "lora"),
      split_rngs={"params": False, "dropout": True},
      in_axes=(0, nn.broadcast),
      length=self.length,
    )(self.config, self.capture, self.lora_dropout, name="shared")
    return stack(carry, layers, context)


class Transformer(nn.Module):
  """A language model up to its head's input. With `remat` the backward pass keeps only each block's input: less
  memory, a third more arithmetic. `lora_dropout` acts where the call is given a `dropout` key. With a `mesh` the
  activations of a row stay on the devices that hold the row."""

  config: ModelConfig
  remat: bool = False
  lora_dropout: float = 0.0
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    position_BT: jax.Array,
    branch_BT: jax.Array | None = None,
    edits: Mapping[str, Edit] | None = None,
    capture: tuple[str, ...] = (),
    cache: Cache | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the head reads, [B, T, table_size], and captures {site: [L, B, T, D]}; with a cache also {"cache": ...}.

    Raises ValueError for a site that is not one of `layers.SITES` (nor, for a capture, `layers.STACK_OUT`).
    """
    c = self.config
    unknown = sorted((set(edits or {}) | set(capture) - {STACK_OUT}) - set(SITES))
    if unknown:
      raise ValueError(f"no activation is named {unknown[0]!r}; the sites of a block are {', '.join(SITES)}")
    # Float32 asked for is float32 computed: TPUs and recent GPUs would multiply in bfloat16 or TF32.
    with jax.default_matmul_precision("highest" if c.dtype == "float32" else "default"):
      x_BTD = self._embed(tokens_BT, position_BT)
      x_BTD, captures = self._layers(x_BTD, segment_BT, position_BT, branch_BT, dict(edits or {}), capture, cache)
      return by_rows(self._head_input(x_BTD), self.mesh), captures

  def _embed(self, tokens_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    normal = nn.initializers.normal(0.02)

    def table(name: str, rows: int, size: int, axis: str | None = None) -> jax.Array:
      return self.param(name, nn.with_logical_partitioning(normal, (axis, "embed")), (rows, size))

    embedding_VD = table("embedding", c.vocab_size, c.table_size, "vocab")
    if not c.tied_head:  # read by `head`, declared here so that it is initialised and sharded like the rest
      table("head", c.vocab_size, c.table_size, "vocab")
    if c.head_bias:
      self.param("head_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (c.vocab_size,))
    x = embedding_VD.astype(dtype)[tokens_BT] * jnp.asarray(c.embedding_scale, dtype)
    early = c.embedding_norm  # encoders add positions before their norm and projection, OPT after its projection
    size = c.table_size if early else c.hidden_size
    position = table("positions", c.learned_positions, size).astype(dtype)[position_BT + c.position_offset] if (
      c.learned_positions) else None  # fmt: skip
    if c.token_types:
      x += table("token_types", c.token_types, c.table_size).astype(dtype)[0]
    if early:
      x = x if position is None else x + position
      x = Norm(c.norm, c.norm_eps, name="embedding_norm")(x)
    if c.embedding_size:
      x = Projection(c.hidden_size, (None, "embed"), c.projection_bias, name="embedding_projection")(x)
    return x if early or position is None else x + position

  def _layers(self, x_BTD, segment_BT, position_BT, branch_BT, edits, capture, cache):
    c = self.config
    rows = (segment_BT, position_BT, branch_BT)
    keys, write_at = rows, None
    if cache is not None:
      write_at = cache.length
      put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, write_at, axis=1)
      segment_BS, position_BS = put(cache.segment, segment_BT), put(cache.position, position_BT)
      rows, keys = (segment_BT, position_BT, None), (segment_BS, position_BS, None)
    masks = tuple(visible(rows, keys, c.causal, kind.window) for kind in c.kinds)
    tables = [rotary_tables(rope, position_BT, segment_BT) for rope in c.ropes]
    context = Context(masks, tuple(cos for cos, _ in tables), tuple(sin for _, sin in tables), write_at, self.mesh)

    L, shared = c.num_layers, c.num_layers // c.groups
    scale_L = self.get_variable("lora_scale", "scale") if self.has_variable("lora_scale", "scale") else None
    kind_L, number_L = jnp.asarray(c.kind_of_layer, jnp.int32), jnp.arange(L)
    layers = PerLayer(kind_L, number_L, scale_L, edits)
    policy = None if self.remat else MATRIX_PRODUCTS
    if shared > 1:
      layers = jax.tree.map(lambda x: x.reshape(c.groups, shared, *x.shape[1:]), layers)
      block = SharedBlock
      settings = (c, tuple(capture), self.lora_dropout, shared, policy)
    else:
      block = nn.remat(Block, prevent_cse=False, policy=policy)
      settings = (c, tuple(capture), self.lora_dropout)
    stack = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast),
      length=c.groups,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(*settings, name="layers")
    (x_BTD, kv), captures = stack((x_BTD, None if cache is None else (cache.k, cache.v)), layers, context)
    if shared > 1:
      captures = jax.tree.map(lambda x: x.reshape(L, *x.shape[2:]), captures)
    if cache is not None:
      length = cache.length + segment_BT.shape[1]
      captures = {**captures, "cache": Cache(*kv, segment_BS, position_BS, length)}
    if STACK_OUT in capture:
      captures = {**captures, STACK_OUT: x_BTD}
    return x_BTD, captures

  def _head_input(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    if c.final_norm:
      x_BTD = Norm(c.norm, c.norm_eps, name="final_norm")(x_BTD)
    if c.head_activation:
      x_BTD = Projection(c.table_size, ("embed", None), True, name="head_projection")(x_BTD)
      x_BTD = Norm(c.norm, c.norm_eps, None, name="head_norm")(ACTIVATIONS[c.head_activation](x_BTD))
    elif c.embedding_size:
      x_BTD = Projection(c.table_size, ("embed", None), c.projection_bias, name="head_projection")(x_BTD)
    return x_BTD


def head(params: Mapping, config: ModelConfig, mesh: Mesh | None = None) -> Head:
  """What turns the trunk's output into logits. On a mesh its D is whole: it is gathered once, not for every chunk."""
  matrix = gathered(params["embedding"] if config.tied_head else params["head"], mesh)
  return Head(matrix, params.get("head_bias"), config.logit_softcap, batch_shards(mesh) if mesh else 1)


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
  """A cache of `slots` positions for each of `rows` texts; keys and values in the computation's dtype."""
  kv = jnp.zeros((config.num_layers, rows, slots, config.num_kv_heads, config.head_dim), config.dtype)
  ints = jnp.zeros((rows, slots), jnp.int32)
  return Cache(kv, kv, ints, ints, jnp.int32(0))


def abstract_variables(model: Transformer) -> dict:
  """Shapes and logical axes of every parameter, as boxed jax.ShapeDtypeStruct leaves; nothing is allocated."""
  one = jnp.zeros((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), one, one, one)["params"]
