"""A .gguf file into a Hugging Face style folder: config.json, float32 model.safetensors and the tokenizer.

The header is parsed here rather than by `gguf.GGUFReader`, which makes several objects for every token of the
vocabulary (seconds, where this takes a fraction of one) and does not notice a file that was cut short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from jaxbias.data.tokens import SPECIAL_KEYS, tokenizer_of_metadata
from jaxbias.errors import UserError

ARCHITECTURES = ("llama",)
VERSION = 1  # of what `convert` writes; part of a conversion's identity, so raise it when the output changes

AGAIN = "Delete it and fetch it again."

_SCALARS = {
  GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
  GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
  GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip


def fingerprint(sha256: str) -> str:
  """Identity of the weights that `convert` makes of a file with this sha256."""
  return hashlib.sha256(f"gguf {sha256} to float32, version {VERSION}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies: `shape` in row-major order (the file has it reversed), `start` and `size` in bytes."""

  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  start: int
  size: int


class Gguf:
  """An open .gguf: `metadata` {key: value} and `tensors` {name: Tensor}; nothing of the weights is read yet.

  Raises UserError for a file that is not GGUF, was cut short, or is damaged.
  """

  def __init__(self, path: Path):
    self.path, self.at = path, 4
    with path.open("rb") as f:
      if f.read(4) != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
      self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    try:
      self._read_header()
    except (ValueError, TypeError, ArithmeticError) as error:  # a type that does not exist, text that is not UTF-8
      raise UserError(f"{path} is damaged near byte {self.at:,} ({error}). {AGAIN}") from None

  def read(self, name: str) -> np.ndarray:
    """One tensor, dequantised to float32."""
    tensor = self.tensors[name]
    raw = np.frombuffer(self.data, np.uint8, tensor.size, tensor.start)
    try:
      return dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind)
    except NotImplementedError:
      raise UserError(
        f"{self.path}: tensor {name} is of type {tensor.kind.name}, which cannot be dequantised here; "
        "use a file in F16, Q8_0, Q6_K, Q5_K, Q4_K, Q4_0 or Q4_1."
      ) from None

  def get(self, key: str, default: Any = None) -> Any:
    """A metadata value; a leading dot stands for the architecture's name. UserError when absent without default."""
    key = self.metadata["general.architecture"] + key if key.startswith(".") else key
    value = self.metadata.get(key, default)
    if value is None:
      raise UserError(f"{self.path} has no `{key}` in its metadata; convert the model to GGUF again.")
    return value

  def _read_header(self) -> None:
    if (version := self._unpack("I")) not in (2, 3):
      raise UserError(f"{self.path} is GGUF version {version}; versions 2 and 3, little-endian, are read.")
    num_tensors, num_keys = self._unpack("Q"), self._unpack("Q")
    self.metadata = {}
    for _ in range(num_keys):
      key = self._string()
      self.metadata[key] = self._value(GGUFValueType(self._unpack("I")))
    entries = []
    for _ in range(num_tensors):
      name, num_dims = self._string(), self._unpack("I")
      shape = tuple(self._unpack("Q") for _ in range(num_dims))[::-1]
      entries.append((name, shape, GGMLQuantizationType(self._unpack("I")), self._unpack("Q")))
    align = self.metadata.get("general.alignment", 32)
    base = -(-self.at // align) * align
    self.tensors = {}
    for name, shape, kind, offset in entries:
      block, block_bytes = GGML_QUANT_SIZES[kind]
      if not shape or shape[-1] % block:
        raise ValueError(f"tensor {name} of shape {shape} cannot be {kind.name}")
      size = math.prod(shape) // block * block_bytes
      self._check_end(base + offset + size, f"tensor {name}")
      self.tensors[name] = Tensor(shape, kind, base + offset, size)

  def _check_end(self, end: int, what: str) -> None:
    if end > len(self.data):
      raise UserError(
        f"{self.path} was cut short: it ends at byte {len(self.data):,}, and {what} needs {end:,}. {AGAIN}"
      )

  def _unpack(self, code: str) -> Any:
    start, self.at = self.at, self.at + struct.calcsize("<" + code)
    self._check_end(self.at, "its header")
    return struct.unpack_from("<" + code, self.data, start)[0]

  def _string(self) -> str:
    size = self._unpack("Q")
    start, self.at = self.at, self.at + size
    self._check_end(self.at, "its header")
    return self.data[start : self.at].decode("utf-8")

  def _value(self, kind: GGUFValueType) -> Any:
    if kind == GGUFValueType.STRING:
      return self._string()
    if kind == GGUFValueType.ARRAY:
      inner, count = GGUFValueType(self._unpack("I")), self._unpack("Q")
      return [self._value(inner) for _ in range(count)]
    value = self._unpack(_SCALARS[kind])
    return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value  # 1e-05, not 9.99999974e-06


def convert(gguf: Gguf, sha256: str, folder: Path, report: Callable[[int], None] = lambda written: None) -> None:
  """Fill an empty folder with config.json, model.safetensors (float32), tokenizer files and source.json.

  report: called with the number of weight bytes written so far. Memory holds one tensor at a time.
  Raises UserError for an architecture, rotary scaling, tensor type or tokenizer that is not supported.
  """
  config = model_config(gguf)
  files = {"config.json": config}
  if gguf.metadata.get("tokenizer.ggml.model", "none") != "none":
    tokenizer_of_metadata(gguf.metadata, str(gguf.path)).save(str(folder / "tokenizer.json"))
    files["tokenizer_config.json"] = _tokenizer_config(gguf)
  weights = _weights(gguf, config)
  written = _write_safetensors(folder / "model.safetensors", weights, report)
  files["source.json"] = {
    "file": gguf.path.name,
    "sha256": sha256,
    "bytes": len(gguf.data),
    "tensor_types": dict(Counter(tensor.kind.name for tensor in gguf.tensors.values())),
    "converter": VERSION,
    "weights_bytes": written,
  }
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def output_bytes(gguf: Gguf) -> int:
  """What the converted weights will take on disk."""
  return 4 * sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())


