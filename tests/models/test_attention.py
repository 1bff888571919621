"""One door to attention: every mask is honoured in every implementation that can run here, and the choice is said."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.models import attention
from jaxbias.models.attention import attend, implementation

B, T, S, H, G, C = 2, 6, 10, 4, 2, 8


def arrays():
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((B, n, heads, C)).astype(np.float32) for n, heads in ((T, H), (S, G), (S, G)))
  mask = rng.random((B, 1, T, S)) < 0.4
  mask[..., 0] = True  # every query sees something
  return q, k, v, mask


def by_hand(q, k, v, mask, scale, softcap):
  """Head by head in float64; query heads 2g and 2g + 1 read kv head g."""
  out = np.zeros_like(q, np.float64)
  for b, h in np.ndindex(B, H):
    score = scale * q[b, :, h].astype(np.float64) @ k[b, :, h // (H // G)].T
    score = score if softcap is None else softcap * np.tanh(score / softcap)
    weight = np.where(mask[b, 0], np.exp(score), 0.0)
    out[b, :, h] = weight / weight.sum(-1, keepdims=True) @ v[b, :, h // (H // G)]
  return out


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_masked_attention_is_its_formula(softcap):
  q, k, v, mask = arrays()
  found = jax.jit(lambda *a: attend(*a, 0.3, softcap))(q, k, v, mask)
  assert_allclose(found, by_hand(q, k, v, mask, 0.3, softcap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_what_is_masked_has_neither_value_nor_gradient(softcap):
  q, k, v, mask = arrays()
  hidden = ~mask.any(axis=(1, 2))  # positions that nobody sees
  hidden[:, -1] = True
  mask[..., -1] = False
  total = lambda k, v: (attend(q, k, v, mask, 0.3, softcap) ** 2).sum()
  value, grads = jax.value_and_grad(total, argnums=(0, 1))(k, v)
  noise = np.where(hidden[..., None, None], 1e3, 0.0).astype(np.float32)
  assert_allclose(total(k + noise, v + noise), value, rtol=1e-6)
  for grad in grads:
    assert not np.asarray(grad)[hidden].any()


def test_softmax_is_float32_whatever_the_inputs_are():
  """Scores of 8 and 8.0156 are one number in bfloat16; their weights must differ nevertheless."""
  q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
  k = jnp.stack([jnp.ones(8), jnp.ones(8).at[0].set(1.015625)]).reshape(1, 2, 1, 8).astype(jnp.bfloat16)
  v = jnp.array([0.0, 1000.0]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 8))
  for softcap in (None, 50.0):
    found = attend(q, k, v.astype(jnp.bfloat16), jnp.ones((1, 1, 1, 2), bool), 1.0, softcap)
    assert found.dtype == jnp.bfloat16 and float(found[0, 0, 0, 0]) == 504.0


@pytest.mark.parametrize("asked,chosen,why", [
  (("gpu", "bfloat16", 64, (128, 128), None), "cudnn", "with the mask as a bias"),
  (("cpu", "bfloat16", 64, (128, 128), None), "xla", "cpu backend"),
  (("tpu", "bfloat16", 64, (128, 128), None), "xla", "tpu backend"),
  (("gpu", "float32", 64, (128, 128), None), "xla", "float32"),
  (("gpu", "bfloat16", 64, (128, 128), 50.0), "xla", "capped"),
  (("gpu", "bfloat16", 256, (128, 128), None), "xla", "256"),
  (("gpu", "bfloat16", 64, (1, 128), None), "xla", "even lengths"),
])  # fmt: skip
def test_the_choice_and_its_reason(asked, chosen, why):
  found, because = implementation(*asked)
  assert found == chosen and why in because


def test_a_fused_kernel_that_is_not_there_is_no_error_and_is_said(monkeypatch, caplog):
  """On this machine cuDNN is missing: the dispatcher falls back, with the mask, and says why."""
  q, k, v, mask = arrays()
  monkeypatch.setattr(attention, "implementation", lambda *_: ("cudnn", "as asked"))
  attention._announce.cache_clear()
  with caplog.at_level(logging.INFO, "jaxbias"):
    found = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask, 0.3, None)
  assert "attention runs as xla: cuDNN refuses this program" in caplog.text
  assert_allclose(found.astype(jnp.float32), by_hand(q, k, v, mask, 0.3, None), atol=0.05)
