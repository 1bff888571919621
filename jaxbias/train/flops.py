"""Arithmetic that a train step needs, and what devices can do of it in a second: their ratio is MFU.

Needed is the mathematics of the objective on the tokens that are there: no padding, no recomputation, no second reading
by the start model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxbias.losses.registry import Objective
from jaxbias.models.config import ModelConfig
from jaxbias.types import Batch

# Dense bfloat16 TFLOP/s of one device, by the beginning of its name in JAX, as the makers' data sheets have them.
PEAK = {
  "TPU v3": 61.5, "TPU v4": 275.0, "TPU v5 lite": 197.0, "TPU v5e": 197.0, "TPU v5": 459.0, "TPU v6 lite": 918.0,
  "TPU v6e": 918.0, "NVIDIA A100": 312.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.0, "NVIDIA H100": 989.0,
  "NVIDIA H200 NVL": 835.0, "NVIDIA H200": 989.0,
}  # fmt: skip


def peak_flops(devices: Sequence, tflops: float = 0.0) -> float | None:
  """FLOP/s of all `devices` together; tflops: of one, where the table does not know it. None where nobody said."""
  kind = devices[0].device_kind
  known = [name for name in PEAK if kind.startswith(name)]
  each = tflops or (PEAK[max(known, key=len)] if known else 0.0)
  return each * 1e12 * len(devices) or None


def trained_flops(
  c: ModelConfig, trained: Mapping, *, tokens: float, context: float, scored: float, compared: float,
  remat: bool = False,
) -> float:  # fmt: skip
  """Forward, backward to the inputs, and gradients of what trains; frozen weights have none of their own.

  trained: `TrainState.params`. context: positions that a token attends to, masked or not. The head costs two products
  at a `scored` position and three where distributions are `compared` (losses/logprobs.py), one more where it trains.
  Adapters and losses' own parameters cost 6 a parameter and token, trained weights of the layers 2 beyond what frozen
  ones cost.
  """
  weights = c.flops_per_token - c.head_flops
  scores = 4 * c.num_layers * c.num_heads * c.head_dim * context
  forward = weights + scores
  trunk = forward + weights + 2 * scores + (forward if remat else 0)
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  base = flatten_dict(dict(trained.get("base", {})))
  added = {name: leaves for name, leaves in trained.items() if name != "base"}
  layers = sum(leaf.size for path, leaf in base.items() if path[0] == "layers")
  shared = c.num_layers // c.groups
  head_trains = ("head",) in base or ("embedding",) in base
  head = (2 + head_trains) * scored + (3 + head_trains) * compared
  return float(tokens * (trunk + shared * (6 * size(added) + 2 * layers)) + head * c.head_flops)


def step_flops(c: ModelConfig, rows: Batch, trained: Mapping, objective: Objective, remat: bool) -> float:
  """`trained_flops` of a packed shape, as if all of its positions were taken and rows were one text each."""
  compared = rows.kl_at.size if objective.kl_roles else 0
  return trained_flops(c, trained, tokens=rows.tokens.size, context=rows.tokens.shape[-1], scored=rows.target.size,
                       compared=compared, remat=remat)  # fmt: skip


def needed_flops(c: ModelConfig, batch: Batch, trained: Mapping, objective: Objective) -> float:
  """`trained_flops` of the texts in a batch (numpy), each of which sees itself only."""
  segment = batch.segment.reshape(-1, batch.segment.shape[-1])
  lengths = np.concatenate([np.bincount(row)[1:] for row in segment])
  tokens = int(lengths.sum())
  compared = (batch.kl_segment > 0).sum() if objective.kl_roles else 0
  return trained_flops(c, trained, tokens=tokens, context=float((lengths**2).sum()) / max(tokens, 1),
                       scored=(batch.score_segment > 0).sum(), compared=compared)  # fmt: skip
