"""ModelConfig: everything about a model's shape that the compiled program depends on. Frozen, hashable, static."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One transformer language model. Sizes in elements, `rope_theta` in the usual base of the wavelengths."""

  family: str
  vocab_size: int
  hidden_size: int
  mlp_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_eps: float
  rope_theta: float
  tied_head: bool
  attention_bias: bool = False
  mlp_bias: bool = False
  bos_id: int | None = None
  eos_id: int | None = None
  dtype: str = "float32"  # of the computation; norms, softmax and log-probabilities are float32 always

  def with_dtype(self, dtype: str) -> ModelConfig:
    return dataclasses.replace(self, dtype=dtype)

  @property
  def flops_per_token(self) -> int:
    """Multiply-adds of one token's forward pass times two, attention scores left out (they depend on length)."""
    attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    return 2 * (self.num_layers * (attention + 3 * self.hidden_size * self.mlp_size) + self.head_flops // 2)

  @property
  def head_flops(self) -> int:
    """The part of `flops_per_token` that the vocabulary costs, spent at scored positions only."""
    return 2 * self.hidden_size * self.vocab_size
