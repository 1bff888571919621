from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxbias.errors import UserError
from jaxbias.models.gguf import Gguf, convert, half_split, model_config, output_bytes
from tests.conftest import BYTE_LEVEL, SIZES, llama_tensors


@pytest.fixture
def converted(tmp_path):
  def run(path):
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(Gguf(path), "0" * 64, folder)
    return folder

  return run


def unpack(raw: np.ndarray, kind: Kind) -> np.ndarray:
  """Quantised rows by the format's definition, one block at a time: [rows, bytes] -> [rows, values]."""
  half = lambda b: struct.unpack("<e", b)[0]

  def block(b: bytes) -> list[float]:
    if kind == Kind.Q8_0:
      return [half(b[:2]) * q for q in struct.unpack("32b", b[2:])]
    scale, offset, codes = (half(b[:2]), half(b[2:4]), b[4:]) if kind == Kind.Q4_1 else (half(b[:2]), None, b[2:])
    codes = [c & 15 for c in codes] + [c >> 4 for c in codes]
    return [scale * (q - 8) if offset is None else scale * q + offset for q in codes]

  size = {Kind.Q8_0: 34, Kind.Q4_1: 20, Kind.Q4_0: 18}[kind]
  return np.array([sum((block(bytes(r[i : i + size])) for i in range(0, len(r), size)), []) for r in raw], np.float32)


