"""The optimizer of a run: AdamW on the trainable leaves, warm-up and decay, clipping."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import jax
import optax

from jaxbias.errors import UserError
from jaxbias.train.transforms import recalling


def schedule(name: str, steps: float, warmup_steps: float) -> optax.Schedule:
  """The learning rate as a share of its peak: linear warm-up, then constant, linear or cosine down to 0.

  The first step already moves, except in `from_zero`: `linear`, with the rate 0 at the first step, as the published
  trainers that use Hugging Face's linear schedule have it.
  """
  decay_steps = max(steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(1.0),
    "linear": optax.linear_schedule(1.0, 0.0, decay_steps),
    "from_zero": optax.linear_schedule(1.0, 0.0, decay_steps),
    "cosine": optax.cosine_decay_schedule(1.0, decay_steps),
  }[name]
  ahead = name != "from_zero"
  warmup = lambda count: (count + ahead) / (warmup_steps + ahead)
  return optax.join_schedules([warmup, after], [warmup_steps])


def rule_of(path: tuple, rules: Sequence[tuple[str, Mapping]]) -> Mapping:
  """The first rule whose pattern, such as `layers/*/b`, matches a trained leaf. UserError where none does."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  for pattern, rule in rules:
    if fnmatch.fnmatchcase(name, pattern):
      return rule
  raise UserError(f"no rule of train.rules covers the parameter {name}; end them with ('*', {{}}) for what is left.")


def by_path(rules: Sequence[tuple[str, Mapping]], weight_decay: float) -> optax.GradientTransformation:
  """Adds weight decay, and multiplies the rate, leaf by leaf as the rules say; without rules all leaves alike."""
  rules = rules or (("*", {}),)

  def update(updates, state, params=None):
    def one(path: tuple, u: jax.Array, p: jax.Array) -> jax.Array:
      rule = rule_of(path, rules)
      return rule.get("learning_rate", 1.0) * (u + rule.get("weight_decay", weight_decay) * p)

    return jax.tree_util.tree_map_with_path(one, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(train, steps: float = 0, warmup_steps: float = 0) -> optax.GradientTransformation:
  """`train` is the config's section; `steps` and `warmup_steps` are of a phase that brings its own schedule, which is
  `from_zero`. The peak learning rate is applied in the step, as a traced coefficient."""
  chosen = ("from_zero", steps, warmup_steps) if steps else (train.schedule, train.steps, train.warmup_steps)
  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    recalling(optax.scale_by_adam()),
    by_path(tuple(train.rules), train.weight_decay),
    optax.scale_by_schedule(schedule(*chosen)),
  )
