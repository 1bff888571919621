"""The optimizer of a run: AdamW on the trainable leaves, warm-up and decay, clipping."""

from __future__ import annotations

import optax


def schedule(name: str, steps: int, warmup_steps: int) -> optax.Schedule:
  """The learning rate as a share of its peak: linear warm-up, then constant, linear or cosine down to 0."""
  decay_steps = max(steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(1.0),
    "linear": optax.linear_schedule(1.0, 0.0, decay_steps),
    "cosine": optax.cosine_decay_schedule(1.0, decay_steps),
  }[name]
  warmup = lambda count: (count + 1) / (warmup_steps + 1)  # the first step already moves
  return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(train, steps: int = 0, warmup_steps: int = 0) -> optax.GradientTransformation:
  """`train` is the config's section; `steps` and `warmup_steps` replace its own where a phase has its own schedule.
  The peak learning rate is applied in the step, as a traced coefficient."""
  steps, warmup_steps = (steps, warmup_steps) if steps else (train.steps, train.warmup_steps)
  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    optax.scale_by_adam(),
    optax.add_decayed_weights(train.weight_decay),
    optax.scale_by_schedule(schedule(train.schedule, steps, warmup_steps)),
  )
