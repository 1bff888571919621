"""OPT: learned positions from row 2 on, ReLU, and for the 350M model norms behind and narrow embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbias.models.config import CAUSAL, ModelConfig
from jaxbias.models.families.layout import Stored, linear, norm
from jaxbias.models.keys import Keys

ARCHITECTURES = ("OPTForCausalLM",)
PREFIX = "model."
IGNORED = ()
FIRST_ROW = 2  # of the position table


def model_config(keys: Keys, architecture: str) -> ModelConfig:
  width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
  positions = keys.size("max_position_embeddings", 2048)
  bias, before = keys.flag("enable_bias", True), keys.flag("do_layer_norm_before", True)
  unnormed = keys.flag("_remove_final_layer_norm")
  keys.one_of("layer_norm_elementwise_affine", (True,), True)
  narrow = keys.size("word_embed_proj_dim", width)
  return ModelConfig(
    family="opt",
    architecture=architecture,
    task=CAUSAL,
    vocab_size=keys.size("vocab_size"),
    hidden_size=width,
    mlp_size=keys.size("ffn_dim"),
    num_layers=keys.size("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    max_positions=positions,
    norm="layer",
    norm_order="pre" if before else "post",
    final_norm=before and not unnormed,
    norm_eps=1e-5,
    activation=keys.activation("activation_function", "relu"),
    gated_mlp=False,
    tied_head=keys.flag("tie_word_embeddings", True),
    qkv_bias=bias,
    output_bias=bias,
    mlp_bias=bias,
    learned_positions=positions + FIRST_ROW,
    position_offset=FIRST_ROW,
    embedding_size=narrow if narrow != width else 0,
    **keys.special_ids(),
  )


def layout(c: ModelConfig) -> Mapping[str, Stored]:
  theirs = "model.decoder.layers.{}."
  out = {"embedding": Stored("model.decoder.embed_tokens.weight"), "head": Stored("lm_head.weight")}
  out |= {"positions": Stored("model.decoder.embed_positions.weight")}
  out |= norm("final_norm", "model.decoder.final_layer_norm", True)
  out |= linear("embedding_projection", "model.decoder.project_in")
  out |= linear("head_projection", "model.decoder.project_out")
  out |= norm("layers/attention_norm", f"{theirs}self_attn_layer_norm", True)
  out |= norm("layers/mlp_norm", f"{theirs}final_layer_norm", True)
  for ours, name in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
    out |= linear(f"layers/attention/{ours}", f"{theirs}self_attn.{name}", c.qkv_bias)
  out |= linear("layers/mlp/up", f"{theirs}fc1", c.mlp_bias)
  return out | linear("layers/mlp/down", f"{theirs}fc2", c.mlp_bias)
