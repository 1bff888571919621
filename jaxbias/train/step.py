"""The pure train step: one trunk pass over all roles, the losses that a config composes, one update.

  step(state, frozen, batch, coefficients) -> (state, metrics)      # state donated
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.losses.registry import LossContext, Objective, evaluate
from jaxbias.models import transformer
from jaxbias.models.layers import STACK_OUT
from jaxbias.models.transformer import Head, Transformer
from jaxbias.train.trainable import collections, displacement
from jaxbias.train.transforms import mixed, of_chosen_layers, recall
from jaxbias.types import Batch, LossOutput, TrainState


def loss(
  module: Transformer, objective: Objective, state: TrainState, frozen: Mapping, batch: Batch, coefficients: Mapping,
  rngs: Mapping[str, jax.Array], remedy: Mapping = MappingProxyType({}), whole: Mapping | None = None,
):  # fmt: skip
  """(total, (LossOutput, log-probability per segment [B, S])) of the trained model on one batch, or on a part of one;
  whole: as for `evaluate`."""
  if "mixout" in remedy:
    variables = mixed(rngs["mixout"], state.params, frozen, remedy["mixout"])
  else:
    variables = collections(state.params, frozen)
  capture = tuple(site for site in (STACK_OUT, "residual_out") if site in objective.needs)
  inputs = (batch.tokens, batch.segment, batch.position)
  hidden_BTD, captures = module.apply(variables, *inputs, rngs=rngs, capture=capture)
  head, ref_head = (transformer.head(v["params"], module.config, module.mesh) for v in (variables, frozen))
  logprob_BP = token_logprobs(gather_positions(hidden_BTD, batch.score_at), head, batch.target)
  kl_hidden_BKD = gather_positions(hidden_BTD, batch.kl_at) if objective.kl_roles else None
  batch, base_captures = with_reference(module, objective, frozen, batch, ref_head)
  moved = displacement(state.params, frozen) if "moved" in objective.needs else {}
  ctx = LossContext(batch, logprob_BP, kl_hidden_BKD, hidden_BTD, captures, base_captures, head, ref_head,
                    module.config.causal, moved, frozen.get("fisher", {}))  # fmt: skip
  out = evaluate(objective, ctx, coefficients, state.params.get("losses"), state.aux, whole)
  return out.total, (out, ctx.logprob_BS)


def with_reference(module: Transformer, objective: Objective, frozen: Mapping, batch: Batch, ref_head: Head):
  """The batch with what the start model says about it, and that model's captures.

  What the batch brings from the cache is taken from there; what it lacks is computed by the base, without adapters and
  without a gradient, in the same step.
  """
  capture = ("residual_out",) if "base_residual_out" in objective.needs else ()
  lacks = [name for name in ("ref_logprob", "ref_hidden") if name in objective.needs and getattr(batch, name) is None]
  if not capture and not lacks:
    return batch, {}
  frozen, ref_head = jax.lax.stop_gradient((dict(frozen), ref_head))
  base = {"params": frozen["params"]}
  hidden_BTD, captures = module.apply(base, batch.tokens, batch.segment, batch.position, capture=capture)
  if "ref_logprob" in lacks:
    scored_BPD = gather_positions(hidden_BTD, batch.score_at)
    batch = batch.replace(ref_logprob=token_logprobs(scored_BPD, ref_head, batch.target))
  if "ref_hidden" in lacks:
    batch = batch.replace(ref_hidden=gather_positions(hidden_BTD, batch.kl_at))
  return batch, captures


def in_parts(of: Callable, parts: Batch, weights: Callable):
  """Value and gradient of a whole step whose texts come in parts, stacked along the first axis of `parts`.

  of(part, whole) -> ((total, (LossOutput, log-probability per segment)), gradient). A mean is sum over weight, and the
  weights, which hang on masks alone, are counted first: weights(part) -> {term: weight}, in a pass of which the
  compiler keeps nothing else. Each part's sums are divided by the whole's weights: totals and gradients add up.
  """
  whole = jax.tree.map(lambda x: x.sum(0), jax.lax.map(weights, parts))
  first = jax.tree.map(lambda x: x[0], parts)
  (total, (out, _)), grads = jax.eval_shape(of, first, whole)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, out, grads))

  def add(carry, part: Batch):
    (total, (out, logprob_BS)), grads = of(part, whole)
    return jax.tree.map(jnp.add, carry, (total, out, grads)), logprob_BS

  (total, out, grads), logprob_KBS = jax.lax.scan(add, zeros, parts)
  return (total, (out, logprob_KBS)), grads


def make_train_step(
  module: Transformer, objective: Objective, tx: optax.GradientTransformation, accumulate: int = 1
) -> Callable:
  """The jitted step. `coefficients` = {"learning_rate": ..., "losses": {...}} are traced: changing one never
  recompiles. With LoRA dropout they hold its `dropout_key`, too, which is folded with the step; with remedies
  {"remedy": ...} of `transforms.coefficients`, and for mixout its `mixout_key`.
  A step whose loss or gradient is not finite changes nothing and says so in its metrics.

  accumulate: parts that the texts of a step come in, computed one after the other; the batch has them as its first
  axis. For objectives that are not `coupled` it is the same step."""

  def step(state: TrainState, frozen: Mapping, batch: Batch, coefficients: Mapping):
    remedy = coefficients.get("remedy", {})
    streams = [name for name, on in {"dropout": module.lora_dropout, "mixout": "mixout" in remedy}.items() if on]
    rngs = {name: jax.random.fold_in(coefficients[f"{name}_key"], state.step) for name in streams}

    def of(params, part: Batch, whole: Mapping | None = None):
      own = {name: jax.random.fold_in(key, part.row.max()) if whole and name == "dropout" else key
             for name, key in rngs.items()}  # fmt: skip
      return loss(module, objective, state.replace(params=params), frozen, part, coefficients["losses"], own, remedy,
                  whole)  # fmt: skip

    value_and_grad = functools.partial(jax.value_and_grad(of, has_aux=True), state.params)
    if accumulate == 1:
      (total, (out, logprob_BS)), grads = value_and_grad(batch)
    else:
      weights = lambda part: {key: mean.weight for key, mean in of(state.params, part)[1][0].parts.items()}
      (total, (out, logprob_BS)), grads = in_parts(value_and_grad, batch, weights)
    if "layers" in remedy:  # before clipping, which would count them otherwise
      grads = of_chosen_layers(grads, remedy["layers"])
    annealed = {"recall": recall(state.step, state.params, frozen, remedy["recadam"])} if "recadam" in remedy else {}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **annealed)
    if "layers" in remedy:  # after weight decay
      updates = of_chosen_layers(updates, remedy["layers"])
    updates = jax.tree.map(lambda u: -coefficients["learning_rate"] * u, updates)
    moved = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, out.aux)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    return state, metrics(out, norm, finite, logprob_BS)

  return jax.jit(step, donate_argnums=0)


def metrics(out: LossOutput, norm: jax.Array, finite: jax.Array, logprob_BS: jax.Array) -> dict:
  """What the host reads, one step late. `logprob` finds the rows behind a loss that is not finite."""
  parts = {name: part.value() for name, part in out.parts.items()}
  notes = {name: note.value() for name, note in out.notes.items()}
  return {"loss": out.total, "parts": parts, "notes": notes, "gradient_norm": norm, "finite": finite,
          "logprob": logprob_BS}  # fmt: skip
