"""Llama 1-3 and its likes (SmolLM, TinyLlama): config keys and checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbias.errors import UserError
from jaxbias.models.config import ModelConfig

ARCHITECTURES = ("LlamaForCausalLM",)

# our leaf -> Hugging Face's tensor; {} is the layer. Kernels are stored [out, in] there and [in, out] here.
NAMES = {
  "embedding": "model.embed_tokens.weight",
  "head": "lm_head.weight",
  "final_norm/scale": "model.norm.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  **{f"layers/attention/{x}/kernel": f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"},
  **{f"layers/attention/{x}/bias": f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkvo"},
  **{f"layers/mlp/{x}/kernel": f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
  **{f"layers/mlp/{x}/bias": f"model.layers.{{}}.mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
IGNORED_TENSORS = ("rotary_emb.inv_freq",)  # recomputed, and the same in every checkpoint that carries it


def model_config(hf: Mapping) -> ModelConfig:
  """ModelConfig from a config.json, today's layout (`rope_parameters`) or the older one (`rope_theta`).

  Raises UserError for a size that is missing, and for a setting that would change the result and is not supported.
  """
  if missing := [key for key in REQUIRED if not isinstance(hf.get(key), int)]:
    raise UserError(f"config.json has no whole number for {', '.join(f'`{key}`' for key in missing)}.")
  rope = dict(hf.get("rope_parameters") or {})
  rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
  scaling = rope.get("rope_type") or (hf.get("rope_scaling") or {}).get("rope_type")
  scaling = scaling or (hf.get("rope_scaling") or {}).get("type", "default")
  if scaling != "default":
    raise UserError(f"config.json asks for rope scaling `{scaling}`, which is not supported; `default` is.")
  if hf.get("hidden_act", "silu") != "silu":
    raise UserError(f"config.json asks for hidden_act `{hf['hidden_act']}`, which is not supported; `silu` is.")
  if hf.get("pretraining_tp", 1) != 1:
    raise UserError("config.json asks for pretraining_tp other than 1, which is not supported.")
  heads = hf["num_attention_heads"]
  return ModelConfig(
    family="llama",
    vocab_size=hf["vocab_size"],
    hidden_size=hf["hidden_size"],
    mlp_size=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    max_positions=hf.get("max_position_embeddings", 2048),
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    rope_theta=float(rope["rope_theta"]),
    tied_head=bool(hf.get("tie_word_embeddings", False)),
    attention_bias=bool(hf.get("attention_bias", False)),
    mlp_bias=bool(hf.get("mlp_bias", False)),
    bos_id=hf.get("bos_token_id"),
    eos_id=hf["eos_token_id"][0] if isinstance(hf.get("eos_token_id"), list) else hf.get("eos_token_id"),
  )
