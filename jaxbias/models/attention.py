"""One door to attention: every mask is honoured, softmax is float32, and it can say which implementation runs.

Axis letters as in `models/layers.py`.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

log = logging.getLogger("jaxbias")


def implementation(
  backend: str, dtype: str, head_dim: int, lengths: tuple[int, int], softcap: float | None
) -> tuple[str, str]:
  """("cudnn" | "xla", why). cuDNN's fused attention takes an explicit mask as an additive bias, so packed rows,
  shared prefixes and windows are safe with it; it knows neither float32, nor capped scores, nor odd lengths (T, S)."""
  if backend != "gpu":
    return "xla", f"the {backend} backend has no fused attention that takes an explicit mask"
  if softcap is not None:
    return "xla", "attention scores are capped, which cuDNN cannot do"
  if dtype not in ("bfloat16", "float16"):
    return "xla", f"cuDNN's attention does not compute in {dtype}"
  if head_dim % 8 or head_dim > 128:
    return "xla", f"cuDNN's attention wants heads of a multiple of 8 channels up to 128, these have {head_dim}"
  if any(length % 2 for length in lengths):
    return "xla", "cuDNN's attention with a mask wants even lengths"
  return "cudnn", "bfloat16 or float16 on a GPU, with the mask as a bias"


@functools.cache
def _announce(chosen: str, why: str) -> None:
  log.info("attention runs as %s: %s.", chosen, why)


def attend(
  q_BTHC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
  """softmax(scale q k^T, where `mask` is true) v, [B, T, H, C]. softcap: scores become cap * tanh(score / cap).

  mask: bool [B, 1, T, S]. Every query must see something.
  """
  lengths = (q_BTHC.shape[1], k_BSGC.shape[1])
  chosen, why = implementation(jax.default_backend(), q_BTHC.dtype.name, q_BTHC.shape[-1], lengths, softcap)
  fused = lambda how: jax.nn.dot_product_attention(q_BTHC, k_BSGC, v_BSGC, mask=mask, scale=scale, implementation=how)
  if chosen == "cudnn":
    try:
      mixed = fused("cudnn")
      _announce("cudnn", why)
      return mixed
    except (RuntimeError, NotImplementedError, ValueError) as error:  # not installed, too old, or a shape it refuses
      chosen, why = "xla", f"cuDNN refuses this program ({str(error).splitlines()[0]})"
  _announce("xla", why)
  return fused("xla") if softcap is None else _capped(q_BTHC, k_BSGC, v_BSGC, mask, scale, softcap)


def _capped(q_BTHC, k_BSGC, v_BSGC, mask, scale: float, softcap: float) -> jax.Array:
  B, T, H, C = q_BTHC.shape
  G = k_BSGC.shape[2]
  q = q_BTHC.reshape(B, T, G, H // G, C)
  score = jnp.einsum("btgnc,bsgc->bgnts", q, k_BSGC, preferred_element_type=jnp.float32) * scale
  score = softcap * jnp.tanh(score / softcap)
  score = jnp.where(mask[:, :, None], score, jnp.finfo(jnp.float32).min)
  weight = jax.nn.softmax(score, axis=-1).astype(v_BSGC.dtype)
  return jnp.einsum("bgnts,bsgc->btgnc", weight, v_BSGC).reshape(B, T, H, C)
