"""Fixtures that several rooms share: a tiny .gguf to order, and the real SmolLM2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # here and below: compiling is what takes the time

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers

from jaxbias.models.sources import ModelFolder, resolve

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "c a", "ca t", "Ġ cat", "Ġ a", "1 2"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
SIZES = {"D": 64, "F": 96, "H": 4, "K": 2, "C": 16, "L": 2, "V": len(TOKENS)}
BYTE_LEVEL = {
  "model": "gpt2",
  "pre": "smollm",
  "tokens": TOKENS,
  "merges": MERGES,
  "token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
  "bos_token_id": 1,
  "eos_token_id": 2,
}


LONG = ("parity/", "multidevice/", "test_resume", "test_bad_input", "test_generate", "losses/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Long files first, so that two processes end at about the same time."""
  items.sort(key=lambda item: next((i for i, part in enumerate(LONG) if part in item.nodeid), len(LONG)))


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
  """For a real model, which computes for longer than its programs compile."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def smollm2() -> ModelFolder:
  """SmolLM2-135M-Instruct, fetched into the user's cache on first use. Not skipped: much rests on it."""
  return resolve("smollm2-135m-instruct")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
  """A cache of this test's own; jax, which the command line points to it, forgets it afterwards."""
  monkeypatch.setenv("JAXBIAS_CACHE", str(tmp_path / "cache"))
  before = jax.config.jax_compilation_cache_dir
  yield tmp_path / "cache"
  jax.config.update("jax_compilation_cache_dir", before)


def llama_tensors(seed: int = 0, bias: bool = False, head: bool = False) -> dict[str, np.ndarray]:
  """Random weights of a two-layer Llama by GGUF's names, in the row order of GGUF. float32."""
  D, F, H, K, C, L, V = SIZES.values()
  block = {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (H * C, D), "attn_k": (K * C, D), "attn_v": (K * C, D),
           "attn_output": (D, H * C), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}  # fmt: skip
  shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)} | ({"output.weight": (V, D)} if head else {})
  for i in range(L):
    shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"blk.{i}.{name}.bias": shape[:1] for name, shape in block.items() if bias and len(shape) == 2}
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def make_gguf(tmp_path) -> Callable[..., Path]:
  """make_gguf(name, tensors, kind, architecture, metadata, tokenizer) writes a tiny Llama and returns its path."""

  def make(name="tiny.gguf", tensors=None, kind=Kind.F32, architecture="llama", metadata=None, tokenizer=BYTE_LEVEL):
    path = tmp_path / name
    writer = GGUFWriter(path, architecture)
    sizes = {"block_count": SIZES["L"], "context_length": 128, "embedding_length": SIZES["D"],
             "feed_forward_length": SIZES["F"], "attention.head_count": SIZES["H"],
             "attention.head_count_kv": SIZES["K"], "attention.layer_norm_rms_epsilon": 1e-5,
             "rope.freq_base": 10000.0}  # fmt: skip
    fields = {f"{architecture}.{key}": value for key, value in sizes.items()} | (metadata or {})
    fields |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
           list: writer.add_array}  # fmt: skip
    for key, value in fields.items():
      add[type(value)](key, value)
    for key, value in (llama_tensors() if tensors is None else tensors).items():
      chosen = kind if value.ndim == 2 else Kind.F32
      writer.add_tensor(key, quantize(value, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

  return make
