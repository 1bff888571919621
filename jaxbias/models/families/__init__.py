"""One small module a family: which architectures it reads, its config quirks, its checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from jaxbias.errors import UserError
from jaxbias.models.families import llama

FAMILIES = (llama,)


def family_of(hf_config: Mapping) -> ModuleType:
  """The family module for a config.json. Raises UserError that names what is supported."""
  named = (hf_config.get("architectures") or ["(none)"])[0]
  for family in FAMILIES:
    if named in family.ARCHITECTURES:
      return family
  supported = ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES)
  raise UserError(f"config.json names the architecture {named}, which is not supported; supported: {supported}.")
