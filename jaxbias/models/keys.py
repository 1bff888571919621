"""config.json, read so that nothing in it is ignored by accident.

A family asks for every key that it understands; `finish` refuses what is left, unless it is known not to change what
the model computes. Today's layout (`rope_parameters`, `dtype`) and the older one (`rope_theta`, `rope_scaling`,
`torch_dtype`) are both read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbias.errors import UserError
from jaxbias.models.config import LayerKind, Rope

# Bookkeeping, training-time noise (no dropout here but LoRA's) and generation defaults.
HARMLESS = frozenset(
  """_name_or_path _attn_implementation _commit_hash _flash_attn_2_enabled _attn_implementation_autoset architectures
  activation_dropout attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop auto_map
  begin_suppress_tokens
  bad_words_ids bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout classifier_dropout_prob
  cls_token_id decoder_start_token_id directionality diversity_penalty do_sample down_scale_factor dropout dtype
  early_stopping embd_pdrop embedding_dropout encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id gap_size generation_config generator_hidden_size
  gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_std initializer_factor initializer_range
  keys_to_ignore_at_inference label2id language layerdrop length_penalty mask_token_id max_length min_length model_type
  n_ctx net_structure_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_memory_blocks
  num_return_sequences output_attentions output_hidden_states output_past output_scores pad_token_id
  pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
  predict_special_tokens prefix problem_type qa_dropout remove_invalid_values repetition_penalty resid_pdrop
  return_dict return_dict_in_generate sep_token_id seq_classif_dropout sinusoidal_pos_embds summary_activation
  summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
  task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_weights_ tokenizer_class top_k top_p
  torch_dtype torchscript transformers_version transformers.js_config typical_p unk_token_id unsloth_fixed
  unsloth_version use_bfloat16 use_cache vocab_pad_token_id embedding_hidden_size_ratio reorder_and_upcast_attn
  initializer_cutoff_factor hidden_layer_id _vocab_size classifier_activation""".split()
)
# Keys that must have one value, wherever they appear; anything else is a different model.
ONLY = {
  "is_encoder_decoder": (False,), "add_cross_attention": (False,), "is_decoder": (False, None),
  "pruned_heads": ({}, None),
  "quantization_config": (None,), "cross_attention_hidden_size": (None,), "position_embedding_type": ("absolute", None),
}  # fmt: skip
ACTIVATIONS = {
  "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
}  # fmt: skip
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


class Keys:
  """A config.json under reading. Every method raises UserError naming the key at fault."""

  def __init__(self, hf: Mapping[str, Any]):
    self.hf, self.read = hf, set()

  def get(self, key: str, default: Any = None) -> Any:
    """The value, or the default where the key is absent or null."""
    self.read.add(key)
    value = self.hf.get(key)
    return default if value is None else value

  def size(self, key: str, default: int | None = None) -> int:
    """A whole number from 1 on."""
    value = self.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise UserError(f"config.json has no whole number for `{key}` ({value!r}).")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    value = self.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
      raise UserError(f"config.json has no number for `{key}` ({value!r}).")
    return float(value)

  def flag(self, key: str, default: bool = False) -> bool:
    value = self.get(key, default)
    if not isinstance(value, bool):
      raise UserError(f"config.json: `{key}` is {value!r}; it must be true or false.")
    return value

  def one_of(self, key: str, supported: Sequence[Any], default: Any) -> Any:
    value = self.get(key, default)
    if value not in supported:
      raise UserError(f"config.json asks for {key} `{value}`, which is not supported; "
                      f"{', '.join(f'`{s}`' for s in supported)} {'is' if len(supported) == 1 else 'are'}.")
    return value

  def activation(self, key: str, default: str) -> str:
    return ACTIVATIONS[self.one_of(key, tuple(ACTIVATIONS), default)]

  def special_ids(self) -> dict[str, Any]:
    """bos_id, eos_ids and pad_id of a ModelConfig."""
    eos = self.get("eos_token_id", ())
    return {"bos_id": self.get("bos_token_id"), "pad_id": self.get("pad_token_id"),
            "eos_ids": tuple(eos) if isinstance(eos, list | tuple) else (eos,)}  # fmt: skip

  def finish(self) -> None:
    """Refuse what nobody asked for and is not known to be harmless."""
    for key, allowed in ONLY.items():
      if key not in self.read and self.hf.get(key, allowed[0]) not in allowed:
        raise UserError(f"config.json asks for {key} `{self.hf[key]}`, which is not supported; `{allowed[0]}` is.")
    unknown = sorted(k for k in self.hf if k not in self.read | HARMLESS | ONLY.keys() and self.hf[k] is not None)
    if unknown:
      raise UserError(f"config.json has the key{'s'[: len(unknown) > 1]} {', '.join(f'`{k}`' for k in unknown)}, which "
                      f"this architecture is not known to have; supported: {', '.join(sorted(self.read))}. Remove "
                      "what does not change the model's result.")  # fmt: skip

  def rope(self, head_dim: int, section: str | None = None, theta_key: str = "rope_theta", theta: float = 10_000.0,
           partial_key: str = "partial_rotary_factor", partial: float = 1.0, scaled: bool = True) -> Rope:
    """The rotary table, of `section` where config.json has one for each kind of layer.

    scaled: whether the older layout's `rope_scaling` is about this table.
    """
    new = self.get("rope_parameters", {})
    old = self.get("rope_scaling", {}) if scaled else {}
    chosen = new.get(section, {}) if section and section in new else ({} if section and _by_section(new) else new)
    values = dict(chosen) if chosen else dict(old)
    values.setdefault("rope_theta", self.number(theta_key, theta))
    values.setdefault("partial_rotary_factor", self.number(partial_key, partial))
    values.setdefault("original_max_position_embeddings", self.get("original_max_position_embeddings"))
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    return rope_table({"su": "longrope"}.get(kind, kind), values, head_dim, self.get("max_position_embeddings", 2048))

  def layer_kinds(self, layers: int, window: int | None, pattern: Sequence[bool], ropes: tuple[int, int] = (0, 0)):
    """(kinds, kind of each layer) of a ModelConfig, from `layer_types` or else from `pattern` (True: sliding)."""
    types = self.get("layer_types")
    if types is not None:
      if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"config.json: `layer_types` {types} is not supported; it must be a list of {layers}, each "
                        "`full_attention` or `sliding_attention`.")  # fmt: skip
      pattern = [kind == "sliding_attention" for kind in types]
    of_layer = [LayerKind(window, ropes[1]) if slides else LayerKind(None, ropes[0]) for slides in pattern]
    kinds = tuple(dict.fromkeys(of_layer))
    return {"kinds": kinds, "layer_kinds": tuple(map(kinds.index, of_layer))}


def _by_section(rope_parameters: Mapping) -> bool:
  return any(isinstance(value, Mapping) for value in rope_parameters.values())


def rope_table(kind: str, values: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
  """Inverse wavelengths of one kind of rotary scaling, as Hugging Face computes them.

  default: Su et al. 2021; linear: positions / factor; llama3: Llama 3.1's blend; yarn: Peng et al. 2023;
  longrope: Ding et al. 2024. Raises UserError for other kinds, and for parameters that are missing or unknown.
  """
  if kind not in ROPE_KINDS:
    raise UserError(f"config.json asks for rope scaling `{kind}`, which is not supported; supported: "
                    f"{', '.join(ROPE_KINDS)}.")  # fmt: skip
  values = dict(values)
  read = lambda key, default=None: _number(kind, key, values.pop(key, None), default)
  theta, dim = read("rope_theta"), int(head_dim * read("partial_rotary_factor", 1.0))
  inverse = theta ** -(np.arange(0, dim, 2) / dim)
  original = values.pop("original_max_position_embeddings", None) or max_positions
  scale, longer = 1.0, None
  if kind == "linear":
    inverse = inverse / read("factor")
  elif kind == "llama3":
    factor, low, high = read("factor"), read("low_freq_factor"), read("high_freq_factor")
    blend = np.clip((original * inverse / (2 * np.pi) - low) / (high - low), 0, 1)
    inverse = inverse * ((1 - blend) / factor + blend)
  elif kind == "yarn":
    factor = read("factor", max_positions / original)
    fast, slow = read("beta_fast", 32.0), read("beta_slow", 1.0)
    ramp = _yarn_ramp(dim, theta, original, fast, slow, values.pop("truncate", True))
    inverse = inverse * (ramp / factor + 1 - ramp)
    size = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
    m, m_all = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    scale = read("attention_factor", size(m) / size(m_all) if m and m_all else size(1.0))
  elif kind == "longrope":
    factor = read("factor", max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = read("attention_factor", default)
    short, longer = (np.asarray(values.pop(key, ()), float) for key in ("short_factor", "long_factor"))
    if short.shape != inverse.shape or longer.shape != inverse.shape:
      raise UserError(f"config.json: rope scaling `longrope` needs {len(inverse)} numbers in `short_factor` and "
                      "`long_factor`.")  # fmt: skip
    inverse, longer = inverse / short, inverse / longer
  if rest := sorted(key for key, value in values.items() if value is not None):
    raise UserError(f"config.json: rope scaling `{kind}` has the parameter `{rest[0]}`, which it is not known to have.")
  plain = lambda x: tuple(map(float, x))
  return Rope(plain(inverse), scale, None if longer is None else plain(longer), original if longer is not None else 0)


def _number(kind: str, key: str, value: Any, default: float | None) -> float:
  value = default if value is None else value
  if not isinstance(value, int | float):
    raise UserError(f"config.json: rope scaling `{kind}` needs a number for `{key}` ({value!r}).")
  return float(value)


def _yarn_ramp(dim: int, theta: float, original: int, fast: float, slow: float, truncate: bool) -> np.ndarray:
  """0 for the pairs that turn at least `fast` times within the original window, 1 for those below `slow` turns."""
  at = lambda turns: dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
  low, high = (math.floor(at(fast)), math.ceil(at(slow))) if truncate else (at(fast), at(slow))
  low, high = max(low, 0), min(high, dim - 1)
  return np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
