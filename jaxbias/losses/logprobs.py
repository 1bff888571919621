"""The only place that touches the vocabulary: log-probabilities and divergences at chosen positions, in chunks.

No [B, T, V] array exists in either direction. A chunk's logits live only while the chunk is worked on, and the
derivative with respect to the hidden state is taken at the same time, from the same logits: D numbers a position are
kept for the backward pass instead of V, and nothing is recomputed. Chunks run along the positions of a row and never
cut the batch axis, which may be sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbias.models.transformer import Head

CHUNK = 512  # positions whose logits exist at one time on a device


def gather_positions(x_BTD: jax.Array, at_BP: jax.Array) -> jax.Array:
  """x[b, at[b, p]] as [B, P, D]."""
  return jnp.take_along_axis(x_BTD, at_BP[..., None], axis=1)


# A rule is one function of a position's logits, written next to its derivative:
#   rule(logits [..., V], at, fixed) -> (value [...], d value / d logits [..., V])
# `at` are arrays that belong to the positions and are cut with them; `fixed` is the same for all. Both are constants.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_rule(rule: Callable, hidden_BPD: jax.Array, head: Head, at: tuple, fixed: tuple) -> jax.Array:
  """The rule's value at every position, float32 [B, P]."""
  return _over_positions(lambda h, *at: rule(_logits(h, head), at, fixed)[0], head.shards, hidden_BPD, *at)


def _by_rule_forward(rule, hidden, head, at, fixed):
  def chunk(h, *at):
    logits = _logits(h, head)
    value, slope = rule(logits, at, fixed)
    return value, _to_hidden(_to_products(slope, logits, head), head, h)

  value, slope_BPD = _over_positions(chunk, head.shards, hidden, *at)
  return value, (hidden, head, at, fixed, slope_BPD)


def _by_rule_backward(rule, kept, g_BP):
  hidden, head, at, fixed, slope_BPD = kept

  def chunk(h, g, *at):
    logits = _logits(h, head)
    return _to_products(rule(logits, at, fixed)[1] * g[..., None], logits, head)

  to_head = _to_head(chunk, head, hidden, g_BP, *at)  # dead code, and gone, where the head is frozen
  return (g_BP[..., None] * slope_BPD).astype(hidden.dtype), to_head, None, None


_by_rule.defvjp(_by_rule_forward, _by_rule_backward)


def token_logprobs(hidden_BPD: jax.Array, head: Head, target_BP: jax.Array) -> jax.Array:
  """log softmax(logits)[target], float32 nats, [B, P]."""

  def rule(logits, at, fixed):
    return _chosen(logits, *at), _one_hot(*at, logits) - jax.nn.softmax(logits)

  return _by_rule(rule, hidden_BPD, head, (target_BP,), ())


def token_statistics(hidden_BPD: jax.Array, head: Head, target_BP: jax.Array) -> tuple[jax.Array, ...]:
  """Of each target, all [B, P]: log p (float32 nats); whether it is the most probable token (of equals the one with
  the smallest id); mean and standard deviation of log p under p itself (Min-K%++, Zhang et al. 2025). No gradient is
  meant to be taken."""

  def chunk(h, y):
    logits = _logits(h, head)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[..., None]) ** 2).sum(-1)
    return _chosen(logits, y), logits.argmax(-1) == y, mean, jnp.sqrt(variance)

  return _over_positions(chunk, head.shards, hidden_BPD, target_BP)


# Divergences from a reference that enters as its last hidden states: D numbers a position give its distribution
# exactly, at the price of one product with the head and without a second trunk. p is the reference's distribution,
# q the policy's.


def forward_kl(hidden_BKD: jax.Array, head: Head, ref_hidden_BKD: jax.Array, ref_head: Head) -> jax.Array:
  """KL(p || q) = sum_v p (log p - log q) over the whole vocabulary, float32 nats, [B, K]."""

  def rule(logits, at, fixed):
    log_p, log_q = jax.nn.log_softmax(_logits(*at, *fixed)), jax.nn.log_softmax(logits)
    return _kl(log_p, log_q), jnp.exp(log_q) - jnp.exp(log_p)

  return _by_rule(rule, hidden_BKD, head, (ref_hidden_BKD,), (ref_head,))


def tempered_kl(
  hidden_BKD: jax.Array, head: Head, ref_hidden_BKD: jax.Array, ref_head: Head, temperature: jax.Array | float
) -> jax.Array:
  """T^2 KL(p^T || q^T), p^T = softmax(logits / T), float32 nats, [B, K]."""

  def rule(logits, at, fixed):
    ref_head, t = fixed
    log_p, log_q = jax.nn.log_softmax(_logits(*at, ref_head) / t), jax.nn.log_softmax(logits / t)
    return t**2 * _kl(log_p, log_q), t * (jnp.exp(log_q) - jnp.exp(log_p))

  return _by_rule(rule, hidden_BKD, head, (ref_hidden_BKD,), (ref_head, jnp.float32(temperature)))


def reverse_kl(hidden_BKD: jax.Array, head: Head, ref_hidden_BKD: jax.Array, ref_head: Head) -> jax.Array:
  """KL(q || p) = sum_v q (log q - log p) over the whole vocabulary, float32 nats, [B, K]."""

  def rule(logits, at, fixed):
    log_p, log_q = jax.nn.log_softmax(_logits(*at, *fixed)), jax.nn.log_softmax(logits)
    value = _kl(log_q, log_p)
    return value, jnp.exp(log_q) * (log_q - log_p - value[..., None])

  return _by_rule(rule, hidden_BKD, head, (ref_hidden_BKD,), (ref_head,))


