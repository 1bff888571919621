"""Text <-> token ids: a thin frozen wrapper over the `tokenizers` library, and the joins that scoring rests on.

A tokenizer comes from a model folder's tokenizer.json, or is built from the metadata of a .gguf.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxbias.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Never adds special tokens by itself. `vocab_size` is the largest id + 1; `fingerprint` the file's sha256."""

  backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
  bos_id: int | None
  eos_id: int | None
  pad_id: int  # falls back to eos, then to 0: padding is masked wherever it stands
  vocab_size: int
  fingerprint: str
  mask_id: int | None = None  # these three: of an encoder's tokenizer
  cls_id: int | None = None
  sep_id: int | None = None

  @property
  def start_id(self) -> int:
    """What stands before a text: BOS, else EOS (GPT-2). Raises UserError for a tokenizer with neither."""
    start = self.eos_id if self.bos_id is None else self.bos_id
    if start is None:
      raise UserError("the tokenizer names no BOS and no EOS token; add `bos_token` to its tokenizer_config.json.")
    return start

  def special(self, name: str) -> int:
    """The id of "mask", "cls" or "sep". Raises UserError where the tokenizer names none."""
    found = getattr(self, f"{name}_id")
    if found is None:
      raise UserError(f"the tokenizer names no {name} token, which a masked language model needs; add `{name}_token` "
                      "to its tokenizer_config.json.")
    return found

  def encode(self, text: str) -> list[int]:
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and the (start, end) characters each came from; a byte-level token may span the space before its word."""
    encoding = self.backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    return self.backend.decode(list(ids), skip_special_tokens=False)

  def join(self, context: str, option: str) -> tuple[list[int], list[int]]:
    """Ids of both, tokenised separately, so that the context's tokens are the same whatever follows it."""
    return self.encode(context), self.encode(option)


def answer_mask(tokenizer: Tokenizer, text: str, prefix_chars: int) -> tuple[list[int], int]:
  """Ids of the whole text, and the index of the first token that holds anything after `prefix_chars` characters.

  Safe where a prefix tokenised alone would split differently. Raises UserError when nothing follows the prefix.
  """
  ids, offsets = tokenizer.encode_with_offsets(text)
  for i, (_, end) in enumerate(offsets):
    if end > prefix_chars:
      return ids, i
  raise UserError(f"no answer after the first {prefix_chars} characters of {text!r}; the span to score is empty.")


_CUSTOMARY = {"mask": ("[MASK]", "<mask>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>")}


