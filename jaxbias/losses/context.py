"""What a loss may read of one packed batch, and the means that it may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxbias.models.lora import LowRank
from jaxbias.models.transformer import Head
from jaxbias.types import ROLES, Batch, Metric

# A mean over a text's tokens, then over texts; over all tokens alike; or a sum over a text's tokens, then over texts.
REDUCTIONS = ("seq_mean", "token_mean", "seq_sum")


@dataclasses.dataclass(frozen=True)
class LossContext:
  """What a loss may read. Sequence values are [B, S], summed over the scored tokens of a segment, in nats."""

  batch: Batch
  logprob_BP: jax.Array  # of the policy, per scored token
  kl_hidden_BKD: jax.Array | None = None  # of the policy, at the positions of `batch.ref_hidden`
  hidden_BTD: jax.Array | None = None
  captures: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
  base_captures: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # of the start model
  head: Head | None = None  # of the policy
  ref_head: Head | None = None
  causal: bool = True  # whether the state at t - 1 predicts token t, or that at t
  moved: Mapping[str, jax.Array | LowRank] = dataclasses.field(default_factory=dict)  # by path: trained - start weight
  fisher: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # by the same paths

  def rows(self, role: str) -> jax.Array:
    """bool [B, S]: the segments that play `role`."""
    return self.batch.role == ROLES.index(role)

  def scored(self, role: str) -> jax.Array:
    """bool [B, S]: those of them that have a scored token. A text without one has no part in a mean."""
    return self.rows(role) & (self.count_BS > 0)

  def pairs(self, role: str) -> jax.Array:
    """bool [B, S]: those of them whose twin is there, too, and has a scored token as well."""
    return self.scored(role) & (self.batch.pair >= 0) & (self.of_twin(self.count_BS) > 0)

  def within(self, role: str, segment_BN: jax.Array) -> jax.Array:
    """bool [B, N]: the positions that belong to segments of `role`."""
    mine = jnp.take_along_axis(self.rows(role), jnp.maximum(segment_BN - 1, 0), axis=1)
    return mine & (segment_BN > 0)

  def per_segment(self, values_BP: jax.Array) -> jax.Array:
    """Sum over each segment's scored positions, [B, S]."""
    segments = jnp.arange(1, self.batch.role.shape[1] + 1)
    mine = self.batch.score_segment[:, :, None] == segments
    return jnp.where(mine, values_BP[:, :, None], 0.0).sum(axis=1)

  def over_tokens(self, values_BP: jax.Array, role: str, reduction: str) -> Metric:
    """The mean of a value of each scored token, as one of REDUCTIONS says."""
    if reduction == "token_mean":
      return Metric.over(values_BP, self.within(role, self.batch.score_segment))
    divisor = self.tokens_BS if reduction == "seq_mean" else 1.0
    return Metric.over(self.per_segment(values_BP) / divisor, self.scored(role))

  @property
  def logprob_BS(self) -> jax.Array:
    return self.per_segment(self.logprob_BP)

  @property
  def ref_logprob_BS(self) -> jax.Array:
    return self.per_segment(self.batch.ref_logprob)

  @property
  def log_ratio_BS(self) -> jax.Array:
    """log pi - log pi_ref of each text."""
    return self.logprob_BS - self.ref_logprob_BS

  @property
  def count_BS(self) -> jax.Array:
    """Scored tokens of each segment."""
    return self.per_segment(jnp.ones_like(self.logprob_BP))

  @property
  def tokens_BS(self) -> jax.Array:
    """The same, at least 1 so that empty slots divide cleanly."""
    return jnp.maximum(self.count_BS, 1.0)

  def of_twin(self, values_BS: jax.Array) -> jax.Array:
    """The value of each segment's twin, [B, S]; meaningless where `batch.pair` is -1."""
    return values_BS.reshape(-1)[jnp.maximum(self.batch.pair, 0)]
