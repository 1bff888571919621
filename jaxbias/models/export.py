"""Hugging Face folders out: our parameters, adapters merged, as the tensors that `checkpoints` would read again.

One tensor is in host memory at a time, whatever the model's size and however it is sharded.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxbias.errors import UserError
from jaxbias.files import new_folder
from jaxbias.models.checkpoints import TensorFiles, aliases, read_config, tensor_shapes
from jaxbias.models.config import ModelConfig
from jaxbias.models.families import family_of
from jaxbias.models.lora import add_product, group_scales

SHARD_BYTES = 5_000_000_000
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32",
         "uint8": "U8", "bool": "BOOL"}  # fmt: skip
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
          "chat_template.jinja", "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip
COMPUTED = ("decoder.bias",)  # second names of parameters of ours, among those that loading ignores


class Tensor(NamedTuple):
  """One tensor to be written; `read` makes it when its turn comes."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def export_model(
  out: Path,
  source: Path,
  config: ModelConfig,
  params: Mapping,
  adapters: Mapping | None = None,
  dtype: str = "float32",
  shard_bytes: int = SHARD_BYTES,
  texts: Mapping[str, str] | None = None,
) -> None:
  """Write `out`: config.json and tokenizer files of `source` (the model's folder), and the weights in `dtype`.

  adapters: {"lora", "lora_scale"}, merged in float32. texts: {name: content} of files to add, such as README.md.
  Raises UserError where `out` has something in it, the disk lacks room, or a merged tensor is not finite.
  Every process of a multi-process run has to call it; the first one writes.
  """
  tensors = _ours(config, family_of(read_config(source)).layout(config), params, adapters, dtype)
  tensors += _carried(source, config, {tensor.name for tensor in tensors})
  files = _shards(sorted(tensors, key=_natural), shard_bytes)
  total = sum(tensor.bytes for tensor in tensors)
  if jax.process_index():  # gathers what the first process writes
    [tensor.read() for tensor in tensors]
    return
  with new_folder(out, total + (16 << 20)) as work:
    for file, members in files.items():
      write_safetensors(work / file, members)
    if len(files) > 1:
      where = {tensor.name: file for file, members in files.items() for tensor in members}
      _write_json(work / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(work / "config.json", _with_dtype(read_config(source), dtype))
    for path in (path for pattern in COPIED for path in source.glob(pattern)):
      shutil.copyfile(path, work / path.name)
    for name, text in (texts or {}).items():
      (work / name).write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str] | None = None) -> None:
  """The safetensors format, one tensor in memory at a time: header size, JSON header, buffers."""
  header, end = {"__metadata__": {"format": "pt"} | dict(metadata or {})}, 0
  for tensor in tensors:
    start, end = end, end + tensor.bytes
    header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  with path.open("wb") as f:
    f.write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors:
      f.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)


def on_host(leaf: jax.Array, number: int | None = None, *adapter: jax.Array) -> np.ndarray:
  """A whole array, or one layer of it with its adapter (a, b, scale) merged, gathered from wherever its parts lie."""
  sharding = getattr(leaf, "sharding", None)
  whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
  return np.asarray(_taker(whole)(leaf, number, *adapter))


@functools.lru_cache
def _taker(whole: NamedSharding | None) -> Callable:
  def take(leaf, number, *adapter):
    if number is None:
      return leaf
    layer, *adapter = (jax.lax.dynamic_slice_in_dim(x, number, 1) for x in (leaf, *adapter))
    return (add_product(layer, *adapter) if adapter else layer)[0]

  return jax.jit(take, out_shardings=whole)


def _ours(config: ModelConfig, layout: Mapping, params: Mapping, adapters: Mapping | None, dtype: str) -> list[Tensor]:
  """Our leaves as Hugging Face's tensors: fused projections together again, linear weights [out, in]."""
  flat = lambda tree: {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}
  leaves, lora = flat(params), flat((adapters or {}).get("lora", {}))
  scale_G = group_scales(adapters["lora_scale"]["scale"], config.groups) if lora else None
  shapes, pieces = tensor_shapes(leaves, layout), {}
  for path, leaf in leaves.items():
    for number in range(leaf.shape[0]) if layout[path].stacked else (None,):
      pieces.setdefault(layout[path].name.format(number), []).append((path, number))

  def adapter(path: str) -> tuple:
    a, b = (path.removesuffix("kernel") + factor for factor in "ab")
    return (lora[a], lora[b], scale_G) if path.endswith("/kernel") and a in lora else ()

  def read(name: str) -> np.ndarray:
    tensor = np.empty(shapes[name], dtype)
    for path, number in pieces[name]:
      stored, part = layout[path], on_host(leaves[path], number, *adapter(path))
      rows = slice(None) if stored.rows is None else stored.rows.at(np.arange(part.shape[-1]))
      (tensor.T if stored.transposed else tensor)[..., rows] = part
    if not np.isfinite(tensor).all():
      raise UserError(f"tensor {name} holds NaN or infinity in {dtype}; nothing was written. Train it anew.")
    return tensor

  return [Tensor(name, shape, dtype, functools.partial(read, name)) for name, shape in shapes.items()]


def _carried(source: Path, config: ModelConfig, ours: set[str]) -> list[Tensor]:
  """The tensors of the source that its architecture has and this library does not use (a pooler), as they are."""
  files, family = TensorFiles(source), family_of(read_config(source))
  names = (n for n in files.where if n.endswith(family.IGNORED) and not n.endswith(COMPUTED))
  names = [n for n in names if not ours & set(aliases(n, family))]
  dtypes = {code: dtype for dtype, code in CODES.items()}
  return [Tensor(n, files.shape(n), dtypes[files.stored(n).get_dtype()],
                 functools.partial(files.read, n, ())) for n in names]  # fmt: skip


def _natural(tensor: Tensor) -> list:
  """Layer 2 before layer 10, so that a file holds neighbouring layers."""
  return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in tensor.name.split(".")]


def _shards(tensors: Sequence[Tensor], limit: int) -> dict[str, list[Tensor]]:
  """{file name: its tensors}, files of at most `limit` bytes unless one tensor is larger."""
  shards, filled = [[]], 0
  for tensor in tensors:
    if shards[-1] and filled + tensor.bytes > limit:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += tensor.bytes
  if len(shards) == 1:
    return {"model.safetensors": shards[0]}
  return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _with_dtype(hf: dict, dtype: str) -> dict:
  """config.json with the weights' dtype under the key that it uses; every reader knows the older one."""
  present = [key for key in ("dtype", "torch_dtype") if key in hf] or ["torch_dtype"]
  return hf | dict.fromkeys(present, dtype)


def _write_json(path: Path, value: Mapping) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
