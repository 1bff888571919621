"""name -> loss, what it needs, its default coefficients; and the weighted sum that a config composes.

A config says `losses = {"npo": {"on": "forget", "weight": 0.5, "beta": 0.1}, "sft": {"on": "retain"}}`. The names,
roles and options are static (they shape the program); every number is a traced coefficient, so a sweep compiles once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError, did_you_mean
from jaxbias.losses.context import LossContext
from jaxbias.models.config import ModelConfig
from jaxbias.types import ROLES, LossOutput, Metric

NEEDS = (
  "ref_logprob",  # batch.ref_logprob: log-probabilities of the targets under the start model
  "ref_hidden",  # batch.ref_hidden and ctx.kl_hidden_BKD: what both heads read at the positions `batch.kl_at`
  "pairs",  # batch.pair: each row has a twin of the other role
  "hidden",  # ctx.hidden_BTD: what the head reads, at every position
  "stack_out",  # ctx.captures["stack_out"] [B, T, D]: behind the last block, before the final norm or the MLM transform
  "residual_out",  # ctx.captures["residual_out"] [L, B, T, D]: behind every block
  "base_residual_out",  # ctx.base_captures["residual_out"]: the same of the start model, run in the same step
  "no_targets",  # it reads no log-probabilities: nothing of its role has to be scored for it
  "moved",  # ctx.moved: how far each weight of the model is from its start
  "fisher",  # ctx.fisher: the diagonal Fisher information of the same weights
  "groups",  # batch.group, batch.polarity, batch.entity: positives and negatives of one source
)
NO_ROLE = ""  # `on` of a loss that reads weights and no text
SCALES = ("none", "uncertainty", "ema")  # how a term's size is kept in step with the others'; see `_scaled`
LABELS_OF_ALL = ("denominator", "batch_all")  # the option with which a loss counts the targets of both sides
DIVISORS = ("temperature", "rho", "beta")  # coefficients that some loss divides by
EMA_DECAY, EMA_TARGET = 0.9, 0.1


class Found(NamedTuple):
  """What a loss found where a Metric alone does not say it all: its new running statistics, and `notes`, means that
  are logged beside it and trained on by nobody."""

  metric: Metric
  aux: Any = None
  notes: Mapping[str, Metric] = {}


@dataclasses.dataclass(frozen=True)
class Loss:
  """`options` are static choices, {name: what it may be, the default first}, or {name: (default, ANY)} where any string
  will do; `coefficients` are traced numbers.

  `reads`: roles that it needs beside `on`. Option `reference` = none drops the need for "ref_logprob".
  A loss with parameters of its own (a contrast head) or with running statistics has `init_params(key, config)` or
  `init_aux(config, tokenizer, options)`; it is then called with `params=` or `aux=`, and with `aux` it returns
  (Metric, new aux), or a Found.
  `couples`: whether a text's part in it depends on texts of the batch that are neither its twin nor of its group, or at
  which options it does; such a mean is not the sum over parts of a batch.
  """

  name: str
  function: Callable[..., Metric | tuple[Metric, Any] | Found]
  needs: tuple[str, ...]
  on: str  # the role it reads unless the config says otherwise
  reads: tuple[str, ...]
  coefficients: Mapping[str, float]
  options: Mapping[str, tuple[str, ...]]
  init_params: Callable[[jax.Array, ModelConfig], Any] | None
  init_aux: Callable[[ModelConfig, Tokenizer, Mapping[str, str]], Any] | None
  couples: bool | tuple[tuple[str, str], ...] = False


ANY = "..."
LOSSES: dict[str, Loss] = {}


def register_loss(
  name: str,
  *,
  on: str,
  needs: tuple[str, ...] = (),
  reads: tuple[str, ...] = (),
  coefficients: Mapping[str, float] | None = None,
  options: Mapping[str, tuple[str, ...]] | None = None,
  init_params: Callable | None = None,
  init_aux: Callable | None = None,
  couples: bool | tuple[tuple[str, str], ...] = False,
):
  """Decorator: `function(ctx, on, **coefficients, **options) -> Metric` becomes `name`."""
  unknown = set(needs) - set(NEEDS)
  if unknown:
    raise ValueError(f"{name} needs {sorted(unknown)}, which is not one of {NEEDS}")

  def register(function):
    numbers, choices = dict(coefficients or {}), dict(options or {})
    LOSSES[name] = Loss(name, function, needs, on, reads, numbers, choices, init_params, init_aux,
                        couples)  # fmt: skip
    return function

  return register


class Term(NamedTuple):
  """One entry of a config's `losses`: its key there, the loss, the role, and the static options."""

  key: str
  loss: str
  role: str
  options: tuple[tuple[str, str], ...] = ()
  scale: str = SCALES[0]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The static half of a config's `losses`."""

  terms: tuple[Term, ...]

  @property
  def needs(self) -> frozenset[str]:
    return frozenset(need for term in self.terms for need in _needs(term))

  @property
  def roles(self) -> frozenset[str]:
    """Roles that must be in the batch: those that a loss reads, and both sides of a pair or a group."""
    both = frozenset(ROLES[:2]) if "groups" in self.needs else frozenset()
    return frozenset(role for term in self.terms for role in _reads(term)) | both

  @property
  def scored_roles(self) -> frozenset[str]:
    """Roles whose target log-probabilities some loss reads; a divergence reads distributions instead."""
    reading = (term for term in self.terms if not _compares(term) and "no_targets" not in _needs(term))
    both = frozenset(ROLES[:2]) if any(LABELS_OF_ALL in term.options for term in self.terms) else frozenset()
    return frozenset(role for term in reading for role in _reads(term)) | both

  @property
  def kl_roles(self) -> frozenset[str]:
    return frozenset(term.role for term in self.terms if _compares(term))

  def coupled(self) -> str | None:
    """Why a batch cannot be cut into parts whose sums add up to its means, by the first term's key; None if it can."""
    for term in self.terms:
      loss = LOSSES[term.loss]
      at = [pair for pair in term.options if pair in loss.couples] if isinstance(loss.couples, tuple) else []
      if loss.init_aux or term.scale != SCALES[0]:
        return f"losses.{term.key} follows the batch's own statistics"
      if at or loss.couples is True:
        options = f" with {' and '.join(f'{name} = {value}' for name, value in at)}" if at else ""
        return f"losses.{term.key}{options} compares texts across the batch"
    return None

  def init_params(self, key: jax.Array, config: ModelConfig) -> dict[str, Any]:
    """Trainable parameters that belong to losses, by their key in the config; {} where there are none."""
    made = ((i, t.key, LOSSES[t.loss].init_params) for i, t in enumerate(self.terms))
    own = {name: init(jax.random.fold_in(key, i), config) for i, name, init in made if init}
    return own | {_scale_of(t): jnp.float32(0.0) for t in self.terms if t.scale == "uncertainty"}

  def init_aux(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Running statistics of losses, by their key in the config; {} where there are none."""
    made = ((t, LOSSES[t.loss].init_aux) for t in self.terms)
    own = {t.key: init(config, tokenizer, dict(t.options)) for t, init in made if init}
    return own | {_scale_of(t): jnp.full((), jnp.nan) for t in self.terms if t.scale == "ema"}


def _needs(term: Term) -> set[str]:
  return set(LOSSES[term.loss].needs) - ({"ref_logprob"} if ("reference", "none") in term.options else set())


def _reads(term: Term) -> set[str]:
  return {term.role, *LOSSES[term.loss].reads, *(ROLES[:2] if "pairs" in _needs(term) else ())} - {NO_ROLE}


def _compares(term: Term) -> bool:
  return "ref_hidden" in _needs(term)


def parse(losses: Mapping[str, Mapping]) -> tuple[Objective, dict[str, dict[str, float]]]:
  """The static objective and its coefficients from a config's `losses`.

  A loss that appears twice gets a label behind a colon: {"kl": {...}, "kl:retain": {"on": "retain"}}.
  Raises UserError for an unknown loss, role, coefficient or option, with the nearest valid name, and for a coefficient
  of which no loss could be computed.
  """
  if not losses:
    raise UserError("`losses` is empty; name at least one, e.g. losses = {'sft': {'on': 'retain'}}.")
  terms, coefficients = [], {}
  for key, settings in losses.items():
    name = key.split(":")[0]
    if name not in LOSSES:
      raise UserError(f"there is no loss `{name}`; {did_you_mean(name, LOSSES)}")
    loss = LOSSES[name]
    role = settings.get("on", loss.on)
    if loss.on == NO_ROLE and "on" in settings:
      raise UserError(f"losses.{key} has no `on`: it reads weights, not texts.")
    if role not in ROLES and loss.on != NO_ROLE:
      raise UserError(f"losses.{key}.on = `{role}` is not a role; {did_you_mean(role, ROLES)}")
    values = {"weight": 1.0, **loss.coefficients}
    for setting, value in settings.items():
      if setting not in ("on", "scale") and setting not in values and setting not in loss.options:
        known = ["on", "scale", *values, *loss.options]
        raise UserError(f"losses.{key} has no coefficient `{setting}`; {did_you_mean(setting, known)}")
      if setting in values and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise UserError(f"losses.{key}.{setting} = {value!r}; it has to be a number.")
      if setting in values and not (math.isfinite(value) and (value > 0 or setting not in DIVISORS)):
        raise UserError(f"losses.{key}.{setting} = {value!r}; it has to be a finite number"
                        f"{' above 0' if setting in DIVISORS else ''}.")
      choices = SCALES if setting == "scale" else loss.options.get(setting, (ANY,))
      if value not in choices and ANY not in choices:
        raise UserError(f"losses.{key}.{setting} = `{value}` is not known; {did_you_mean(str(value), choices)}")
    options = tuple((option, settings.get(option, choices[0])) for option, choices in loss.options.items())
    terms.append(Term(key, name, role, options, settings.get("scale", SCALES[0])))
    coefficients[key] = {name: float(settings.get(name, default)) for name, default in values.items()}
  objective = Objective(tuple(terms))
  if not objective.roles:
    raise UserError(f"losses has {', '.join(losses)} alone, which read no text; add what is to be learned, e.g. `sft`.")
  return objective, coefficients


def evaluate(
  objective: Objective,
  ctx: LossContext,
  coefficients: Mapping[str, Mapping],
  params: Mapping[str, Any] | None = None,
  aux: Mapping[str, Any] | None = None,
  whole: Mapping[str, jax.Array] | None = None,
) -> LossOutput:
  """sum over terms of weight * mean, every unweighted mean by its key, and the losses' new running statistics.

  whole: where `ctx` is a part of a step's texts, the weight of each term's mean over all of them: the totals of the
  parts then add up to that of the whole.
  """
  parts, notes, total, aux, new_aux = {}, {}, jnp.float32(0.0), aux or {}, dict(aux or {})
  for term in objective.terms:
    settings = dict(coefficients[term.key])
    weight = settings.pop("weight")
    extra = {"params": params[term.key]} if LOSSES[term.loss].init_params else {}
    extra |= {"aux": aux[term.key]} if LOSSES[term.loss].init_aux else {}
    found = LOSSES[term.loss].function(ctx, term.role, **settings, **dict(term.options), **extra)
    found = Found(found) if isinstance(found, Metric) else Found(*found)
    if LOSSES[term.loss].init_aux:
      new_aux[term.key] = found.aux
    parts[term.key] = found.metric
    notes |= {f"{term.key}/{name}": note for name, note in found.notes.items()}
    mean = Metric(found.metric.sum, whole[term.key]) if whole else found.metric
    scaled, new_scale = _scaled(term, mean.value(), (params or {}).get(_scale_of(term)), aux)
    new_aux |= new_scale
    total += weight * scaled
  return LossOutput(total, parts, new_aux, notes)


def _scale_of(term: Term) -> str:
  return f"{term.key} scale"


def _scaled(term: Term, value: jax.Array, log_size: jax.Array | None, aux: Mapping[str, Any]):
  """A term's mean L in its `scale`, and the running statistics of that.

  uncertainty: exp(-u) L + u with a trained u, whose optimum is log L (Kendall et al. 2018, for L > 0); ema: L times
  min(1, EMA_TARGET / m), m the running mean of L (contrastive debiasing's code, where it is commented out).
  """
  if term.scale == "uncertainty":
    return jnp.exp(-log_size) * value + log_size, {}
  if term.scale == "ema":
    old, new = aux[_scale_of(term)], jax.lax.stop_gradient(value)
    mean = jnp.where(jnp.isnan(old), new, EMA_DECAY * old + (1 - EMA_DECAY) * new)
    return value * jnp.minimum(1.0, EMA_TARGET / jnp.maximum(mean, 1e-9)), {_scale_of(term): mean}
  return value, {}
