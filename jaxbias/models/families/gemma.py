"""Gemma 2 and 3 (text): norms around every sublayer, windows on most layers, capped scores (2), QK norms (3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxbias.models.config import CAUSAL, ModelConfig
from jaxbias.models.families.layout import Stored, linear, norm
from jaxbias.models.keys import Keys

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
PREFIX = "model."
IGNORED = ("rotary_emb.inv_freq",)


def model_config(keys: Keys, architecture: str) -> ModelConfig:
  third = architecture == "Gemma3ForCausalLM"
  layers, width = keys.size("num_hidden_layers"), keys.size("hidden_size")
  head_dim, bias = keys.size("head_dim", 256), keys.flag("attention_bias")
  keys.one_of("use_bidirectional_attention", (False,), False)
  keys.get("hidden_act")  # of the first releases; `hidden_activation` is what counts
  if third:
    cycle = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
    ropes = (keys.rope(head_dim, "full_attention", theta=1e6),
             keys.rope(head_dim, "sliding_attention", "rope_local_base_freq", 1e4, scaled=False))  # fmt: skip
    keys.get("attn_logit_softcapping")  # Hugging Face's Gemma 3 carries the key and computes without it
    quirks = {"qk_norm": "head", "ropes": ropes}
  else:
    cycle = 2
    quirks = {"ropes": (keys.rope(head_dim),), "attention_softcap": _cap(keys, "attn_logit_softcapping", 50.0)}
  slides = [(i + 1) % cycle > 0 for i in range(layers)]
  window = keys.size("sliding_window", 4096)
  return ModelConfig(
    family="gemma",
    architecture=architecture,
    task=CAUSAL,
    vocab_size=keys.size("vocab_size"),
    hidden_size=width,
    mlp_size=keys.size("intermediate_size"),
    num_layers=layers,
    num_heads=keys.size("num_attention_heads"),
    num_kv_heads=keys.size("num_key_value_heads"),
    head_dim=head_dim,
    max_positions=keys.size("max_position_embeddings", 131_072 if third else 8192),
    norm="rms_offset",
    norm_order="both",
    norm_eps=keys.number("rms_norm_eps", 1e-6),
    activation=keys.activation("hidden_activation", "gelu_pytorch_tanh"),
    tied_head=keys.flag("tie_word_embeddings", True),
    qkv_bias=bias,
    output_bias=bias,
    query_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
    logit_softcap=_cap(keys, "final_logit_softcapping", None if third else 30.0),
    embedding_scale=math.sqrt(width),
    **keys.layer_kinds(layers, window, slides, (0, 1) if third else (0, 0)),
    **keys.special_ids(),
    **quirks,
  )


def _cap(keys: Keys, key: str, default: float | None) -> float | None:
  """null is no cap; the default counts where the key is absent."""
  value = keys.get(key, None if key in keys.hf else default)
  return None if value is None else keys.number(key, value)


def layout(c: ModelConfig) -> Mapping[str, Stored]:
  theirs = "model.layers.{}."
  out = {"embedding": Stored("model.embed_tokens.weight")} | norm("final_norm", "model.norm")
  out |= {"head": Stored("lm_head.weight")}
  out |= norm("layers/attention_norm", f"{theirs}input_layernorm")
  out |= norm("layers/attention_post_norm", f"{theirs}post_attention_layernorm")
  out |= norm("layers/mlp_norm", f"{theirs}pre_feedforward_layernorm")
  out |= norm("layers/mlp_post_norm", f"{theirs}post_feedforward_layernorm")
  for x in "qkvo":
    bias = c.output_bias if x == "o" else c.qkv_bias
    out |= linear(f"layers/attention/{x}", f"{theirs}self_attn.{x}_proj", bias)
  if c.qk_norm:
    for x in "qk":
      out |= norm(f"layers/attention/{x}_norm", f"{theirs}self_attn.{x}_norm")
  for x in ("gate", "up", "down"):
    out |= linear(f"layers/mlp/{x}", f"{theirs}mlp.{x}_proj")
  return out
