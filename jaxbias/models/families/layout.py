"""How our parameters lie in a checkpoint: one `Stored` for each leaf, from which loading and saving both follow."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
  """One leaf of ours in Hugging Face's files.

  `name`: the tensor, {} standing for the layer. `transposed`: linear weights are [out, in] there, [in, out] here.
  `rows`: which entries of the tensor's output axis are this leaf's, where several projections share one tensor.
  """

  name: str
  transposed: bool = False
  rows: Rows | None = None

  @property
  def stacked(self) -> bool:
    return "{}" in self.name


@dataclasses.dataclass(frozen=True)
class Rows:
  """Part `part` of a fused axis: parts of `sizes` one after the other, or interleaved within each of `groups`."""

  part: int
  sizes: tuple[int, ...]
  groups: int = 1

  @property
  def total(self) -> int:
    return sum(self.sizes)

  def at(self, ours: np.ndarray) -> np.ndarray:
    """Where our entries `ours` of the output axis lie in the fused one."""
    per_group, size = self.total // self.groups, self.sizes[self.part] // self.groups
    start = sum(self.sizes[: self.part]) // self.groups
    return ours // size * per_group + start + ours % size


def linear(ours: str, theirs: str, bias: bool = False, rows: Rows | None = None, transposed: bool = True):
  """The leaves of one projection."""
  leaves = {f"{ours}/kernel": Stored(f"{theirs}.weight", transposed, rows)}
  return leaves | ({f"{ours}/bias": Stored(f"{theirs}.bias", rows=rows)} if bias else {})


def norm(ours: str, theirs: str, bias: bool = False):
  """The leaves of one norm."""
  leaves = {f"{ours}/scale": Stored(f"{theirs}.weight")}
  return leaves | ({f"{ours}/bias": Stored(f"{theirs}.bias")} if bias else {})
