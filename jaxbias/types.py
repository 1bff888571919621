"""The nouns that every room shares: Batch, Metric, LossOutput, TrainState.

Axis letters, here and in every file that uses them:
  B packed rows, T time, S segments in a packed row, P scored positions in a packed row,
  K positions whose whole distribution is needed, D model, V vocabulary, L layers.

A packed row holds several texts ("segments") side by side. Everything about a position stays in its row,
so a batch shards along B without moving anything; only scalars per segment ever cross rows.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# A segment's role is its index here; -1 is padding. `mismatched`: the prefix of one text, the answer of another.
ROLES = ("forget", "retain", "general", "mismatched")


@flax.struct.dataclass
class Batch:
  """Packed token rows and what to read off them.

  `segment` is 0 at padding and counts from 1 inside a row. A position t with `branch` 0 is seen by every later
  position of its segment; one with branch n only by its own branch (options that share their context).
  `score_at[b, p]` is the position whose hidden state predicts `target[b, p]`, which belongs to segment
  `score_segment[b, p]` (0 = padding). `kl_at` and `kl_segment` name positions in the same way where a loss compares
  whole distributions with the reference; `ref_hidden` is the reference's last hidden state there.
  """

  tokens: jax.Array  # int32 [B, T]
  segment: jax.Array  # int32 [B, T]
  position: jax.Array  # int32 [B, T], restarts in every segment and branch
  score_at: jax.Array  # int32 [B, P]
  target: jax.Array  # int32 [B, P]
  score_segment: jax.Array  # int32 [B, P]
  branch: jax.Array | None = None  # int32 [B, T]
  role: jax.Array | None = None  # int32 [B, S], index into ROLES, -1 = no segment
  row: jax.Array | None = None  # int32 [B, S], number of the text among the step's, -1 = no segment
  pair: jax.Array | None = None  # int32 [B, S], flat index b * S + s of the twin segment, -1 = none
  group: jax.Array | None = None  # int32 [B, S], which source a segment was made from, -1 = none
  polarity: jax.Array | None = None  # int32 [B, S], 1 = positive, 0 = negative, -1 = neither
  kind: jax.Array | None = None  # int32 [B, S], index of the generator that made a segment, -1 = none
  entity: jax.Array | None = None  # bool [B, T], tokens that a pooled representation is made of
  answer: jax.Array | None = None  # bool [B, T], all tokens of the answers in `group`s
  toxicity: jax.Array | None = None  # float32 [B, S], 0 to 1, of a negative; 0 where nobody measured it
  ref_logprob: jax.Array | None = None  # float32 [B, P], nats
  kl_at: jax.Array | None = None  # int32 [B, K]
  kl_segment: jax.Array | None = None  # int32 [B, K]
  kl_target: jax.Array | None = None  # int32 [B, K], the text's own next token there
  ref_hidden: jax.Array | None = None  # float32 [B, K, D]
  label: jax.Array | None = None  # int32 [B, S], class of a text that is classified, -1 = none


@flax.struct.dataclass
class Metric:
  """A mean in two halves. It adds by addition and divides once at the end, so accumulation, packing, several
  hosts and padding rows cannot change it."""

  sum: jax.Array
  weight: jax.Array

  @classmethod
  def over(cls, values: jax.Array, mask: jax.Array) -> Metric:
    """The mean of `values` where `mask` is true; masked values are never read, not even their NaNs."""
    mask = jnp.broadcast_to(mask, values.shape)
    kept = jnp.where(mask, values, 0.0)
    return cls(kept.sum(dtype=jnp.promote_types(kept.dtype, jnp.float32)), mask.sum(dtype=jnp.float32))

  def value(self) -> jax.Array:
    """sum / weight, and 0 where nothing was counted."""
    return self.sum / jnp.maximum(self.weight, 1e-9)

  def __add__(self, other: Metric) -> Metric:
    return Metric(self.sum + other.sum, self.weight + other.weight)


@flax.struct.dataclass
class LossOutput:
  """What a step minimises, the parts it is made of (unweighted means), and what it carries on."""

  total: jax.Array
  parts: dict[str, Metric]
  aux: Any = None  # the running statistics that losses carry from step to step, by the loss's key
  notes: dict[str, Metric] = flax.struct.field(default_factory=dict)  # logged, not trained on: "<loss's key>/<name>"


@flax.struct.dataclass
class TrainState:
  """Everything a step changes. `params` are the trainable leaves only: {"layers": adapters, "base": leaves of the
  base that train, "losses": parameters that belong to a loss}, each where there are any."""

  step: jax.Array  # int32 []
  params: Any
  opt_state: Any
  aux: Any = flax.struct.field(default_factory=dict)  # running statistics of losses, by the loss's key
