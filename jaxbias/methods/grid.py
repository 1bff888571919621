"""The grid of a diagnosis: its settings, and the variants that it expands into. `jaxbias/diagnose.py` runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxbias.methods.registry import variant
from jaxbias.methods.remedies import GRID, remedied

REMEDIES = (*GRID, "learning_rate")


def settings() -> dict[str, Any]:
  """The defaults of `config.diagnose`, which a config of a diagnosis adds."""
  return {
    "planted": False,  # write the planted language, fit its tiny model, and diagnose that
    "pretrain": {"steps": 600, "learning_rate": 3e-3, "rows": 64},  # of the planted language's model
    "objectives": ("two_sided", "one_sided", "unswapped", "random"),
    "sizes": (100, 300, 1000, 3000),  # source texts
    "remedies": {},  # name -> {"remedy": one of methods.remedies.GRID, or "learning_rate", "strength": ...}
    "remedy_objectives": ("two_sided",),
    "remedy_sizes": (1000,),
    "columns": {},  # measured at a run's end: name -> {"benchmark", "data", "metric", "group", "limit"}
    "performance": "downstream",  # the column of claim 1
    "bias": "b",  # the column of claims 3 and 4: |SS - 50|; gap_size: |log p(st) - log p(anti)| of what differs
    "level": 5.0,  # of bias, at which remedies are compared
    "target": 5.0,  # of bias, that is enough data
    "delta": 0.05,  # of f_sel, nats a token, above which stereotypes count as forgotten
    "margins": {"f_all": 0.05, "downstream": 2.0},  # within which two remedies are equivalent
    "draws": 2000,
  }  # fmt: skip


def variants(chosen: Any) -> Iterator[tuple[str, dict]]:
  """(name, variant): every objective and size without a remedy, then the remedies at their sizes."""
  for objective in chosen.objectives:
    for n in chosen.sizes:
      cell = {"objective": objective, "remedy": "none", "n": n}
      plain = variant("cda") | {"texts": {"corpus": objective, "n": n}, "cell": cell}
      yield f"{objective}-n{n}", plain | {"label": f"{objective}, n = {n:,}"}
      if objective in chosen.remedy_objectives and n in chosen.remedy_sizes:
        for name, how in chosen.remedies.items():
          spec = with_remedy(plain, how["remedy"], how["strength"])
          spec |= {"label": f"{objective}, n = {n:,}, {name}", "cell": cell | {"remedy": name}}
          yield f"{objective}-n{n}-{name}", spec


def with_remedy(plain: Mapping, remedy: str, strength: float) -> dict:
  """`remedied`, or at a share of the learning rate, which needs nothing else."""
  if remedy == "learning_rate":
    return {**plain, "learning_rate_scale": plain["learning_rate_scale"] * strength}
  return remedied(plain, remedy, strength)
