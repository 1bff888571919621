"""What a compiled pass needs beside its arguments does not grow with vocabulary x length. Nothing is run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxbias.evals import passes
from jaxbias.losses import logprobs
from jaxbias.losses.logprobs import gather_positions
from jaxbias.mesh import make_mesh
from jaxbias.models.transformer import Transformer, abstract_variables, head
from tests.models import tiny_config

B, SMALL, LARGE, SHORT, LONG, CHUNK = 2, 8192, 32768, 64, 128, 16  # so that attention needs less than a chunk does
PRODUCT = 4 * B * (LONG - SHORT) * (LARGE - SMALL)  # bytes by which all logits grow with both



@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(logprobs, "CHUNK", CHUNK)


def temporaries(V: int, T: int, read: str) -> int:
  """Bytes of a pass in which every position is scored; `read` "all logits" makes them at once."""
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  module = Transformer(tiny_config(vocab_size=V, num_layers=1, num_heads=1, num_kv_heads=1, max_positions=T), mesh=mesh)
  names = ("tokens", "segment", "position", "branch", "score_at", "target")
  arrays = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in names}
  variables = {"params": nn.unbox(abstract_variables(module))}

  def all_logits(variables, arrays):
    hidden, _ = module.apply(variables, *(arrays[name] for name in names[:4]))
    scores = jax.nn.log_softmax(gather_positions(hidden, arrays["score_at"]) @ head(variables["params"],
                                                                                    module.config).matrix.T)
    return jnp.take_along_axis(scores, arrays["target"][..., None], -1)

  run = passes.program(module, mesh, read) if read != "all logits" else None
  pass_over = (lambda v, a: run(v, a, 1)) if run else all_logits
  return jax.jit(pass_over).lower(variables, arrays).compile().memory_analysis().temp_size_in_bytes


def growth_with_both(read: str) -> int:
  """What is left of the growth with vocabulary and length once the growth with either alone is taken away."""
  return (temporaries(LARGE, LONG, read) - temporaries(LARGE, SHORT, read)
          - temporaries(SMALL, LONG, read) + temporaries(SMALL, SHORT, read))  # fmt: skip


@pytest.mark.parametrize("read", [passes.LOGPROB, passes.STATISTICS])
def test_a_pass_holds_the_logits_of_one_chunk(read):
  assert abs(growth_with_both(read)) < 0.02 * PRODUCT
  assert 4 * CHUNK * LARGE <= temporaries(LARGE, LONG, read) < 0.25 * 4 * B * LONG * LARGE


def test_all_logits_at_once_would_be_seen():
  assert growth_with_both("all logits") > 0.98 * PRODUCT
