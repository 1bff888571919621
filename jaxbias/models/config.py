"""ModelConfig: everything about a model's shape that the compiled program depends on. Frozen, hashable, static."""

from __future__ import annotations

import dataclasses
import math

CAUSAL, MASKED = "causal", "masked"


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions: one angle a position and pair of channels. `scale` multiplies cos and sin (YaRN, LongRoPE).

  Where `long_inverse` is given, a text of more than `original_positions` positions turns by it (LongRoPE).
  """

  inverse: tuple[float, ...]  # radians a position, one for each pair of the channels that turn
  scale: float = 1.0
  long_inverse: tuple[float, ...] | None = None
  original_positions: int = 0


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What layers differ in. `window`: positions that a query sees, itself included (None: all); `rope`: which table."""

  window: int | None = None
  rope: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One transformer language model, decoder or encoder. Sizes in elements.

  `norm_order` of a sublayer f: "pre" x + f(N(x)), "post" N(x + f(x)), "output" x + N(f(x)), "both" x + N(f(N(x))).
  `kinds[layer_kinds[i]]` describes layer i. Layers share weights in `num_groups` groups (ALBERT), one a layer else.
  """

  family: str
  architecture: str  # Hugging Face's class name
  task: str  # CAUSAL or MASKED
  vocab_size: int
  hidden_size: int
  mlp_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_eps: float
  tied_head: bool
  norm: str = "rms"  # rms, rms_offset (Gemma's 1 + scale), layer
  norm_order: str = "pre"
  final_norm: bool = True
  parallel_residual: bool = False
  activation: str = "silu"
  gated_mlp: bool = True
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: str | None = None  # "head": over each head's channels; "whole": over all heads' at once
  query_scale: float = 0.0  # multiplies attention scores; 0 stands for head_dim ** -0.5
  inverse_layer_scale: bool = False  # scores of layer i are divided by i + 1 as well
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  kinds: tuple[LayerKind, ...] = (LayerKind(),)
  layer_kinds: tuple[int, ...] = ()  # () stands for kind 0 throughout
  ropes: tuple[Rope, ...] = ()  # () without rotary positions
  learned_positions: int = 0  # rows of the position table, 0 without one
  position_offset: int = 0  # row of the first position
  token_types: int = 0
  embedding_size: int = 0  # of the token table and of the head, where it is not `hidden_size`
  embedding_scale: float = 1.0
  embedding_norm: bool = False
  projection_bias: bool = False  # between `embedding_size` and `hidden_size`
  num_groups: int = 0  # 0: every layer has its own weights
  head_bias: bool = False
  head_activation: str | None = None  # masked LMs: dense, activation, norm before the vocabulary
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None
  dtype: str = "float32"  # of the computation; norms, softmax and log-probabilities are float32 always

  def with_dtype(self, dtype: str) -> ModelConfig:
    return dataclasses.replace(self, dtype=dtype)

  @property
  def causal(self) -> bool:
    return self.task == CAUSAL

  @property
  def table_size(self) -> int:
    """Columns of the token table and of the head: what the vocabulary is multiplied with."""
    return self.embedding_size or self.hidden_size

  @property
  def groups(self) -> int:
    """Distinct layers: the leading axis of their stacked weights."""
    return self.num_groups or self.num_layers

  @property
  def kind_of_layer(self) -> tuple[int, ...]:
    return self.layer_kinds or (0,) * self.num_layers

  @property
  def score_scale(self) -> float:
    return self.query_scale or 1 / math.sqrt(self.head_dim)

  @property
  def flops_per_token(self) -> int:
    """Multiply-adds of one token's forward pass times two, attention scores left out (they depend on length)."""
    attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.mlp_size
    return 2 * self.num_layers * (attention + mlp) + self.head_flops

  @property
  def head_flops(self) -> int:
    """The part of `flops_per_token` that the vocabulary costs, spent at scored positions only."""
    return 2 * self.table_size * self.vocab_size