def cross_entropy(hidden_BKD: jax.Array, head: Head, ref_hidden_BKD: jax.Array, ref_head: Head) -> jax.Array:
  """-sum_v p log q = KL(p || q) + entropy(p), float32 nats, [B, K]."""

  def rule(logits, at, fixed):
    p, log_q = jax.nn.softmax(_logits(*at, *fixed)), jax.nn.log_softmax(logits)
    return -(p * log_q).sum(-1), jnp.exp(log_q) - p

  return _by_rule(rule, hidden_BKD, head, (ref_hidden_BKD,), (ref_head,))


def adjusted_kl(
  hidden_BKD: jax.Array, head: Head, ref_hidden_BKD: jax.Array, ref_head: Head, target_BK: jax.Array, less: jax.Array
) -> jax.Array:
  """KL(p' || q) where p' is the reference with the target's logit lowered by `less`, float32 nats, [B, K]."""

  def rule(logits, at, fixed):
    (ref_hidden, target), (ref_head, less) = at, fixed
    ref_logits = _logits(ref_hidden, ref_head)
    log_p, log_q = jax.nn.log_softmax(ref_logits - less * _one_hot(target, logits)), jax.nn.log_softmax(logits)
    return _kl(log_p, log_q), jnp.exp(log_q) - jnp.exp(log_p)

  return _by_rule(rule, hidden_BKD, head, (ref_hidden_BKD, target_BK), (ref_head, less))


def js_divergence(hidden_BPD: jax.Array, other_BPD: jax.Array, head: Head) -> jax.Array:
  """(KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, of two states of one model; float32 nats, [B, P], at most log 2."""

  def rule(logits, at, fixed):
    log_p, log_q = jax.nn.log_softmax(_logits(*at, *fixed)), jax.nn.log_softmax(logits)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    towards = 0.5 * jnp.exp(log_q) * (log_q - log_m)
    value = 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))
    return value, towards - jnp.exp(log_q) * towards.sum(-1, keepdims=True)

  stop = jax.lax.stop_gradient
  one = _by_rule(rule, hidden_BPD, head, (stop(other_BPD),), (stop(head),))
  other = _by_rule(rule, other_BPD, head, (stop(hidden_BPD),), (stop(head),))
  return one + other - stop(other)  # the value of either, and the gradient to both


def logits(hidden: jax.Array, head: Head) -> jax.Array:
  """Every logit, float32 [..., V]: for a few positions, such as the last ones of a text that goes on."""
  return _logits(hidden, head)


def _logits(hidden: jax.Array, head: Head) -> jax.Array:
  products = _product("...d,vd->...v", hidden, head.matrix)
  if head.bias is not None:
    products += head.bias.astype(products.dtype)
  return products if head.softcap is None else head.softcap * jnp.tanh(products / head.softcap)


def _product(how: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
  """In the type of x, summed in float32 at least. Float32 is multiplied as float32 on accelerators, too."""
  precision = None if x.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
  return jnp.einsum(how, x, matrix.astype(x.dtype), precision=precision, preferred_element_type=_wide(x.dtype))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _to_products(slope_V: jax.Array, logits_V: jax.Array, head: Head) -> jax.Array:
  """A derivative with respect to logits, carried back through the cap."""
  return slope_V if head.softcap is None else slope_V * (1 - (logits_V / head.softcap) ** 2)


def _to_hidden(slope_V: jax.Array, head: Head, hidden: jax.Array) -> jax.Array:
  """A derivative with respect to products, carried back to the hidden state."""
  return _product("...v,vd->...d", slope_V.astype(hidden.dtype), head.matrix)


def _chosen(logits: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _one_hot(target: jax.Array, like: jax.Array) -> jax.Array:
  return jnp.where(jnp.arange(like.shape[-1]) == target[..., None], 1.0, 0.0)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _split(shards: int, *args: jax.Array) -> tuple[jax.Array, ...]:
  """The position axis (axis 1) cut into chunks of at most CHUNK positions over a device's rows, chunks first."""
  B, P = args[0].shape[:2]
  pieces = next(n for n in range(1, P + 1) if P % n == 0 and (B * P // n <= CHUNK * shards or n == P))
  return tuple(jnp.moveaxis(x.reshape(B, pieces, P // pieces, *x.shape[2:]), 1, 0) for x in args)


def _over_positions(chunk: Callable, shards: int, *args: jax.Array):
  """`chunk` over every slice of the position axis; its outputs put together again."""
  B, P = args[0].shape[:2]
  out = jax.lax.map(lambda xs: chunk(*xs), _split(shards, *args))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, P, *x.shape[3:]), out)


def _to_head(slope: Callable, head: Head, hidden: jax.Array, *args: jax.Array) -> Head:
  """Derivatives with respect to the head: sums over positions of slope[v] hidden[d], and of slope[v]."""

  def add(total, xs):
    slope_BPV = slope(*xs)
    outer = jnp.einsum("bpv,bpd->vd", slope_BPV, xs[0].astype(wide), precision=jax.lax.Precision.HIGHEST)
    bias = None if head.bias is None else total.bias + slope_BPV.sum((0, 1))
    return total.replace(matrix=total.matrix + outer, bias=bias), None

  wide = _wide(hidden.dtype)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), head)
  total, _ = jax.lax.scan(add, zeros, _split(head.shards, hidden, *args))
  return jax.tree.map(lambda x, like: x.astype(like.dtype), total, head)
