"""The objectives that every comparison needs beside a published method: one data recipe, one to three losses each.

Where a paper has a forget term only, it stands in NPO's place: 0.5 forget + 0.3 retention + 0.2 anchor, as BiasUnlearn
weighs them, so that what is compared is the forget term.
"""

from __future__ import annotations

from jaxbias.methods.recipes import plain
from jaxbias.methods.registry import Method, register

register(Method("sft", "SFT on anti-stereotypes", plain, {"sft": {"on": "retain", "weight": 1.0}}))

register(Method("ga", "gradient ascent on stereotypes", plain, {"ga": {"on": "forget", "weight": 1.0}}))

register(Method("graddiff", "gradient difference", plain, {
  "ga": {"on": "forget", "weight": 0.5},
  "sft": {"on": "retain", "weight": 0.5},
}))  # fmt: skip

register(Method("npo", "NPO + retention + KL", plain, {
  "npo": {"on": "forget", "weight": 0.5, "beta": 0.1},
  "sft": {"on": "retain", "weight": 0.3},
  "kl": {"on": "general", "weight": 0.2},
}))  # fmt: skip

register(Method("dpo", "DPO, anti-stereotype preferred", plain, {
  "dpo": {"on": "retain", "weight": 1.0, "beta": 0.1},
}))  # fmt: skip


def beside(forget: dict[str, dict]) -> dict[str, dict]:
  """A forget term with the retention and the anchor of `npo`."""
  return {**forget, "sft": {"on": "retain", "weight": 0.3}, "kl": {"on": "general", "weight": 0.2}}


register(Method("simnpo", "SimNPO + retention + KL", plain, beside({"simnpo": {"on": "forget", "weight": 0.5}})))

register(Method("unlikelihood", "unlikelihood + retention + KL", plain,
                beside({"unlikelihood": {"on": "forget", "weight": 0.5}})))  # fmt: skip

register(Method("wga", "weighted gradient ascent", plain, beside({"wga": {"on": "forget", "weight": 0.5}})))

register(Method("satimp", "SatImp", plain, beside({"satimp": {"on": "forget", "weight": 0.5}})))

register(Method("undial", "UNDIAL + retention", plain, {
  "undial": {"on": "forget", "weight": 0.5},
  "sft": {"on": "retain", "weight": 0.5},
}))  # fmt: skip

register(Method("rmu", "RMU", plain, {
  "rmu": {"on": "forget", "weight": 0.5},
  "rmu_retain": {"on": "general", "weight": 0.5},
}))  # fmt: skip

register(Method("task_vector", "task vector, negated", plain, {"sft": {"on": "forget", "weight": 1.0}},
                adapter_scale=-1.0))  # fmt: skip

register(Method("ipo", "IPO", plain, {"dpo": {"on": "retain", "weight": 1.0, "form": "ipo", "beta": 0.1}}))

register(Method("simpo", "SimPO", plain, {"simpo": {"on": "retain", "weight": 1.0}}))

register(Method("orpo", "ORPO", plain, {
  "sft": {"on": "retain", "weight": 1.0},
  "orpo": {"on": "retain", "weight": 0.1},
}))  # fmt: skip

register(Method("kto", "KTO", plain, {"kto": {"on": "retain", "weight": 1.0, "beta": 0.1}}))

register(Method("ram", "residual aligner", plain, {"ram": {"on": "retain", "weight": 1.0, "alpha": 1e-4}}))
