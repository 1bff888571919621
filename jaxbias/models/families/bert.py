"""Masked language models: BERT, RoBERTa, DistilBERT, ALBERT and ELECTRA's generator, each with its MLM head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxbias.errors import UserError
from jaxbias.models.config import MASKED, ModelConfig
from jaxbias.models.families.layout import Stored, linear, norm
from jaxbias.models.keys import Keys

ARCHITECTURES = ("BertForMaskedLM", "BertForPreTraining", "RobertaForMaskedLM", "DistilBertForMaskedLM",
                 "AlbertForMaskedLM", "AlbertForPreTraining", "ElectraForMaskedLM")  # fmt: skip
PREFIX = ("bert.", "roberta.", "distilbert.", "albert.", "electra.")
IGNORED = (
  ".position_ids", ".token_type_ids", ".pooler.dense.weight", ".pooler.dense.bias", ".pooler.weight", ".pooler.bias",
  "cls.seq_relationship.weight", "cls.seq_relationship.bias", "sop_classifier.classifier.weight",
  "sop_classifier.classifier.bias", "predictions.decoder.bias", "lm_head.decoder.bias",
  "predictions.bias", "lm_head.bias",
)  # fmt: skip


def model_config(keys: Keys, architecture: str) -> ModelConfig:
  if architecture == "DistilBertForMaskedLM":
    return _distilbert(keys, architecture)
  kind = architecture.removesuffix("ForMaskedLM").removesuffix("ForPreTraining")
  heads, width = keys.size("num_attention_heads"), keys.size("hidden_size")
  positions, eps = keys.size("max_position_embeddings", 512), keys.number("layer_norm_eps", 1e-12)
  config = ModelConfig(
    family="bert",
    architecture=architecture,
    task=MASKED,
    vocab_size=keys.size("vocab_size"),
    hidden_size=width,
    mlp_size=keys.size("intermediate_size"),
    num_layers=keys.size("num_hidden_layers"),
    activation=keys.activation("hidden_act", "gelu_new" if kind == "Albert" else "gelu"),
    token_types=keys.size("type_vocab_size", 2),
    **_encoder(keys, heads, width, positions, eps),
  )
  if kind == "Bert":
    return dataclasses.replace(config, head_activation=config.activation)
  if kind == "Roberta":  # the first position is the row behind padding's
    first = keys.get("pad_token_id", 1) + 1
    return dataclasses.replace(config, position_offset=first, max_positions=positions - first)
  narrow = keys.size("embedding_size", 128)
  if kind == "Electra":
    narrow = narrow if narrow != width else 0
    return dataclasses.replace(config, embedding_size=narrow, projection_bias=True)
  keys.one_of("inner_group_num", (1,), 1)
  groups = keys.size("num_hidden_groups", 1)
  if config.num_layers % groups:
    raise UserError(f"config.json: {config.num_layers} layers do not divide into num_hidden_groups = {groups}.")
  return dataclasses.replace(config, embedding_size=narrow, projection_bias=True, num_groups=groups,
                             head_activation=config.activation)  # fmt: skip


def _distilbert(keys: Keys, architecture: str) -> ModelConfig:
  width = keys.size("dim")
  activation = keys.activation("activation", "gelu")
  return dataclasses.replace(
    ModelConfig(
      family="bert",
      architecture=architecture,
      task=MASKED,
      vocab_size=keys.size("vocab_size"),
      hidden_size=width,
      mlp_size=keys.size("hidden_dim"),
      num_layers=keys.size("n_layers"),
      activation=activation,
      **_encoder(keys, keys.size("n_heads"), width, keys.size("max_position_embeddings", 512), 1e-12),
    ),
    head_activation=activation,
  )


def _encoder(keys: Keys, heads: int, width: int, positions: int, eps: float) -> dict:
  return dict(
    num_heads=heads, num_kv_heads=heads, head_dim=width // heads, max_positions=positions, norm="layer",
    norm_order="post", final_norm=False, norm_eps=eps, gated_mlp=False, qkv_bias=True, output_bias=True, mlp_bias=True,
    tied_head=keys.flag("tie_word_embeddings", True), head_bias=True, head_activation="gelu",
    learned_positions=positions, embedding_norm=True, **keys.special_ids(),
  )  # fmt: skip


def layout(c: ModelConfig) -> Mapping[str, Stored]:
  kind = c.architecture.removesuffix("ForMaskedLM").removesuffix("ForPreTraining")
  base = {"DistilBert": "distilbert"}.get(kind, kind.lower())
  out = {
    "embedding": Stored(f"{base}.embeddings.word_embeddings.weight"),
    "positions": Stored(f"{base}.embeddings.position_embeddings.weight"),
    "token_types": Stored(f"{base}.embeddings.token_type_embeddings.weight"),
  } | norm("embedding_norm", f"{base}.embeddings.LayerNorm", True)
  out |= HEADS[kind] | LAYERS.get(kind, _bert_layers)(base)
  if not c.tied_head and kind in UNTIED_BIAS:  # a decoder of its own brings its own bias, and the other is not used
    out["head_bias"] = Stored(UNTIED_BIAS[kind])
  return out


def _bert_layers(base: str) -> dict[str, Stored]:
  theirs = f"{base}.encoder.layer.{{}}."
  out = linear("embedding_projection", f"{base}.embeddings_project", True)  # ELECTRA
  for ours, name in {"q": "query", "k": "key", "v": "value"}.items():
    out |= linear(f"layers/attention/{ours}", f"{theirs}attention.self.{name}", True)
  out |= linear("layers/attention/o", f"{theirs}attention.output.dense", True)
  out |= norm("layers/attention_norm", f"{theirs}attention.output.LayerNorm", True)
  out |= linear("layers/mlp/up", f"{theirs}intermediate.dense", True)
  out |= linear("layers/mlp/down", f"{theirs}output.dense", True)
  return out | norm("layers/mlp_norm", f"{theirs}output.LayerNorm", True)


def _distilbert_layers(base: str) -> dict[str, Stored]:
  theirs, out = f"{base}.transformer.layer.{{}}.", {}
  for x in "qkv":
    out |= linear(f"layers/attention/{x}", f"{theirs}attention.{x}_lin", True)
  out |= linear("layers/attention/o", f"{theirs}attention.out_lin", True)
  out |= norm("layers/attention_norm", f"{theirs}sa_layer_norm", True)
  out |= linear("layers/mlp/up", f"{theirs}ffn.lin1", True) | linear("layers/mlp/down", f"{theirs}ffn.lin2", True)
  return out | norm("layers/mlp_norm", f"{theirs}output_layer_norm", True)


def _albert_layers(base: str) -> dict[str, Stored]:
  theirs = f"{base}.encoder.albert_layer_groups.{{}}.albert_layers.0."
  out = linear("embedding_projection", f"{base}.encoder.embedding_hidden_mapping_in", True)
  for ours, name in {"q": "query", "k": "key", "v": "value", "o": "dense"}.items():
    out |= linear(f"layers/shared/attention/{ours}", f"{theirs}attention.{name}", True)
  out |= norm("layers/shared/attention_norm", f"{theirs}attention.LayerNorm", True)
  out |= linear("layers/shared/mlp/up", f"{theirs}ffn", True)
  out |= linear("layers/shared/mlp/down", f"{theirs}ffn_output", True)
  return out | norm("layers/shared/mlp_norm", f"{theirs}full_layer_layer_norm", True)


LAYERS = {"DistilBert": _distilbert_layers, "Albert": _albert_layers}


def _head(dense: str, normed: str, bias: str, decoder: str) -> dict[str, Stored]:
  out = linear("head_projection", dense, True) | norm("head_norm", normed, True)
  return out | {"head_bias": Stored(bias), "head": Stored(decoder)}


HEADS = {
  "Bert": _head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
                "cls.predictions.decoder.weight"),
  "Roberta": _head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
  "DistilBert": _head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight"),
  "Albert": _head("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder.weight"),
  "Electra": _head("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias",
                   "generator_lm_head.weight"),
}  # fmt: skip
UNTIED_BIAS = {"Bert": "cls.predictions.decoder.bias", "Roberta": "lm_head.decoder.bias",
               "Albert": "predictions.decoder.bias"}  # fmt: skip
