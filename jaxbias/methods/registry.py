"""name -> method. A method is a data recipe and the losses that it composes; a config may change every number."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxbias.data.rows import Split
from jaxbias.errors import UserError, did_you_mean
from jaxbias.methods.recipes import Recipe, with_roles


@dataclasses.dataclass(frozen=True)
class Method:
  name: str
  label: str
  recipe: Callable[[Split, int], Recipe]  # (training split, seed) -> texts by role
  losses: Mapping[str, Mapping]
  adapter_scale: float = 1.0  # the evaluated model is base + adapter_scale * (what was trained)


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
  METHODS[method.name] = method


def get(name: str) -> Method:
  if name not in METHODS:
    raise UserError(f"there is no method `{name}`; {did_you_mean(name, METHODS)}")
  return METHODS[name]


def recipe(name: str, settings: Mapping[str, Any]) -> Callable[[Split, int], Recipe]:
  """A method's recipe with a variant's `texts`, and the texts that `data.roles` puts in their place.

  Raises UserError for a setting that the method does not have.
  """
  made = get(name).recipe
  known = list(inspect.signature(made).parameters)[2:]
  for setting in settings:
    if setting not in known:
      what = did_you_mean(setting, known) if known else "leave `texts` out."
      raise UserError(f"the texts of the method `{name}` have no setting `{setting}`; {what}")
  return lambda split, seed: with_roles(made(split, seed, **settings), split, seed)


def variant(name: str) -> dict:
  """A method's entry for `config.variants`: its name, label, losses, share of the peak learning rate, and the factor of
  its adapters when it is evaluated, all open to overrides. Objectives differ in how fast they move a model by more than
  one rate can serve; between 0 and 1 the factor interpolates between base and trained model."""
  method = get(name)
  return {"method": name, "label": method.label, "losses": copy.deepcopy(dict(method.losses)),
          "learning_rate_scale": 1.0, "adapter_scale": method.adapter_scale}  # fmt: skip
