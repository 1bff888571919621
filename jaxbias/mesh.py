"""The device mesh and the rules that turn logical axes into shardings.

Axes: `data` (batch only), `fsdp` (batch and parameters), `tensor` (heads, mlp, vocabulary).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbias.errors import UserError

AXES = ("data", "fsdp", "tensor")
RULES = {  # logical axis of a parameter -> mesh axis
  "layers": None, "embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
}  # fmt: skip
BATCH = PartitionSpec(("data", "fsdp"))

log = logging.getLogger("jaxbias")


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
  """A mesh over all devices; one size may be -1 (what is left). Raises UserError when they do not multiply up."""
  devices = jax.device_count()
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  known = int(np.prod([s for s in shape if s != -1]))
  if shape.count(-1) > 1 or known < 1 or devices % known or (-1 not in shape and known != devices):
    raise UserError(f"mesh {dict(zip(AXES, shape, strict=True))} does not multiply up to {devices} device(s).")
  shape = [devices // known if s == -1 else s for s in shape]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(shape: tuple[int, ...], logical: tuple[str | None, ...], mesh: Mesh, what: str = "") -> PartitionSpec:
  """The mesh axes of one array; an axis that does not divide falls back to replication, and is logged."""
  out = []
  for size, name in zip(shape, logical, strict=True):
    axis = RULES[name] if name else None
    if axis and size % mesh.shape[axis]:
      log.warning("%s: axis %s of size %d does not divide over %s=%d; it is replicated.",
                  what, name, size, axis, mesh.shape[axis])  # fmt: skip
      axis = None
    out.append(axis)
  return PartitionSpec(*out)


def param_shardings(abstract, logical, mesh: Mesh):
  """NamedSharding for every leaf; `logical` is a tree of PartitionSpecs of logical names with the same structure."""

  def sharding(path, leaf, names):
    names = tuple(names) + (None,) * (len(leaf.shape) - len(names))
    what = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, spec_for(leaf.shape, names, mesh, what))

  is_spec = lambda x: isinstance(x, PartitionSpec)
  return jax.tree_util.tree_map_with_path(
    lambda path, names, leaf: sharding(path, leaf, names), logical, abstract, is_leaf=is_spec
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Packed rows over every device that holds its own rows; whatever follows the first axis is whole."""
  return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
  """How many parts a batch is cut into: the number of packed rows must be a multiple of it."""
  return mesh.shape["data"] * mesh.shape["fsdp"]
