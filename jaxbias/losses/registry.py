"""name -> loss, what it needs, its default coefficients; and the weighted sum that a config composes.

A config says `losses = {"npo": {"on": "forget", "weight": 0.5, "beta": 0.1}, "sft": {"on": "retain"}}`. The names
and roles are static (they shape the program); every number is a traced coefficient, so a sweep compiles once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxbias.errors import UserError, did_you_mean
from jaxbias.types import ROLES, Batch, LossOutput, Metric

NEEDS = ("ref_logprob", "ref_distribution", "pairs")


@dataclasses.dataclass(frozen=True)
class Loss:
  name: str
  function: Callable[..., Metric]
  needs: tuple[str, ...]
  on: str  # the role it reads unless the config says otherwise
  coefficients: Mapping[str, float]


LOSSES: dict[str, Loss] = {}


def register_loss(name: str, *, on: str, needs: tuple[str, ...] = (), coefficients: Mapping[str, float] | None = None):
  """Decorator: `function(ctx, on, **coefficients) -> Metric` becomes `name`."""

  def register(function):
    LOSSES[name] = Loss(name, function, needs, on, dict(coefficients or {}))
    return function

  return register


@dataclasses.dataclass(frozen=True)
class LossContext:
  """What a loss may read. Sequence values are [B, S], summed over the scored tokens of a segment, in nats."""

  batch: Batch
  logprob_BP: jax.Array  # of the policy, per scored token
  kl_BK: jax.Array | None = None  # KL(reference || policy) per position, where some loss needs it

  def rows(self, role: str) -> jax.Array:
    """bool [B, S]: the segments that play `role`."""
    return self.batch.role == ROLES.index(role)

  def per_segment(self, values_BP: jax.Array) -> jax.Array:
    """Sum over each segment's scored positions, [B, S]."""
    segments = jnp.arange(1, self.batch.role.shape[1] + 1)
    mine = self.batch.score_segment[:, :, None] == segments
    return jnp.where(mine, values_BP[:, :, None], 0.0).sum(axis=1)

  @property
  def logprob_BS(self) -> jax.Array:
    return self.per_segment(self.logprob_BP)

  @property
  def ref_logprob_BS(self) -> jax.Array:
    return self.per_segment(self.batch.ref_logprob)

  @property
  def tokens_BS(self) -> jax.Array:
    """Scored tokens of each segment, at least 1 so that empty slots divide cleanly."""
    return jnp.maximum(self.per_segment(jnp.ones_like(self.logprob_BP)), 1.0)

  def of_twin(self, values_BS: jax.Array) -> jax.Array:
    """The value of each segment's twin, [B, S]; meaningless where `batch.pair` is -1."""
    return values_BS.reshape(-1)[jnp.maximum(self.batch.pair, 0)]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The static half of a config's `losses`: which losses, on which roles."""

  terms: tuple[tuple[str, str], ...]  # (loss, role)

  @property
  def needs(self) -> frozenset[str]:
    return frozenset(need for name, _ in self.terms for need in LOSSES[name].needs)

  @property
  def roles(self) -> frozenset[str]:
    """Roles that must be in the batch: those that a loss reads, and both halves of a pair."""
    return frozenset(role for _, role in self.terms) | (frozenset(ROLES[:2]) if "pairs" in self.needs else frozenset())

  @property
  def scored_roles(self) -> frozenset[str]:
    """Roles whose target log-probabilities some loss reads; a divergence reads distributions instead."""
    read = {role for name, role in self.terms if "ref_distribution" not in LOSSES[name].needs}
    return frozenset(read | (set(ROLES[:2]) if "pairs" in self.needs else set()))

  @property
  def kl_roles(self) -> frozenset[str]:
    return frozenset(role for name, role in self.terms if "ref_distribution" in LOSSES[name].needs)


def parse(losses: Mapping[str, Mapping]) -> tuple[Objective, dict[str, dict[str, float]]]:
  """The static objective and its coefficients from a config's `losses`.

  Raises UserError for an unknown loss, role or coefficient, with the nearest valid name.
  """
  if not losses:
    raise UserError("`losses` is empty; name at least one, e.g. losses = {'sft': {'on': 'retain'}}.")
  terms, coefficients = [], {}
  for name, settings in losses.items():
    if name not in LOSSES:
      raise UserError(f"there is no loss `{name}`; {did_you_mean(name, LOSSES)}")
    loss = LOSSES[name]
    role = settings.get("on", loss.on)
    if role not in ROLES:
      raise UserError(f"losses.{name}.on = `{role}` is not a role; {did_you_mean(role, ROLES)}")
    values = {"weight": 1.0, **loss.coefficients}
    for key in settings:
      if key != "on" and key not in values:
        raise UserError(f"losses.{name} has no coefficient `{key}`; {did_you_mean(key, ['on', *values])}")
      if key != "on" and not isinstance(settings[key], int | float):
        raise UserError(f"losses.{name}.{key} = {settings[key]!r}; it has to be a number.")
    terms.append((name, role))
    coefficients[name] = {key: float(settings.get(key, default)) for key, default in values.items()}
  return Objective(tuple(terms)), coefficients


def evaluate(objective: Objective, ctx: LossContext, coefficients: Mapping[str, Mapping]) -> LossOutput:
  """sum over terms of weight * mean, and every unweighted mean by name."""
  parts, total = {}, jnp.float32(0.0)
  for name, role in objective.terms:
    settings = dict(coefficients[name])
    weight = settings.pop("weight")
    parts[name] = LOSSES[name].function(ctx, role, **settings)
    total += weight * parts[name].value()
  return LossOutput(total, parts)
