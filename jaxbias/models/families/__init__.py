"""One small module a family: which architectures it reads, its config quirks, its checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from jaxbias.errors import UserError
from jaxbias.models.config import ModelConfig
from jaxbias.models.families import bert, gemma, gpt2, gpt_neox, llama, opt
from jaxbias.models.keys import Keys

FAMILIES = (llama, gemma, gpt2, gpt_neox, opt, bert)


def family_of(hf_config: Mapping) -> ModuleType:
  """The family module for a config.json. Raises UserError that names what is supported."""
  named = (hf_config.get("architectures") or ["(none)"])[0]
  for family in FAMILIES:
    if named in family.ARCHITECTURES:
      return family
  supported = ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES)
  raise UserError(f"config.json names the architecture {named}, which is not supported; supported: {supported}.")


def model_config(hf_config: Mapping) -> ModelConfig:
  """ModelConfig from a config.json, today's layout or the older one.

  Raises UserError for an architecture that is not supported, a size that is missing, and for every key that would
  change the result and is not honoured.
  """
  family, keys = family_of(hf_config), Keys(hf_config)
  config = family.model_config(keys, hf_config["architectures"][0])
  keys.finish()
  return config
