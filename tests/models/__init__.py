"""A small Llama-shaped ModelConfig, for tests that need a model and not a checkpoint."""

from __future__ import annotations

from jaxbias.models.config import ModelConfig
from jaxbias.models.keys import rope_table


def tiny_config(**changes) -> ModelConfig:
  sizes = {"vocab_size": 23, "hidden_size": 16, "mlp_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
           "head_dim": 4, "max_positions": 32, "norm_eps": 1e-5, "tied_head": True} | changes  # fmt: skip
  ropes = (rope_table("default", {"rope_theta": 1e4}, sizes["head_dim"], sizes["max_positions"]),)
  kind = {"family": "llama", "architecture": "LlamaForCausalLM", "task": "causal"}
  return ModelConfig(**kind | {"ropes": ropes} | sizes)
