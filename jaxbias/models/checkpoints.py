"""Hugging Face folders in: safetensors streamed tensor by tensor into (sharded) stacked parameters.

Never unpickles. Each device's shard is filled by reading just the layers and slices that it holds, so host memory
carries one shard at a time beside what is already on the devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxbias.errors import UserError
from jaxbias.models.config import ModelConfig
from jaxbias.models.families import family_of


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
    self.where = {}
    for file in files:
      handle = self._open(folder / file)
      self.where.update(dict.fromkeys(handle.keys(), handle))

  @staticmethod
  def _open(path: Path):
    if not path.exists():
      raise UserError(f"{path} is missing; fetch the model again, or point at a folder with safetensors weights.")
    try:
      return safe_open(path, framework="numpy")
    except SafetensorError as error:
      raise UserError(f"{path} cannot be read ({_cut_short(path) or error}). Delete it and fetch it anew.") from None

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self.where[name].get_slice(name).get_shape())

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one tensor; only its bytes are read from disk."""
    return self.where[name].get_slice(name)[index] if index else self.where[name].get_tensor(name)


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

  Raises UserError listing every tensor that is missing, extra or misshapen.
  """
  family = family_of(read_config(folder))
  files = TensorFiles(folder)
  leaves = {"/".join(path): leaf for path, leaf in flatten_dict(dict(abstract)).items()}
  where = {"/".join(path): sharding for path, sharding in flatten_dict(dict(shardings)).items()}
  _check_tensors(leaves, files, family, config)

  def leaf(path: str) -> jax.Array:
    name, shape = family.NAMES[path], leaves[path].shape

    def shard(index: tuple[slice, ...]) -> np.ndarray:
      if "{}" not in name:
        return files.read(name, index).astype(dtype, copy=False)
      layers = range(*index[0].indices(config.num_layers))
      inner = [range(*s.indices(n)) for s, n in zip(index[1:], shape[1:], strict=True)]
      out = np.empty((len(layers), *map(len, inner)), dtype)
      for i, layer in enumerate(layers):
        out[i] = _theirs_to_ours(files.read(name.format(layer), _ours_to_theirs(index[1:])))
      return out

    return jax.make_array_from_callback(shape, where[path], shard)

  return unflatten_dict({tuple(path.split("/")): leaf(path) for path in leaves})


def _theirs_to_ours(tensor: np.ndarray) -> np.ndarray:
  """Hugging Face stores linear weights [out, in]; ours are [in, out]. Vectors stay."""
  return tensor.T if tensor.ndim == 2 else tensor


def _ours_to_theirs(index: tuple[slice, ...]) -> tuple[slice, ...]:
  return index[::-1] if len(index) == 2 else index


def _check_tensors(leaves: Mapping, files: TensorFiles, family, config: ModelConfig) -> None:
  expected = {}
  for path, leaf in leaves.items():
    name = family.NAMES[path]
    if "{}" in name:
      expected.update({name.format(i): leaf.shape[1:][::-1] for i in range(config.num_layers)})
    else:
      expected[name] = leaf.shape
  optional = {family.NAMES["head"]} if config.tied_head else set()
  present = {n for n in files.where if not n.endswith(family.IGNORED_TENSORS)} - optional
  problems = [f"{n} is missing" for n in sorted(set(expected) - present)]
  problems += [f"{n} is not part of this architecture" for n in sorted(present - set(expected))]
  for n in sorted(present & set(expected)):
    if files.shape(n) != tuple(expected[n]):
      problems.append(f"{n} has shape {files.shape(n)}, {tuple(expected[n])} is needed")
  if problems:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise UserError(f"{files.folder} does not hold the model that its config.json describes: "
                    f"{'; '.join(problems[:8])}{more}.")