def model_config(gguf: Gguf) -> dict:
  """Hugging Face's config.json (LlamaForCausalLM) from the metadata and the names of the tensors."""
  architecture = gguf.metadata.get("general.architecture")
  if architecture not in ARCHITECTURES:
    raise UserError(
      f"{gguf.path} holds a model of architecture `{architecture}`; supported in GGUF: "
      f"{', '.join(ARCHITECTURES)}. Use its Hugging Face folder instead."
    )
  if gguf.metadata.get("split.count", 1) > 1:
    raise UserError(f"{gguf.path} is one of {gguf.get('split.count')} parts; join them with llama-gguf-split --merge.")

  def size(key: str, default: int | None = None) -> int:
    value = gguf.get(key, default)
    if not isinstance(value, int) or value < 1:
      raise UserError(f"{gguf.path}: `{key}` is not one positive number for all layers, which is needed here.")
    return value

  heads, width = size(".attention.head_count"), size(".embedding_length")
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": gguf.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in gguf.tensors else 0,
    "hidden_size": width,
    "intermediate_size": size(".feed_forward_length"),
    "num_hidden_layers": size(".block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": size(".attention.head_count_kv", heads),
    "head_dim": size(".attention.key_length", width // heads),
    "hidden_act": "silu",
    "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
    "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
    "rms_norm_eps": gguf.get(".attention.layer_norm_rms_epsilon"),
    "rope_theta": gguf.get(".rope.freq_base", 10000.0),
    "max_position_embeddings": size(".context_length"),
    "tie_word_embeddings": "output.weight" not in gguf.tensors,
    "torch_dtype": "float32",
    **{f"{name}_token_id": gguf.metadata.get(key) for name, key in SPECIAL_KEYS.items() if name != "unk"},
  }
  if gguf.get(".rope.dimension_count", config["head_dim"]) != config["head_dim"]:
    raise UserError(f"{gguf.path} rotates only a part of each head (rope.dimension_count), which is not supported.")
  scaling = _rope_scaling(gguf, config)
  return config | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(gguf: Gguf, config: dict) -> dict | None:
  """Hugging Face's rope_scaling: linear from the metadata, llama3 recognised by its table of factors."""
  kind = gguf.get(".rope.scaling.type", "none")
  if kind == "linear":
    return {"rope_type": "linear", "factor": gguf.get(".rope.scaling.factor")}
  if kind != "none":
    raise UserError(f"{gguf.path} asks for rope scaling `{kind}`; none, linear and Llama 3's are supported.")
  if "rope_freqs.weight" not in gguf.tensors:
    return None
  factors = gguf.read("rope_freqs.weight")
  if np.all(factors == 1):
    return None
  # Llama 3.1 to 3.3 differ in the factor only; wavelengths in positions, blended between `original` / 4 and / 1
  factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
  dim = config["head_dim"]
  wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
  blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
  if factors.shape != blend.shape or not np.allclose(factors, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
    raise UserError(f"{gguf.path}: rope_freqs.weight is not Llama 3's rope scaling, the one kind that is supported.")
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": original,
  }


def _layout(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
  """What the file must hold: GGUF's tensor name -> (Hugging Face's, shape)."""
  D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
  Q, K = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
  layout = {
    "token_embd.weight": ("model.embed_tokens.weight", (V, D)),
    "output_norm.weight": ("model.norm.weight", (D,)),
  }
  if not config["tie_word_embeddings"]:
    layout["output.weight"] = ("lm_head.weight", (V, D))
  attention = {"attn_q": ("q", (Q, D)), "attn_k": ("k", (K, D)), "attn_v": ("v", (K, D)), "attn_output": ("o", (D, Q))}
  mlp = {"ffn_gate": ("gate", (F, D)), "ffn_up": ("up", (F, D)), "ffn_down": ("down", (D, F))}
  for i in range(config["num_hidden_layers"]):
    ours, theirs = f"blk.{i}.", f"model.layers.{i}."
    layout[f"{ours}attn_norm.weight"] = (f"{theirs}input_layernorm.weight", (D,))
    layout[f"{ours}ffn_norm.weight"] = (f"{theirs}post_attention_layernorm.weight", (D,))
    for part, names in (("self_attn", attention), ("mlp", mlp)):
      for name, (short, shape) in names.items():
        layout[f"{ours}{name}.weight"] = (f"{theirs}{part}.{short}_proj.weight", shape)
        if config["attention_bias" if part == "self_attn" else "mlp_bias"]:
          layout[f"{ours}{name}.bias"] = (f"{theirs}{part}.{short}_proj.bias", shape[:1])
  return layout


Weights = Sequence[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]


def _weights(gguf: Gguf, config: dict) -> Weights:
  """Every tensor's Hugging Face name, shape, and how to read it."""
  layout = _layout(config)
  present = gguf.tensors.keys() - {"rope_freqs.weight"}
  problems = [f"{name} is missing" for name in layout.keys() - present]
  problems += [f"{name} is not part of a Llama model" for name in present - layout.keys()]
  problems += [
    f"{name} has shape {gguf.tensors[name].shape}, {layout[name][1]} is needed"
    for name in present & layout.keys()
    if gguf.tensors[name].shape != layout[name][1]
  ]
  if problems:
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    raise UserError(f"{gguf.path} does not hold what its metadata describes: {'; '.join(sorted(problems)[:4])}{more}.")

  def reader(name: str) -> Callable[[], np.ndarray]:
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    return lambda: half_split(gguf.read(name), config[heads]) if heads else gguf.read(name)

  return [(theirs, shape, reader(name)) for name, (theirs, shape) in layout.items()]


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
  """Undo the order in which GGUF keeps Llama's q and k rows.

  Within a head of size C, GGUF has (0, C/2, 1, C/2 + 1, ...), for a rotary that turns neighbours; Hugging Face has
  (0, 1, 2, ...), for one that turns row i with row i + C/2. Inverse of `permute` in llama.cpp's converter.
  """
  return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _write_safetensors(path: Path, weights: Weights, report: Callable[[int], None]) -> int:
  """The safetensors format, one tensor in memory at a time: header size, JSON header, buffers. Returns its bytes."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape, _ in weights:
    start, end = end, end + 4 * math.prod(shape)
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  with path.open("wb") as f:
    f.write(len(head).to_bytes(8, "little") + head)
    for name, _, read in weights:
      f.write(np.ascontiguousarray(read(), "<f4").data)
      report(header[name]["data_offsets"][1])
    return f.tell()


def _tokenizer_config(gguf: Gguf) -> dict:
  """Hugging Face's tokenizer_config.json: special tokens by their text, and the chat template."""
  tokens = gguf.get("tokenizer.ggml.tokens")
  names = {name: gguf.metadata.get(key) for name, key in SPECIAL_KEYS.items()}
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": gguf.get(".context_length"),
    "clean_up_tokenization_spaces": False,
    **{f"{name}_token": None if i is None else tokens[i] for name, i in names.items()},
    **({"chat_template": gguf.get("tokenizer.chat_template")} if "tokenizer.chat_template" in gguf.metadata else {}),
  }
