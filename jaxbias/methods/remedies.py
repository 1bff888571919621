"""Remedies against forgetting, as changes to any variant: `remedied(methods.variant("sft"), "replay", 0.25)`.

Each has one strength. Comparing remedies at equal strength or equal steps says nothing: one that does not debias
forgets nothing either, so that they are to be tuned to the same bias, along `GRID` for example. The grid is ours,
around what the remedies' own papers use. What every formula is: docs/losses.md.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from jaxbias.errors import UserError, did_you_mean

GRID = {
  "replay": (0.1, 0.25, 0.5, 0.75),  # q, the share of general text
  "ewc": (1e0, 1e1, 1e2, 1e3, 1e4),  # lambda
  "l2sp": (1e-3, 1e-2, 1e-1, 1e0, 1e1),  # lambda
  "distill": (0.1, 1.0, 10.0),  # lambda, at temperature 1 and 2
  "recadam": (5e3,),  # gamma, with kappa 0.1 and its midpoint after a quarter of the steps
  "mixout": (0.3, 0.5, 0.7, 0.9),  # p
  "fusion": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),  # lambda, of the way from the start model
}
PENALTIES = ("ewc", "l2sp", "distill")
REPLAY = "sft:replay"


def remedied(variant: Mapping, remedy: str, strength: float, **settings: float) -> dict:
  """The variant with a remedy of this strength; settings: what else it has, such as temperature= or kappa=.

  At strength 0 it is the variant itself (a fusion of 0 is the start model); at a replay of 1 it reads nothing but
  general text: continued pre-training. Raises UserError for an unknown remedy or a strength that it cannot have.
  """
  if remedy not in GRID:
    raise UserError(f"there is no remedy `{remedy}`; {did_you_mean(remedy, GRID)}")
  if strength < 0 or (remedy in ("replay", "fusion") and strength > 1) or (remedy == "mixout" and strength >= 1):
    raise UserError(f"the remedy `{remedy}` cannot have the strength {strength}; its grid is {GRID[remedy]}.")
  out = copy.deepcopy(dict(variant))
  if remedy == "fusion":
    out["adapter_scale"] = strength * out.get("adapter_scale", 1.0)
  elif strength == 0:
    return out
  elif remedy == "replay":
    out["losses"] = replayed(out["losses"], strength)
  elif remedy in PENALTIES:
    out["losses"] |= {remedy: {"weight": strength, **settings}}
  else:
    key = {"recadam": "recadam_gamma"}.get(remedy, remedy)
    more = {f"{remedy}_{name}": value for name, value in settings.items()}
    out["remedy"] = out.get("remedy", {}) | {key: strength} | more
  return out


def replayed(losses: Mapping[str, Mapping], q: float) -> dict[str, dict]:
  """(1 - q) of the losses and q times cross-entropy on general text."""
  mine = {key: {**each, "weight": (1 - q) * each.get("weight", 1.0)} for key, each in losses.items()} if q < 1 else {}
  return mine | {REPLAY: {"on": "general", "weight": q}}
