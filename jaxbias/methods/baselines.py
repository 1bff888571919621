"""The objectives that every comparison needs beside a published method: one data recipe, one to three losses each."""

from __future__ import annotations

from jaxbias.methods.recipes import plain
from jaxbias.methods.registry import Method, register

register(Method("sft", "SFT on anti-stereotypes", plain, {"sft": {"on": "retain", "weight": 1.0}}))

register(Method("ga", "gradient ascent on stereotypes", plain, {"ga": {"on": "forget", "weight": 1.0}}))

register(Method("npo", "NPO + retention + KL", plain, {
  "npo": {"on": "forget", "weight": 0.5, "beta": 0.1},
  "sft": {"on": "retain", "weight": 0.3},
  "kl": {"on": "general", "weight": 0.2},
}))  # fmt: skip

register(Method("dpo", "DPO, anti-stereotype preferred", plain, {
  "dpo": {"on": "retain", "weight": 1.0, "beta": 0.1},
}))  # fmt: skip
