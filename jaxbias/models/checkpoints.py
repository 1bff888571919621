"""Hugging Face folders in: safetensors streamed tensor by tensor into (sharded) stacked parameters.

Never unpickles. Each device's shard is filled by reading just the layers and slices that it holds, so host memory
carries one shard at a time beside what is already on the devices.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxbias.errors import UserError
from jaxbias.models.config import ModelConfig
from jaxbias.models.families import family_of
from jaxbias.models.families.layout import Stored

STREAM_BYTES = 256 << 20  # shards of stacked layers past this size are filled layer by layer
MAPPED_BYTES = 128 << 20  # of files, touched before they are mapped anew: what is mapped counts as our memory


def read_config(folder: Path) -> dict:
  """config.json of a model folder. Raises UserError when it is missing or not a JSON object."""
  path = folder / "config.json"
  if not path.exists():
    raise UserError(f"{folder} has no config.json; a model folder holds config.json and *.safetensors.")
  return _json_object(path)


def _json_object(path: Path) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); fetch the model again.") from None
  if not isinstance(value, dict):
    raise UserError(f"{path} is not a JSON object; fetch the model again.")
  return value


class TensorFiles:
  """All tensors of a folder's safetensors files, by name, read in slices on demand."""

  def __init__(self, folder: Path):
    self.folder = folder
    index = folder / "model.safetensors.index.json"
    if index.exists():
      where = _json_object(index).get("weight_map")
      if not isinstance(where, dict):
        raise UserError(f"{index} has no `weight_map`; fetch the model again.")
      files = sorted(set(where.values()))
    else:
      files = ["model.safetensors"]
    self.where, self.handles, self.touched = {}, {}, 0
    for file in files:
      self.where.update(dict.fromkeys(self._handle(folder / file).keys(), folder / file))

  def _handle(self, file: Path):
    if file not in self.handles:
      self.handles[file] = open_safetensors(file)
    return self.handles[file]

  def stored(self, name: str):
    """The tensor as safetensors' slice: its shape, its dtype, and what indexing reads."""
    return self._handle(self.where[name]).get_slice(name)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self.stored(name).get_shape())

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one tensor. A large one is read by blocks of rows, as a few columns touch the pages of all of them."""
    shape = self.shape(name)
    if not shape:
      return self._handle(self.where[name]).get_tensor(name)
    rows, columns = range(*(index or (slice(None),))[0].indices(shape[0])), index[1:]
    step = max(MAPPED_BYTES // (4 * math.prod(shape[1:])), 1)
    blocks = [slice(at, min(at + step, rows.stop)) for at in rows[::step]]
    if len(blocks) == 1:
      return self._block(name, blocks[0], columns)
    out = None
    for rows_now in blocks:
      part = self._block(name, rows_now, columns)
      out = np.empty((len(rows), *part.shape[1:]), part.dtype) if out is None else out
      out[rows_now.start - rows.start :][: len(part)] = part
    return out

  def _block(self, name: str, rows: slice, columns: tuple[slice, ...]) -> np.ndarray:
    if self.touched > MAPPED_BYTES:
      self.handles, self.touched = {}, 0
    stored = self.stored(name)
    self.touched += 4 * (rows.stop - rows.start) * math.prod(stored.get_shape()[1:])
    return stored[(rows, *columns)]


def open_safetensors(path: Path):
  """A handle of one file. Raises UserError when it is missing or damaged, with the tensor that it lost."""
  if not path.exists():
    raise UserError(f"{path} is missing; fetch the model again, or point at a folder with safetensors weights.")
  try:
    return safe_open(path, framework="numpy")
  except SafetensorError as error:
    raise UserError(f"{path} cannot be read ({_cut_short(path) or error}). Delete it and fetch it anew.") from None


def _cut_short(path: Path) -> str | None:
  """Which tensor a truncated file lost, if truncation is what is wrong with it."""
  size = path.stat().st_size
  with path.open("rb") as f:
    header_bytes = int.from_bytes(f.read(8), "little")
    if header_bytes + 8 > size:
      return f"it was cut short: {size:,} bytes, and its header alone takes {header_bytes + 8:,}"
    try:
      header = json.loads(f.read(header_bytes))
    except ValueError:
      return None
  ends = {name: t["data_offsets"][1] + 8 + header_bytes for name, t in header.items() if name != "__metadata__"}
  lost = min((name for name in ends if ends[name] > size), key=ends.get, default=None)
  return f"it was cut short: tensor {lost} ends at byte {ends[lost]:,} of {size:,}" if lost else None


def load_params(folder: Path, config: ModelConfig, abstract: Mapping, shardings: Mapping, dtype: str) -> dict:
  """The parameter tree of `abstract`'s shapes, placed by `shardings`, in `dtype`.

  Raises UserError listing every tensor that is missing, extra or misshapen, and for weights that are not finite.
  """
  family = family_of(read_config(folder))
  files, layout = TensorFiles(folder), family.layout(config)
  leaves = {"/".join(path): leaf for path, leaf in flatten_dict(dict(abstract)).items()}
  where = {"/".join(path): sharding for path, sharding in flatten_dict(dict(shardings)).items()}
  names = _check_tensors(leaves, files, family, layout, config)

  def leaf(path: str) -> jax.Array:
    stored, shape = layout[path], leaves[path].shape

    def tensor(index: tuple[slice, ...], number: int | None = None) -> np.ndarray:
      name = names[stored.name if number is None else stored.name.format(number)]
      values = _read(files, name, stored, index, shape[-1]).astype(dtype, copy=False)
      if not np.isfinite(values).all():
        raise UserError(f"{folder}: tensor {name} holds NaN or infinity; fetch the model again, or train it anew.")
      return values

    def shard(index: tuple[slice, ...]) -> np.ndarray:
      if not stored.stacked:
        return tensor(index)
      return np.stack([tensor(index[1:], i) for i in range(*index[0].indices(shape[0]))])

    if not stored.stacked or _shard_bytes(shape, where[path], dtype) < STREAM_BYTES:
      return _shard_by_shard(shape, where[path], shard)
    return _layer_by_layer(shape, where[path], dtype, tensor)

  return unflatten_dict({tuple(path.split("/")): leaf(path) for path in leaves})


def _shard_bytes(shape: tuple[int, ...], sharding, dtype: str) -> int:
  return math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize


def _shard_by_shard(shape: tuple[int, ...], sharding, shard: Callable) -> jax.Array:
  """A leaf, read and placed one shard after the other, so that the host holds one beside what the devices hold."""
  shards, read, values = [], None, None
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    if index != read:
      read, values = index, shard(index)
    shards.append(jax.block_until_ready(jax.device_put(values, device)))
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _layer_by_layer(shape: tuple[int, ...], sharding, dtype: str, tensor: Callable) -> jax.Array:
  """A large stacked leaf, filled on its devices one layer at a time, so that the host holds one tensor only."""
  fill = jax.jit(lambda whole, layer, i: whole.at[i].set(layer), donate_argnums=0)
  shards = []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    layers = range(*index[0].indices(shape[0]))
    with jax.default_device(device):
      whole = jnp.zeros(sharding.shard_shape(shape), dtype)
    for at, number in enumerate(layers):
      layer = jax.device_put(tensor(index[1:], number), device)
      whole = fill(whole, layer, at)
    shards.append(whole)
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read(files: TensorFiles, name: str, stored: Stored, index: tuple[slice, ...], outputs: int) -> np.ndarray:
  """The part `index` of one of our leaves (of one layer): only the bytes between its first and last row are read."""
  if stored.rows is None:
    wanted, pick = index, slice(None)
  else:
    rows = stored.rows.at(np.arange(outputs)[index[-1]])
    wanted, pick = (*index[:-1], slice(int(rows.min()), int(rows.max()) + 1)), rows - rows.min()
    pick = slice(None) if len(pick) == pick.max() + 1 else pick
  values = files.read(name, wanted[::-1] if stored.transposed else wanted)
  return (values.T if stored.transposed else values)[..., pick]


def tensor_shapes(leaves: Mapping, layout: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
  """{Hugging Face's name: shape} of every tensor that these leaves make up."""
  shapes = {}
  for path, leaf in leaves.items():
    stored = layout[path]
    shape = leaf.shape[1:] if stored.stacked else leaf.shape
    shape = shape if stored.rows is None else (*shape[:-1], stored.rows.total)
    shape = shape[::-1] if stored.transposed else shape
    numbers = range(leaf.shape[0]) if stored.stacked else (None,)
    shapes |= {stored.name.format(number): tuple(shape) for number in numbers}
  return shapes


def _check_tensors(leaves: Mapping, files: TensorFiles, family, layout: Mapping, config: ModelConfig) -> dict[str, str]:
  """{the name that the layout gives: the name in the files}. UserError listing what is wrong."""
  expected = tensor_shapes(leaves, layout)
  tied = {layout["head"].name} if config.tied_head else set()
  names, extra = {}, []
  for name in files.where:
    known = next((alias for alias in aliases(name, family) if alias in expected), None)
    if known:
      names[known] = name
    elif not name.endswith(family.IGNORED) and not tied & set(aliases(name, family)):
      extra.append(name)
  problems = [f"{n} is missing" for n in sorted(expected.keys() - names.keys())]
  problems += [f"{n} is not part of this architecture" for n in sorted(extra)]
  for n in sorted(names):
    if files.shape(names[n]) != expected[n]:
      problems.append(f"{names[n]} has shape {files.shape(names[n])}, {expected[n]} is needed")
  if problems:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise UserError(f"{files.folder} does not hold the model that its config.json describes: "
                    f"{'; '.join(problems[:8])}{more}.")
  return names


def aliases(name: str, family) -> list[str]:
  """The names by which the layout may know a tensor: as saved today, without the model's prefix, or with the first
  releases' names of a layer norm's parameters."""
  today = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
  prefixes = family.PREFIX if isinstance(family.PREFIX, tuple) else (family.PREFIX,)
  return [today, *(prefix + today for prefix in prefixes)]
