"""GPT-NeoX (Pythia): attention and MLP side by side, rotary positions on a part of each head, interleaved q, k, v."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbias.models.config import CAUSAL, ModelConfig
from jaxbias.models.families.layout import Rows, Stored, linear, norm
from jaxbias.models.keys import Keys

ARCHITECTURES = ("GPTNeoXForCausalLM",)
PREFIX = "gpt_neox."
IGNORED = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


def model_config(keys: Keys, architecture: str) -> ModelConfig:
  width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
  head_dim = width // heads
  bias = keys.flag("attention_bias", True)
  return ModelConfig(
    family="gpt_neox",
    architecture=architecture,
    task=CAUSAL,
    vocab_size=keys.size("vocab_size"),
    hidden_size=width,
    mlp_size=keys.size("intermediate_size"),
    num_layers=keys.size("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    max_positions=keys.size("max_position_embeddings", 2048),
    norm="layer",
    norm_eps=keys.number("layer_norm_eps", 1e-5),
    parallel_residual=keys.flag("use_parallel_residual", True),
    activation=keys.activation("hidden_act", "gelu"),
    gated_mlp=False,
    tied_head=keys.flag("tie_word_embeddings"),
    qkv_bias=bias,
    output_bias=bias,
    mlp_bias=True,
    ropes=(keys.rope(head_dim, theta_key="rotary_emb_base", partial_key="rotary_pct", partial=0.25),),
    **keys.special_ids(),
  )


def layout(c: ModelConfig) -> Mapping[str, Stored]:
  theirs, width = "gpt_neox.layers.{}.", c.hidden_size
  out = {"embedding": Stored("gpt_neox.embed_in.weight"), "head": Stored("embed_out.weight")}
  out |= norm("final_norm", "gpt_neox.final_layer_norm", True)
  out |= norm("layers/attention_norm", f"{theirs}input_layernorm", True)
  out |= norm("layers/mlp_norm", f"{theirs}post_attention_layernorm", True)
  for part, x in enumerate("qkv"):
    rows = Rows(part, (width,) * 3, groups=c.num_heads)
    out |= linear(f"layers/attention/{x}", f"{theirs}attention.query_key_value", c.qkv_bias, rows)
  out |= linear("layers/attention/o", f"{theirs}attention.dense", c.output_bias)
  out |= linear("layers/mlp/up", f"{theirs}mlp.dense_h_to_4h", True)
  return out | linear("layers/mlp/down", f"{theirs}mlp.dense_4h_to_h", True)
