"""Losses that compare texts of different packed rows, and class statistics: the same on eight devices as on one.

  python -m tests.multidevice.test_group_losses OUT      # what the test runs, with XLA_FLAGS set
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.testing import assert_allclose

ROOT = Path(__file__).parents[2]
LOSSES = {"contrast": {"scale": "ema"}, "group_ce": {}, "supcon": {}, "infonce": {}, "clp": {},
          "clp:odds": {"form": "log_odds"}, "nc3": {"words": "made up"}, "mabel_contrast": {}, "mabel_alignment": {},
          "adept": {}, "adept_anchor": {}, "ase_orthogonal": {}}  # fmt: skip


def worker(out: Path) -> None:
  import jax
  import jax.numpy as jnp

  from jaxbias.losses.collapse import no_sums
  from jaxbias.losses.context import LossContext
  from jaxbias.losses.contrastive import init_contrast_head
  from jaxbias.losses.registry import evaluate, parse
  from jaxbias.mesh import batch_sharding, make_mesh, replicated
  from jaxbias.models.transformer import Head
  from jaxbias.types import Batch
  from tests.models import tiny_config

  assert jax.device_count() == 8
  B, S, N, D, V = 16, 2, 5, 8, 11  # N tokens of a segment
  T, rng = S * N, np.random.default_rng(0)
  segment = np.tile(np.repeat([1, 2], N), (B, 1))
  flat = np.arange(B * S)
  order = rng.permutation(B * S)  # twins and groups lie anywhere
  pair, group, role, kind = (np.zeros(B * S, int) for _ in range(4))
  pair[order[0::2]], pair[order[1::2]] = order[1::2], order[0::2]
  group[order] = flat // 4
  role[order] = [1, 0, 1, 0] * (B * S // 4)
  kind[order] = rng.integers(0, 11, B * S)
  slots = lambda x: x.reshape(B, S).astype(np.int32)
  at = np.tile(np.arange(T), (B, 1))
  batch = Batch(tokens=rng.integers(0, 6, (B, T)), segment=segment, position=at, score_at=at,
                target=rng.integers(0, 3, (B, T)), score_segment=segment, role=slots(role), row=slots(flat),
                pair=slots(pair), group=slots(group), polarity=slots(role), kind=slots(kind),
                entity=rng.random((B, T)) < 0.4, answer=np.ones((B, T), bool),
                toxicity=rng.random((B, S)).astype(np.float32))  # fmt: skip
  hidden, logprob = rng.normal(size=(B, T, D)).astype(np.float32), -rng.exponential(size=(B, T)).astype(np.float32)
  objective, coefficients = parse(LOSSES)
  head = 30 * np.asarray(init_contrast_head(jax.random.key(0), tiny_config(hidden_size=D))["w1"])
  params = {"contrast": {"w1": head, "b1": np.zeros(D, np.float32), "w2": head.T, "b2": np.zeros(D, np.float32)}}
  aux = {"contrast scale": np.float32(np.nan), "nc3": {
    "ids": np.arange(6, dtype=np.int32).reshape(3, 2), "group": np.array([0, 1, 1], np.int32), **no_sums(3, D)}}
  words = {"attribute": np.array([[0], [1]], np.int32), "neutral": np.array([2, 3], np.int32)}
  aux |= {"adept": {**words, **no_sums(2, 2 * D)}, "ase_orthogonal": {**words, **no_sums(2, D)}}  # fmt: skip
  matrix = rng.normal(size=(V, D)).astype(np.float32)

  @jax.jit
  def run(hidden, logprob, params, matrix, batch, aux):
    def of(hidden, params, matrix):
      captures = {"stack_out": hidden, "residual_out": jnp.stack([hidden, 2 * hidden])}
      ctx = LossContext(batch, logprob, hidden_BTD=hidden, captures=captures, head=Head(matrix),
                        base_captures={"residual_out": jnp.zeros((2, *hidden.shape))})  # fmt: skip
      out = evaluate(objective, ctx, coefficients, params, aux)
      return out.total, out

    (_, out), slopes = jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True)(hidden, params, matrix)
    return out, slopes

  for name, devices in (("one", 1), ("eight", 8)):
    mesh = make_mesh({"data": 8}) if devices == 8 else jax.make_mesh(
      (1, 1, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])  # fmt: skip
    rows, whole = batch_sharding(mesh), replicated(mesh)
    put = lambda x, where: jax.device_put(jax.tree.map(jnp.asarray, x), where)
    found = run(put(hidden, rows), put(logprob, rows), put(params, whole), put(matrix, whole), put(batch, rows),
                put(aux, whole))  # fmt: skip
    leaves, _ = jax.tree.flatten_with_path(found)
    np.savez(out / f"{name}.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


def test_eight_devices_give_the_losses_gradients_and_statistics_of_one(tmp_path):
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.multidevice.test_group_losses", str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "eight.npz") as eight:
    assert set(one.files) == set(eight.files) and len(one.files) > 30
    for key in one.files:
      assert np.isfinite(one[key]).all()
      assert_allclose(eight[key], one[key], rtol=2e-4, atol=2e-6, err_msg=key)
    weights = [float(one[key]) for key in one.files if ".parts" in key and key.endswith(".weight")]
    assert len(weights) == len(LOSSES) and all(weights), "every loss counted something"


if __name__ == "__main__":
  worker(Path(sys.argv[1]))