def unpack_k(b: bytes, kind: Kind) -> list[float]:
  """One block of 256 values by the format's definition: eight groups of 32 with six-bit scales and minima (Q4_K), or
  sixteen groups of 16 with signed scales and codes of four low and two high bits (Q6_K)."""
  half = lambda at: struct.unpack("<e", b[at : at + 2])[0]
  if kind == Kind.Q4_K:
    packed, codes = b[4:16], b[16:]

    def scale_and_minimum(j: int) -> tuple[int, int]:
      if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
      low = packed[j + 4]
      return low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4

    out = []
    for j in range(8):
      scale, minimum = scale_and_minimum(j)
      group = codes[j // 2 * 32 :][:32]
      out += [half(0) * scale * (c >> 4 if j % 2 else c & 15) - half(2) * minimum for c in group]
    return out
  low, high, scales = b[:128], b[128:192], struct.unpack("16b", b[192:208])
  out = []
  for i in range(256):
    part, lane = i // 32 % 4, i % 32  # which of the four groups of 32 in its half, and where in it
    code = low[i // 128 * 64 + part % 2 * 32 + lane] >> (4 if part > 1 else 0) & 15
    code |= (high[i // 128 * 32 + lane] >> 2 * part & 3) << 4
    out.append(half(208) * scales[i // 16] * (code - 32))
  return out


@pytest.mark.parametrize("kind, size, halves", [(Kind.Q4_K, 144, (0, 2)), (Kind.Q6_K, 210, (208,))])
def test_k_quants_are_read_by_the_formats_definition(tmp_path, kind, size, halves):
  rng = np.random.default_rng(0)
  raw = rng.integers(0, 256, (3, 2 * size), np.uint8)
  for row in raw:
    for block in range(2):
      for at in halves:
        row[block * size + at :][:2] = np.frombuffer(np.float16(rng.uniform(0.01, 0.1)).tobytes(), np.uint8)
  writer = GGUFWriter(tmp_path / "k.gguf", "llama")
  writer.add_tensor("weight", raw, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  found = Gguf(tmp_path / "k.gguf").read("weight")
  expected = [sum((unpack_k(bytes(row[i : i + size]), kind) for i in (0, size)), []) for row in raw]
  assert found.dtype == np.float32 and found.shape == (3, 512)
  assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert len(np.unique(found)) > 100


def brute_half_split(rows: np.ndarray, heads: int) -> np.ndarray:
  """Row by row: GGUF's neighbours 2i and 2i + 1 of a head are rows i and i + C/2 of Hugging Face's."""
  out, C = np.empty_like(rows), len(rows) // heads
  for h in range(heads):
    for i in range(C // 2):
      out[h * C + i], out[h * C + i + C // 2] = rows[h * C + 2 * i], rows[h * C + 2 * i + 1]
  return out


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_every_tensor_arrives_dequantised_under_its_name(make_gguf, converted, kind):
  tensors = llama_tensors(head=True)
  found = load_file(converted(make_gguf(tensors=tensors, kind=kind)) / "model.safetensors")

  def expected(name):
    value = tensors[name]
    if value.ndim == 1 or kind == Kind.F32:
      return value
    if kind == Kind.F16:
      return value.astype(np.float16).astype(np.float32)
    if kind == Kind.BF16:
      return (quantize(value, kind).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return unpack(quantize(value, kind), kind)

  names = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
  for i in range(2):
    layer = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output"}  # fmt: skip
    names |= {f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}" for theirs, ours in layer.items()}
    for short, heads in (("q", SIZES["H"]), ("k", SIZES["K"])):
      value = found.pop(f"model.layers.{i}.self_attn.{short}_proj.weight")
      assert_allclose(value, brute_half_split(expected(f"blk.{i}.attn_{short}.weight"), heads), rtol=1e-6)
  assert found.keys() == names.keys()
  for theirs, ours in names.items():
    assert found[theirs].dtype == np.float32
    assert_allclose(found[theirs], expected(f"{ours}.weight"), rtol=1e-6)


def test_half_split_rotary_scores_as_interleaved_rotary_did():
  """What llama.cpp computes from the file's rows is what Hugging Face's rotary computes from ours. GQA: 4 q, 2 kv."""
  rng = np.random.default_rng(0)
  H, K, C, D, T = 4, 2, 16, 24, 7
  q, k, x = rng.standard_normal((H * C, D)), rng.standard_normal((K * C, D)), rng.standard_normal((T, D))
  angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, C, 2) / C)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

  def interleaved(a):
    out = np.empty_like(a)
    out[..., ::2], out[..., 1::2] = (
      a[..., ::2] * cos - a[..., 1::2] * sin,
      a[..., ::2] * sin + a[..., 1::2] * cos,
    )
    return out

  def half(a):
    low, high = a[..., : C // 2], a[..., C // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

  def scores(rotate, q, k):
    q, k = rotate((x @ q.T).reshape(T, H, C)), rotate((x @ k.T).reshape(T, K, C))
    return np.einsum("thc,shc->hts", q, np.repeat(k, H // K, axis=1))

  ours = scores(half, half_split(q, H), half_split(k, K))
  assert_allclose(ours, scores(interleaved, q, k), rtol=1e-9, atol=1e-9)
  assert not np.allclose(ours, scores(half, q, k))


def test_config_json(make_gguf, converted):
  config = json.loads((converted(make_gguf()) / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
  sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
           "num_hidden_layers", "vocab_size")  # fmt: skip
  assert [config[key] for key in sizes] == list(SIZES.values())
  assert (config["rms_norm_eps"], config["rope_theta"], config["max_position_embeddings"]) == (1e-5, 1e4, 128)
  assert config["tie_word_embeddings"] is True and config["attention_bias"] is False and "rope_scaling" not in config
  assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)


def test_an_output_tensor_unties_and_biases_travel(make_gguf, converted):
  tensors = llama_tensors(bias=True, head=True)
  folder = converted(make_gguf(tensors=tensors))
  config = json.loads((folder / "config.json").read_text())
  assert config["tie_word_embeddings"] is False and config["attention_bias"] and config["mlp_bias"]
  found = load_file(folder / "model.safetensors")
  assert_array_equal(found["model.layers.1.mlp.up_proj.bias"], tensors["blk.1.ffn_up.bias"])
  assert_array_equal(
    found["model.layers.1.self_attn.k_proj.bias"], brute_half_split(tensors["blk.1.attn_k.bias"], SIZES["K"])
  )


def test_the_file_can_be_mapped_and_says_where_it_came_from(make_gguf, converted):
  path = make_gguf(kind=Kind.Q4_1)
  folder = converted(path)
  weights = folder / "model.safetensors"
  head = int.from_bytes(weights.read_bytes()[:8], "little")
  header = json.loads(weights.read_bytes()[8 : 8 + head])
  start, end = header["model.norm.weight"]["data_offsets"]
  mapped = np.memmap(weights, np.float32, "r", 8 + head + start, (end - start) // 4)
  with safe_open(weights, "numpy") as f:
    assert_array_equal(mapped, f.get_tensor("model.norm.weight"))
  assert (8 + head) % 8 == 0 and weights.stat().st_size == 8 + head + output_bytes(Gguf(path))
  source = json.loads((folder / "source.json").read_text())
  assert source["file"] == "tiny.gguf" and source["bytes"] == path.stat().st_size
  assert source["tensor_types"] == {"F32": 5, "Q4_1": 15} and source["weights_bytes"] == weights.stat().st_size


def test_progress_reaches_the_end(make_gguf, tmp_path):
  gguf, seen = Gguf(make_gguf()), []
  (tmp_path / "folder").mkdir()
  convert(gguf, "", tmp_path / "folder", seen.append)
  assert seen == sorted(seen) and seen[-1] == output_bytes(gguf)


def llama3_factors(factor: float, original: int = 8192) -> np.ndarray:
  """As in llama.cpp's converter, frequency by frequency."""
  out = []
  for i in range(0, SIZES["C"], 2):
    wavelength = 2 * np.pi * 500000.0 ** (i / SIZES["C"])
    if wavelength < original / 4:
      out.append(1.0)
    elif wavelength > original / 1:
      out.append(factor)
    else:
      smooth = (original / wavelength - 1) / (4 - 1)
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)


def test_rope_scaling_is_honoured(make_gguf):
  linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
  assert model_config(Gguf(make_gguf(metadata=linear)))["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
  ones = llama_tensors() | {"rope_freqs.weight": np.ones(8, np.float32)}
  assert "rope_scaling" not in model_config(Gguf(make_gguf(tensors=ones)))


def test_llama3_rope_scaling_is_recognised_by_its_factors(make_gguf, converted):
  tensors = llama_tensors() | {"rope_freqs.weight": llama3_factors(32.0)}
  path = make_gguf(tensors=tensors, metadata={"llama.rope.freq_base": 500000.0})
  config = json.loads((converted(path) / "config.json").read_text())
  assert config["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }


def without(name: str) -> dict[str, np.ndarray]:
  return {key: value for key, value in llama_tensors().items() if key != name}


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"architecture": "gemma2"}, "architecture `gemma2`; supported in GGUF: llama"),
    ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope scaling `yarn`"),
    ({"metadata": {"llama.rope.dimension_count": 8}}, "rotates only a part"),
    ({"metadata": {"split.count": 3}}, "one of 3 parts"),
    ({"metadata": {"llama.attention.head_count": [4, 2]}}, "not one positive number for all layers"),
    ({"metadata": {"llama.block_count": 3}}, "blk.2.attn_k.weight is missing"),
    ({"metadata": {"llama.feed_forward_length": 64}}, r"ffn_down.weight has shape \(64, 96\), \(64, 64\) is needed"),
    ({"tensors": llama_tensors() | {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "not Llama 3's"),
    ({"tensors": llama_tensors() | {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}}, "gate_inp.*not part"),
    ({"tensors": without("blk.1.attn_v.weight")}, "blk.1.attn_v.weight is missing"),
    ({"tensors": without("token_embd.weight")}, "token_embd.weight is missing"),
    ({"tokenizer": BYTE_LEVEL | {"model": "rwkv"}}, "kind `rwkv`; gpt2 and llama"),
    ({"tokenizer": BYTE_LEVEL | {"pre": "tekken"}}, "`tekken`.*supported: gpt-2"),
    ({"tokenizer": BYTE_LEVEL | {"merges": ["no such"]}}, "damaged tokenizer"),
    ({"tokenizer": BYTE_LEVEL | {"bos_token_id": 9999}}, "damaged tokenizer"),
  ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(make_gguf, converted, changes, said):
  path = make_gguf(**changes)
  with pytest.raises(UserError, match=said):
    converted(path)


def test_a_type_that_gguf_cannot_dequantise_is_refused_by_name(make_gguf, converted):
  path = make_gguf()
  raw = path.read_bytes()
  entry = struct.pack("<Q", len("output_norm.weight")) + b"output_norm.weight" + struct.pack("<IQ", 1, SIZES["D"])
  at = raw.index(entry) + len(entry)
  path.write_bytes(raw[:at] + struct.pack("<I", Kind.I32) + raw[at + 4 :])
  with pytest.raises(UserError, match="output_norm.weight is of type I32"):
    converted(path)


def test_not_gguf_and_other_versions(tmp_path):
  path = tmp_path / "x.gguf"
  for content, said in ((b"", "not a GGUF"), (b"PK\3\4zip", "not a GGUF"), (b"GGUF" + b"\1\0\0\0", "GGUF version 1")):
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
      Gguf(path)


def test_a_file_cut_short_anywhere_says_so(make_gguf):
  path = make_gguf(kind=Kind.Q4_0)
  raw = path.read_bytes()
  first = min(tensor.start for tensor in Gguf(path).tensors.values())
  for size in [4, 5, 8, 15, 23, 24, *range(40, first, 997), first - 40]:
    path.write_bytes(raw[:size])
    with pytest.raises(UserError, match=f"cut short: it ends at byte {size:,}, and .*Delete it and fetch it again"):
      Gguf(path)
  path.write_bytes(raw[: len(raw) - 100])
  with pytest.raises(UserError, match=r"tensor blk.1.\w+.weight needs [\d,]+\. Delete"):
    Gguf(path)


def test_damaged_headers_never_end_in_a_traceback(make_gguf, tmp_path):
  path = make_gguf()
  raw = path.read_bytes()
  first = min(tensor.start for tensor in Gguf(path).tensors.values())
  rng = np.random.default_rng(0)
  refused = 0
  for trial in range(60):
    damaged = bytearray(raw)
    near = rng.integers(4, 600) if trial % 2 else first - rng.integers(1, 1400)  # keys and sizes; the tensors' list
    damaged[near] ^= int(rng.integers(1, 256))
    path.write_bytes(damaged)
    folder = tmp_path / f"out{trial}"
    folder.mkdir()
    try:
      convert(Gguf(path), "", folder)
    except UserError:
      refused += 1
  assert refused > 30
