"""How the next token is chosen: repetition penalty, temperature, top-k, top-p; each row has a random stream of its own.

Axis letters: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.errors import UserError

SIGN = np.uint32(1 << 31)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a text goes on: repetition penalty, temperature, top-k, top-p, in this order, as Hugging Face does it.

  temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 change nothing. A text ends before the first of
  `stop` that it completes, at an end-of-text token of the model, or after max_tokens.
  Raises UserError for a setting out of range.
  """

  max_tokens: int = 64
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0  # of tokens in the prompt or written already: Keskar et al. 2019, section 4.1
  stop: tuple[str, ...] = ()
  seed: int = 0

  def __post_init__(self):
    for name, fine, range_ in (
      ("max_tokens", self.max_tokens >= 1, "at least 1"),
      ("temperature", 0 <= self.temperature < np.inf, "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
      ("stop", not isinstance(self.stop, str) and all(self.stop), "strings that are not empty"),
      ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
    ):
      if not fine:
        raise UserError(f"sampling.{name} is {getattr(self, name)!r}; it has to be {range_}.")


@flax.struct.dataclass
class Rules:
  """`Sampling` of every row, and the number of its random stream; all [B]. Traced: other settings, same program."""

  temperature: jax.Array  # float32
  top_k: jax.Array  # int32
  top_p: jax.Array  # float32
  penalty: jax.Array  # float32
  limit: jax.Array  # int32: max_tokens, 0 in a row that is padding
  seed: jax.Array  # uint32
  number: jax.Array  # uint32


def choose(logits_BV: jax.Array, seen_BV: jax.Array, rules: Rules, step: jax.Array) -> jax.Array:
  """The next token of every row, int32 [B]. `step`: tokens written before it."""
  penalty = rules.penalty[:, None]
  penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  score_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
  likeliest_B = jnp.argmax(score_BV, axis=-1).astype(jnp.int32)
  sampled_B = rules.temperature > 0

  def draw() -> jax.Array:
    warm_BV = score_BV / jnp.where(sampled_B, rules.temperature, 1.0)[:, None]
    kept_BV = jnp.where(likely(warm_BV, rules.top_k, rules.top_p), warm_BV, -jnp.inf)
    stream = lambda seed, number: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
    noise = lambda seed, number: jax.random.gumbel(stream(seed, number), logits_BV.shape[1:])
    # Noise belongs to tokens: rounding elsewhere in the row does not move a draw, as it would a cumulative sum.
    return jnp.argmax(kept_BV + jax.vmap(noise)(rules.seed, rules.number), axis=-1).astype(jnp.int32)

  return jnp.where(sampled_B, jax.lax.cond(sampled_B.any(), draw, lambda: likeliest_B), likeliest_B)


def likely(score_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
  """bool [B, V]: the k highest scores, and of those the fewest whose probability reaches p (Holtzman et al. 2020).

  Tokens tied with the last one kept are kept. k 0 and p 1 keep everything.
  """
  rank_BV = _ordered(score_BV)
  everything = jnp.ones(score_BV.shape, bool)

  def highest() -> jax.Array:
    k_B = jnp.where(top_k_B > 0, top_k_B, score_BV.shape[-1])
    return _least(rank_BV, lambda mask: mask.sum(-1) >= k_B)

  kept_BV = jax.lax.cond((top_k_B > 0).any(), highest, lambda: everything)

  def nucleus() -> jax.Array:
    p_BV = jax.nn.softmax(jnp.where(kept_BV, score_BV, -jnp.inf))
    needed_B = jnp.where(top_p_B < 1, top_p_B, jnp.inf)
    return _least(rank_BV, lambda mask: jnp.where(mask, p_BV, 0).sum(-1) >= needed_B)

  return kept_BV & jax.lax.cond((top_p_B < 1).any(), nucleus, lambda: everything)


def _ordered(x: jax.Array) -> jax.Array:
  """float32 as uint32 in the same order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits & SIGN, ~bits, bits | SIGN)


def _least(rank_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The smallest mask `rank >= threshold` that is `enough` [B], or everything: thirty-two passes and no sort."""

  def bit(i, threshold_B):
    higher_B = threshold_B | (SIGN >> i.astype(jnp.uint32))
    return jnp.where(enough(rank_BV >= higher_B[:, None]), higher_B, threshold_B)

  start = jnp.zeros_like(rank_BV[:, 0])
  return rank_BV >= jax.lax.fori_loop(0, 32, bit, start)[:, None]