def load_tokenizer(folder: Path) -> Tokenizer:
  """The tokenizer of a model folder: tokenizer.json, and the names of its special tokens.

  tokenizer_config.json decides on them where it mentions them (null: there is none), then special_tokens_map.json;
  then, for BOS, EOS and padding, the ids in config.json, and for the others BERT's or RoBERTa's names of them.
  Raises UserError when tokenizer.json is missing or unreadable.
  """
  path = folder / "tokenizer.json"
  if not path.is_file():
    raise UserError(
      f"{folder} has no tokenizer.json; write one there with transformers: "
      "AutoTokenizer.from_pretrained(MODEL, use_fast=True).save_pretrained(FOLDER)."
    )
  raw = path.read_bytes()
  try:
    backend = tokenizers.Tokenizer.from_buffer(raw)
  except Exception as error:  # the library raises nothing narrower
    raise UserError(f"{path} is not a tokenizer that `tokenizers` reads ({error}); fetch it again.") from None
  backend.no_truncation()
  backend.no_padding()
  named = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
  config = _json(folder / "config.json")

  def special(name: str) -> int | None:
    if f"{name}_token" in named:
      token = named[f"{name}_token"]
      return backend.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
    if name in _CUSTOMARY:  # the first encoders' folders name none
      return next((i for i in map(backend.token_to_id, _CUSTOMARY[name]) if i is not None), None)
    found = config.get(f"{name}_token_id")
    return found[0] if isinstance(found, list) else found

  bos, eos, pad = special("bos"), special("eos"), special("pad")
  size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  pad = next(i for i in (pad, eos, 0) if i is not None)
  fingerprint = hashlib.sha256(raw).hexdigest()
  return Tokenizer(backend, bos, eos, pad, size, fingerprint, *map(special, ("mask", "cls", "sep")))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises UserError when the tokenizer has ids that the model lacks; a model padded larger is fine."""
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f"the tokenizer has ids up to {tokenizer.vocab_size - 1:,} and the model has {vocab_size:,} embeddings: "
      "they do not belong together. Use the tokenizer.json that came with the model."
    )


def _json(path: Path) -> dict:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}).") from None
  if not isinstance(found, dict):
    raise UserError(f"{path} holds no JSON object; fetch it again.")
  return found


# Tokenizers in GGUF metadata. Types of a token, as in the format's specification.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
SPECIAL_KEYS = {
  "bos": "tokenizer.ggml.bos_token_id",
  "eos": "tokenizer.ggml.eos_token_id",
  "pad": "tokenizer.ggml.padding_token_id",
  "unk": "tokenizer.ggml.unknown_token_id",
}
_INSTEAD = "Use the model's Hugging Face folder instead."
_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {  # tokenizer.ggml.pre -> how text is cut into words before the merges
  **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), "gpt2"),
  **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), "digits"),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama3"),
}


def tokenizer_of_metadata(metadata: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
  """The tokenizer in a GGUF's metadata: byte-level BPE (`gpt2`) or SentencePiece-style BPE (`llama`).

  `smollm` cuts digits apart before GPT-2's words, as that model's own tokenizer does. Hugging Face's GGUF reader does
  not; the ids differ after two or more spaces before a digit, and for digits beyond ASCII, nowhere else.
  Raises UserError, beginning with `where`, for another kind and for an unknown way to cut words.
  """
  kind, words = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
  if kind not in ("gpt2", "llama"):
    raise UserError(f"{where} has a tokenizer of kind `{kind}`; gpt2 and llama are supported. {_INSTEAD}")
  if kind == "gpt2" and words not in _WORDS:
    raise UserError(f"{where} cuts words as `{words}` (tokenizer.ggml.pre); supported: {', '.join(_WORDS)}. {_INSTEAD}")
  try:
    tokenizer = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    _add_special(tokenizer, metadata)
  except Exception as error:  # a key or a token that is not there; `tokenizers` itself raises nothing narrower
    raise UserError(f"{where} has a damaged tokenizer ({error!r}); fetch the file again.") from None
  return tokenizer


def _add_special(tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
  """Tokens that are found whole in a text, and the BOS that other programs put first (`Tokenizer` never does)."""
  tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
  for chosen in (_CONTROL, _USER_DEFINED):
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == chosen]
    tokenizer.add_tokens([AddedToken(token, special=chosen == _CONTROL, normalized=False) for token in whole])
  special = {name: tokens[metadata[key]] for name, key in SPECIAL_KEYS.items() if key in metadata}
  if "bos" in special and metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama"):
    bos = special["bos"]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, metadata[SPECIAL_KEYS["bos"]])]
    )


def _byte_level(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  words = _WORDS[metadata["tokenizer.ggml.pre"]]
  merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
  ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
  tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=words == "llama3"))
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words != "llama3")
  first = {
    "gpt2": [],
    "digits": [pre_tokenizers.Digits(individual_digits=True)],
    "llama3": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")],
  }[words]
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """SentencePiece BPE: the neighbours whose join has the highest score merge first; unknown characters become bytes."""
  tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
  scores = metadata["tokenizer.ggml.scores"]
  ids = {token: i for i, token in enumerate(tokens)}
  normal = sorted((i for i, kind in enumerate(types) if kind == _NORMAL), key=lambda i: -scores[i])
  splits = ((tokens[i][:at], tokens[i][at:]) for i in normal for at in range(1, len(tokens[i])))
  merges = [(left, right) for left, right in splits if left in ids and right in ids]
  unknown = tokens[metadata.get(SPECIAL_KEYS["unk"], 0)]
  tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
  prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
  prepend = [normalizers.Prepend("▁")] if prefix else []
  tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
  strip = [decoders.Strip(" ", 1, 0)] if prefix else []
  tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
  return tokenizer
