"""GPT-2: learned positions, layer norms, one fused projection stored [in, out]."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbias.models.config import CAUSAL, ModelConfig
from jaxbias.models.families.layout import Rows, Stored, linear, norm
from jaxbias.models.keys import Keys

ARCHITECTURES = ("GPT2LMHeadModel",)
PREFIX = "transformer."
IGNORED = (".attn.bias", ".attn.masked_bias")  # the causal mask


def model_config(keys: Keys, architecture: str) -> ModelConfig:
  width, heads = keys.size("n_embd"), keys.size("n_head")
  positions = keys.size("n_positions", 1024)
  scaled = keys.flag("scale_attn_weights", True)
  return ModelConfig(
    family="gpt2",
    architecture=architecture,
    task=CAUSAL,
    vocab_size=keys.size("vocab_size"),
    hidden_size=width,
    mlp_size=keys.size("n_inner", 4 * width),
    num_layers=keys.size("n_layer"),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    max_positions=positions,
    norm="layer",
    norm_eps=keys.number("layer_norm_epsilon", 1e-5),
    activation=keys.activation("activation_function", "gelu_new"),
    gated_mlp=False,
    tied_head=keys.flag("tie_word_embeddings", True),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    query_scale=0.0 if scaled else 1.0,
    inverse_layer_scale=keys.flag("scale_attn_by_inverse_layer_idx"),
    learned_positions=positions,
    **keys.special_ids(),
  )


def layout(c: ModelConfig) -> Mapping[str, Stored]:
  theirs, width = "transformer.h.{}.", c.hidden_size
  out = {"embedding": Stored("transformer.wte.weight"), "positions": Stored("transformer.wpe.weight")}
  out |= {"head": Stored("lm_head.weight")} | norm("final_norm", "transformer.ln_f", True)
  out |= norm("layers/attention_norm", f"{theirs}ln_1", True) | norm("layers/mlp_norm", f"{theirs}ln_2", True)
  for part, x in enumerate("qkv"):
    out |= linear(f"layers/attention/{x}", f"{theirs}attn.c_attn", True, Rows(part, (width,) * 3), transposed=False)
  out |= linear("layers/attention/o", f"{theirs}attn.c_proj", True, transposed=False)
  out |= linear("layers/mlp/up", f"{theirs}mlp.c_fc", True, transposed=False)
  return out | linear("layers/mlp/down", f"{theirs}mlp.c_proj", True, transposed=False)
