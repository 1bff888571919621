from __future__ import annotations

import copy

import pytest

from tests.report import METRICS, curve, row


@pytest.fixture
def results():
  return {
    "schema": 1,
    "title": "Three objectives",
    "model": {"source": "tiny", "fingerprint": "f" * 64, "parameters": 134515008, "trainable": 2442240},
    "data": {"name": "builtin", "fingerprint": "d" * 64, "counts": {"test": {"triples": 144, "terms": 24}}},
    "config_hash": "a1b2c3d4e5f6",
    "command": "python -m jaxbias compare --config=configs/quickstart.py",
    "created": "2026-11-22T05:00:00Z",
    "versions": {"jax": "0.10.2"},
    "git": {"commit": "abc1234", "dirty": True},
    "hardware": "2 CPU cores",
    "seeds": [0, 1],
    "steps": 40,
    "wall_seconds": 433.1,
    "interval": "95 % bootstrap over target terms, 2000 draws",
    "metrics": copy.deepcopy(METRICS),
    "rows": [
      row("sft", "SFT", 54.04, 88.2, 0.0514, 0.05, -0.1),
      row("base", "base model", 61.21, 87.5, 0.0, 0.0, 0.0),
      row("ga", "gradient ascent", 49.96, 70.0, 2.5, 3.2, 0.4),
      row("npo", "NPO", 50.04, 86.0, -0.0004, 0.6, 0.3),
    ],
    "curves": {"sft": {"0": curve(), "1": curve(0.5)}, "npo": {"0": curve()}},
  }
