"""The device mesh, and the rules that turn the logical axes of an array into its sharding.

Axes: `data` (batch only), `fsdp` (batch and parameters), `tensor` (heads, mlp, vocabulary). One table of rules serves
every mesh, as an axis of size 1 cuts nothing; so a preset is no more than a choice of sizes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbias.config import MESH_AXES as AXES
from jaxbias.config import SHARDING_RULES
from jaxbias.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))

log = logging.getLogger("jaxbias")


def make_mesh(sizes: Mapping[str, int | str], among: Sequence | None = None) -> Mesh:
  """A mesh over all devices, or over those in `among`.

  sizes: of `data`, `fsdp` and `tensor`, of which one may be -1 (what is left), and a `preset` that fills in those
  that are 0 or absent. Raises UserError when they do not multiply up.
  """
  devices, preset = len(among or jax.devices()), sizes.get("preset", "data")
  shape = {axis: int(sizes.get(axis, 0)) for axis in AXES}
  rest = "data" if preset == "data" else "fsdp"
  if preset == "fsdp_tensor":
    shape["tensor"] = shape["tensor"] or _square(devices)
  if -1 not in shape.values():
    shape[rest] = shape[rest] or -1
  shape = {axis: size or 1 for axis, size in shape.items()}
  known = math.prod(size for size in shape.values() if size != -1)
  left = list(shape.values()).count(-1)
  if left > 1 or known < 1 or devices % known or (left == 0 and known != devices):
    raise UserError(f"mesh {shape} does not multiply up to {devices} device(s).")
  sizes = [devices // known if size == -1 else size for size in shape.values()]
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=among)


def _square(devices: int) -> int:
  """The largest power of two that divides `devices` and is not above its square root."""
  return max(2**k for k in range(devices.bit_length()) if devices % 2**k == 0 and 4**k <= devices)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of one model lie. `rules`: logical axis -> mesh axis ("" for none); `units`: into how many parts
  that must stay in one piece a logical axis falls, where its size is a multiple of that: {"heads": number of heads}."""

  mesh: Mesh
  rules: Mapping[str, str] = dataclasses.field(default_factory=lambda: SHARDING_RULES)
  units: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def shardings(self, abstract, logical):
    """NamedSharding for every leaf; `logical` is a tree of PartitionSpecs of logical names with the same structure."""
    sharding = lambda names, leaf: NamedSharding(
      self.mesh, PartitionSpec(*(self._axis(name, size) for name, size in _axes(names, leaf)))
    )
    return jax.tree.map(sharding, logical, abstract, is_leaf=_is_spec)

  def report(self, abstract, logical) -> None:
    """Log in one line what stays whole because it does not divide. Nothing is logged where everything divides."""
    found: dict[str, list[str]] = {}

    def visit(path, names, leaf):
      for name, size in _axes(names, leaf):
        axis = self._rule(name)
        if axis and not self._axis(name, size):
          why = f"{name} ({self.units.get(name, size)} over {axis}={self.mesh.shape[axis]})"
          found.setdefault(why, []).append(jax.tree_util.keystr(path, simple=True, separator="/"))

    jax.tree_util.tree_map_with_path(visit, logical, abstract, is_leaf=_is_spec)
    if found:
      listed = lambda paths: paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
      said = "; ".join(f"{why} of {listed(paths)}" for why, paths in found.items())
      log.warning("what does not divide over the mesh is replicated: %s.", said)

  def _rule(self, name: str | None) -> str | None:
    return (self.rules[name] or None) if name else None

  def _axis(self, name: str | None, size: int) -> str | None:
    axis = self._rule(name)
    return axis if axis and self.units.get(name, size) % self.mesh.shape[axis] == 0 else None


def _is_spec(x) -> bool:
  return isinstance(x, PartitionSpec)


def _axes(names: PartitionSpec, leaf) -> list[tuple[str | None, int]]:
  names = tuple(names) + (None,) * (len(leaf.shape) - len(names))
  return list(zip(names, leaf.shape, strict=True))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, parts: int = 1) -> NamedSharding:
  """Packed rows over every device that holds its own rows; whatever follows the first axis is whole. Of `parts` of a
  batch that are stacked, the second."""
  return NamedSharding(mesh, PartitionSpec(None, *BATCH) if parts > 1 else BATCH)


def batch_shards(mesh: Mesh) -> int:
  """How many parts a batch is cut into: the number of packed rows must be a multiple of it."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def by_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """`x` [B, ...] held where the rows of its batch are, as far as they divide. Said once a layer, it makes the compiler
  bring the weights of the layer to the rows; left alone, it may gather the rows of all devices instead."""
  if mesh is None or mesh.size == 1 or x.shape[0] % batch_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def gathered(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """`x` [N, D] with D whole and N cut as it was."""
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, None)))
