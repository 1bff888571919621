"""The only place that touches the vocabulary: log-probabilities and divergences at chosen positions, in chunks.

No [B, T, V] array exists in either direction. A chunk's logits live only while the chunk is worked on, and the
derivative with respect to the hidden state is taken at the same time, from the same logits: D numbers a position are
kept for the backward pass instead of V, and nothing is recomputed. Chunks run along the positions of a row and never
cut the batch axis, which may be sharded.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbias.models.transformer import Head

CHUNK = 512  # positions whose logits exist at one time on a device


def gather_positions(x_BTD: jax.Array, at_BP: jax.Array) -> jax.Array:
  """x[b, at[b, p]] as [B, P, D]."""
  return jnp.take_along_axis(x_BTD, at_BP[..., None], axis=1)


@jax.custom_vjp
def token_logprobs(hidden_BPD: jax.Array, head: Head, target_BP: jax.Array) -> jax.Array:
  """log softmax(logits)[target], float32 nats, [B, P]."""
  return _over_positions(lambda h, y: _chosen(_logits(h, head), y), head.shards, hidden_BPD, target_BP)


def _token_logprobs_forward(hidden, head, target):
  def chunk(h, y):
    logits = _logits(h, head)
    slope = _one_hot_minus(jax.nn.softmax(logits), y)
    return _chosen(logits, y), _to_hidden(_to_products(slope, logits, head), head, h)

  value, slope_BPD = _over_positions(chunk, head.shards, hidden, target)
  return value, (hidden, head, target, slope_BPD)


def _token_logprobs_backward(kept, g_BP):
  hidden, head, target, slope_BPD = kept

  def chunk(h, y, g):
    logits = _logits(h, head)
    return _to_products(_one_hot_minus(jax.nn.softmax(logits), y) * g[..., None], logits, head)

  to_head = _to_head(chunk, head, hidden, target, g_BP)  # dead code, and gone, where the head is frozen
  return (g_BP[..., None] * slope_BPD).astype(hidden.dtype), to_head, None


token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


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


@jax.custom_vjp
def forward_kl(hidden_BKD: jax.Array, head: Head, ref_hidden_BKD: jax.Array, ref_head: Head) -> jax.Array:
  """KL(reference || policy) over the whole vocabulary, float32 nats, [B, K].

  The reference enters as its last hidden states: D numbers a position give its distribution exactly, at the
  price of one product with the head and without a second trunk. No gradient flows to the reference.
  """
  divergence = lambda h, r: _kl(_logits(h, head), _logits(r, ref_head))
  return _over_positions(divergence, head.shards, hidden_BKD, ref_hidden_BKD)


def _forward_kl_forward(hidden, head, ref_hidden, ref_head):
  def chunk(h, r):
    logits, ref_logits = _logits(h, head), _logits(r, ref_head)
    slope = jax.nn.softmax(logits) - jax.nn.softmax(ref_logits)
    return _kl(logits, ref_logits), _to_hidden(_to_products(slope, logits, head), head, h)

  value, slope_BKD = _over_positions(chunk, head.shards, hidden, ref_hidden)
  return value, (hidden, head, ref_hidden, ref_head, slope_BKD)


def _forward_kl_backward(kept, g_BK):
  hidden, head, ref_hidden, ref_head, slope_BKD = kept

  def chunk(h, r, g):
    logits = _logits(h, head)
    return _to_products((jax.nn.softmax(logits) - jax.nn.softmax(_logits(r, ref_head))) * g[..., None], logits, head)

  to_head = _to_head(chunk, head, hidden, ref_hidden, g_BK)
  return (g_BK[..., None] * slope_BKD).astype(hidden.dtype), to_head, None, None


forward_kl.defvjp(_forward_kl_forward, _forward_kl_backward)


def logits(hidden: jax.Array, head: Head) -> jax.Array:
  """Every logit, float32 [..., V]: for a few positions, such as the last ones of a text that goes on."""
  return _logits(hidden, head)


def _logits(hidden: jax.Array, head: Head) -> jax.Array:
  products = jnp.einsum(
    "...d,vd->...v", hidden, head.matrix.astype(hidden.dtype),
    precision=_precision(hidden.dtype), preferred_element_type=jnp.float32,
  )  # fmt: skip
  if head.bias is not None:
    products += head.bias.astype(jnp.float32)
  return products if head.softcap is None else head.softcap * jnp.tanh(products / head.softcap)


def _precision(dtype) -> jax.lax.Precision | None:
  """Float32 is multiplied as float32 on accelerators, too."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _to_products(slope_V: jax.Array, logits_V: jax.Array, head: Head) -> jax.Array:
  """A derivative with respect to logits, carried back through the cap."""
  return slope_V if head.softcap is None else slope_V * (1 - (logits_V / head.softcap) ** 2)


def _to_hidden(slope_V: jax.Array, head: Head, hidden: jax.Array) -> jax.Array:
  """A derivative with respect to products, carried back to the hidden state."""
  dtype = hidden.dtype
  return jnp.einsum("...v,vd->...d", slope_V.astype(dtype), head.matrix.astype(dtype),
                    precision=_precision(dtype), preferred_element_type=jnp.float32)  # fmt: skip


def _chosen(logits: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _one_hot_minus(probability: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.where(jnp.arange(probability.shape[-1]) == target[..., None], 1.0, 0.0) - probability


def _kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
  log_p, log_q = jax.nn.log_softmax(ref_logits), jax.nn.log_softmax(logits)
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
    outer = jnp.einsum("bpv,bpd->vd", slope_BPV, xs[0].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    bias = None if head.bias is None else total.bias + slope_BPV.sum((0, 1))
    return total.replace(matrix=total.matrix + outer, bias=bias), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
  total, _ = jax.lax.scan(add, zeros, _split(head.shards, hidden, *args))
  return jax.tree.map(lambda x, like: x.astype(like.dtype), total, head)
