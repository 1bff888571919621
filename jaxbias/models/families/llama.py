"""Llama 1-3 and its likes: SmolLM, TinyLlama, Mistral, Qwen 2 and 3, OLMo 2, Phi 3."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbias.models.config import CAUSAL, ModelConfig
from jaxbias.models.families.layout import Rows, Stored, linear, norm
from jaxbias.models.keys import Keys

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Olmo2ForCausalLM",
                 "Phi3ForCausalLM")  # fmt: skip
PREFIX = "model."  # some checkpoints are saved without it
IGNORED = ("rotary_emb.inv_freq",)  # recomputed, and the same in every checkpoint that carries it


def model_config(keys: Keys, architecture: str) -> ModelConfig:
  layers, heads, width = keys.size("num_hidden_layers"), keys.size("num_attention_heads"), keys.size("hidden_size")
  head_dim = keys.size("head_dim", width // heads) if architecture != "Phi3ForCausalLM" else width // heads
  common = dict(
    family="llama",
    architecture=architecture,
    task=CAUSAL,
    vocab_size=keys.size("vocab_size"),
    hidden_size=width,
    mlp_size=keys.size("intermediate_size"),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=keys.size("num_key_value_heads", heads),
    head_dim=head_dim,
    max_positions=keys.size("max_position_embeddings", 2048),
    norm_eps=keys.number("rms_norm_eps", 1e-6),
    activation=keys.activation("hidden_act", "silu"),
    tied_head=keys.flag("tie_word_embeddings"),
    ropes=(keys.rope(head_dim),),
    **keys.special_ids(),
  )
  return ModelConfig(**common | QUIRKS[architecture](keys, layers))


def _llama(keys: Keys, layers: int) -> dict:
  keys.one_of("pretraining_tp", (1,), 1)
  bias = keys.flag("attention_bias")
  return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": keys.flag("mlp_bias")}


def _mistral(keys: Keys, layers: int) -> dict:
  window = keys.get("sliding_window")
  return keys.layer_kinds(layers, window, [window is not None] * layers)


def _qwen2(keys: Keys, layers: int) -> dict:
  """The last layers slide where `use_sliding_window` says so; biases on queries, keys and values only."""
  window, slides, first = keys.get("sliding_window"), keys.flag("use_sliding_window"), keys.get("max_window_layers", 28)
  window = window if slides else None
  pattern = [window is not None and i >= first for i in range(layers)]
  return {"qkv_bias": True} | keys.layer_kinds(layers, window, pattern)


def _qwen3(keys: Keys, layers: int) -> dict:
  bias = keys.flag("attention_bias")
  return _qwen2(keys, layers) | {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head"}


def _olmo2(keys: Keys, layers: int) -> dict:
  bias = keys.flag("attention_bias")
  return {"qkv_bias": bias, "output_bias": bias, "qk_norm": "whole", "norm_order": "output"}


QUIRKS = {
  "LlamaForCausalLM": _llama, "MistralForCausalLM": _mistral, "Qwen2ForCausalLM": _qwen2, "Qwen3ForCausalLM": _qwen3,
  "Olmo2ForCausalLM": _olmo2, "Phi3ForCausalLM": _mistral,
}  # fmt: skip


def layout(c: ModelConfig) -> Mapping[str, Stored]:
  theirs = "model.layers.{}."
  out = {"embedding": Stored("model.embed_tokens.weight")} | norm("final_norm", "model.norm")
  out |= {"head": Stored("lm_head.weight")}
  if c.norm_order == "output":
    out |= norm("layers/attention_norm", f"{theirs}post_attention_layernorm")
    out |= norm("layers/mlp_norm", f"{theirs}post_feedforward_layernorm")
  else:
    out |= norm("layers/attention_norm", f"{theirs}input_layernorm")
    out |= norm("layers/mlp_norm", f"{theirs}post_attention_layernorm")
  attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
  out |= linear("layers/attention/o", f"{attention}o_proj", c.output_bias)
  out |= linear("layers/mlp/down", f"{mlp}down_proj", c.mlp_bias)
  if c.qk_norm:
    out |= norm("layers/attention/q_norm", f"{attention}q_norm") | norm("layers/attention/k_norm", f"{attention}k_norm")
  if c.architecture == "Phi3ForCausalLM":  # fused projections
    sizes = tuple(heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
    for part, x in enumerate("qkv"):
      out |= linear(f"layers/attention/{x}", f"{attention}qkv_proj", rows=Rows(part, sizes))
    for part, x in enumerate(("gate", "up")):
      out |= linear(f"layers/mlp/{x}", f"{mlp}gate_up_proj", rows=Rows(part, (c.mlp_size, c.mlp_size)))
    return out
  for x in "qkv":
    out |= linear(f"layers/attention/{x}", f"{attention}{x}_proj", c.qkv_bias)
  for x in ("gate", "up"):
    out |= linear(f"layers/mlp/{x}", f"{mlp}{x}_proj", c.mlp_bias)
  return out
