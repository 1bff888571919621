"""The Fisher information: closed form, text by text, kept on disk, and the same on eight devices as on one.

  python -m tests.train.test_fisher OUT      # what the last test runs, with XLA_FLAGS set
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.pipeline import text_segment
from jaxbias.data.rows import Split, Text
from jaxbias.errors import UserError
from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.mesh import AXES, make_mesh
from jaxbias.models.language_model import LanguageModel, layout_for
from jaxbias.models.transformer import Head, Transformer, abstract_variables
from jaxbias.models.transformer import head as model_head
from jaxbias.train import fisher
from jaxbias.train.reference import key_of
from tests.models import tiny_config

PATHS = ("embedding", "layers/attention/q/kernel", "layers/mlp_norm/scale")


def language_model(mesh) -> LanguageModel:
  config = tiny_config(vocab_size=24, hidden_size=16, mlp_size=16, num_layers=2, num_heads=2, num_kv_heads=2)
  layout, module = layout_for(config, mesh), Transformer(config, mesh=mesh)
  boxed, rng = abstract_variables(module), np.random.default_rng(0)
  logical, abstract = nn.get_partition_spec(boxed), nn.unbox(boxed)
  place = lambda leaf, where: jax.device_put(0.5 * rng.standard_normal(leaf.shape).astype(np.float32), where)
  params = jax.tree.map(place, abstract, layout.shardings(abstract, logical))
  return LanguageModel("tiny", config, module, params, SimpleNamespace(fingerprint="t"), "f", layout)


def texts(lengths=(5, 9, 5, 9, 5)) -> list:
  rng = np.random.default_rng(3)
  return [text_segment(rng.integers(0, 24, n), 1) for n in lengths]


def one_device():
  return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


# A linear softmax, where everything is known


D, C, B = 3, 4, 32
X = np.array([1.0, -0.5, 2.0])
W = np.random.default_rng(0).standard_normal((C, D))


def draws(count: int) -> jax.Array:
  """Labels of one input under softmax(W x), by the sampler that the Fisher uses: each position has its own draw."""
  hidden = jnp.broadcast_to(jnp.asarray(X, jnp.float32), (count, D))
  key = jnp.array([1, 2], jnp.uint32)
  return jax.jit(fisher._draw)(key, hidden, Head(jnp.asarray(W, jnp.float32)))


@pytest.fixture(scope="module")
def labels() -> jax.Array:
  return draws(200_000)


def log_likelihood(w, label):
  hidden = jnp.asarray(X, jnp.float32)[None, None]
  return token_logprobs(hidden, Head(w), label[None, None])[0, 0]


def probabilities() -> np.ndarray:
  e = np.exp(W @ X)
  return e / e.sum()


def test_labels_are_the_models_own(labels):
  found = np.bincount(labels, minlength=C) / len(labels)
  assert_allclose(found, probabilities(), atol=5 * 0.5 / np.sqrt(len(labels)))
  assert_array_equal(labels[:100], draws(200_000)[:100])


def test_a_linear_softmax_has_the_closed_form(labels):
  """F_kj = p_k (1 - p_k) x_j^2."""
  w, p = jnp.asarray(W, jnp.float32), probabilities()
  square = jax.jit(lambda y: fisher.squared_gradients(jnp.zeros_like(w), w, log_likelihood, y))
  found = square(labels.reshape(100, -1)) / len(labels)
  assert_allclose(found, (p * (1 - p))[:, None] * X**2, atol=5e-3)


def test_the_square_of_a_mean_gradient_is_a_bth_of_it(labels):
  w = jnp.asarray(W, jnp.float32)
  square = jax.jit(lambda y: fisher.squared_gradients(jnp.zeros_like(w), w, log_likelihood, y))
  each = square(labels[:64_000].reshape(100, -1)) / 64_000
  mean_of = lambda w, ys: jax.vmap(lambda y: log_likelihood(w, y))(ys).mean()
  batches = labels[:64_000].reshape(10, -1, B)
  wrong = jax.jit(lambda y: fisher.squared_gradients(jnp.zeros_like(w), w, mean_of, y))(batches) / (64_000 / B)
  assert_allclose(wrong / each, 1 / B, rtol=0.15)


def test_the_mean_is_one_afterwards():
  found = fisher.normalised({"a": jnp.full(3, 4.0), "b": jnp.zeros(1)})
  assert_allclose(found["a"], 4 / 3)
  assert_allclose(np.concatenate(list(found.values())).mean(), 1.0)
  assert not fisher.normalised({"a": jnp.zeros(2)})["a"].any()


# Of a language model


def by_hand(model: LanguageModel, segments) -> dict[str, np.ndarray]:
  """The same sum, one text and one jax.grad after the other, without padding."""
  fixed = flatten_dict(dict(model.params))
  total, tokens = {path: 0.0 for path in PATHS}, 0

  @jax.jit
  def slopes(ids, at, key):
    def of(weights):
      whole = unflatten_dict(fixed | {tuple(name.split("/")): leaf for name, leaf in weights.items()})
      hidden, _ = model.module.apply({"params": whole}, ids[None], jnp.ones_like(ids)[None], jnp.arange(len(ids))[None])
      scored, top = gather_positions(hidden, at[None]), model_head(whole, model.config)
      label = fisher._draw(key, jax.lax.stop_gradient(scored[0]), jax.lax.stop_gradient(top))
      return token_logprobs(scored, top, label[None]).sum()

    return jax.grad(of)({path: fixed[tuple(path.split("/"))] for path in PATHS})

  for segment in segments:
    digest = key_of(segment)
    key = np.array([int(digest[:8], 16), int(digest[8:16], 16)], np.uint32)
    found = slopes(jnp.asarray(segment.tokens), jnp.asarray(segment.score_at), key)
    total = {path: total[path] + np.asarray(found[path]) ** 2 for path in PATHS}
    tokens += len(segment.target)
  return {path: x / tokens for path, x in total.items()}


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
  return language_model(one_device())


@pytest.fixture(scope="module")
def computed(tiny, tmp_path_factory) -> tuple[dict, Path]:
  folder = tmp_path_factory.mktemp("fisher")
  return fisher.compute(tiny, texts(), PATHS, folder), folder


def test_texts_are_squared_one_by_one_and_padding_counts_nothing(tiny, computed):
  found, expected = computed[0], by_hand(tiny, texts())
  assert found.keys() == set(PATHS)
  for path in PATHS:
    assert (np.asarray(found[path]) >= 0).all() and found[path].dtype == jnp.float32
    assert_allclose(found[path], expected[path], rtol=2e-4, atol=1e-7, err_msg=path)


def test_it_is_computed_once_and_known_by_model_texts_and_weights(tiny, computed, monkeypatch):
  found, folder = computed
  monkeypatch.setattr(fisher, "_accumulate", lambda *_: pytest.fail("computed again"))
  told = []
  again = fisher.compute(tiny, [*texts()[::-1], texts()[0]], PATHS[::-1], folder, told.append)  # order, and once more
  for path in PATHS:
    assert_array_equal(again[path], found[path])
  assert told == [5] and not list(folder.glob("*.tmp*"))
  for changed in [(texts()[:4], PATHS), (texts(), PATHS[:2])]:
    with pytest.raises(pytest.fail.Exception, match="computed again"):
      fisher.compute(tiny, *changed, folder)


def test_texts_that_are_evaluated_are_refused():
  split = Split((), tuple(Text(str(n), f"fact {n}") for n in range(6)))
  with pytest.raises(UserError, match="general text 4 is in the training split and among those that are evaluated"):
    fisher.general_segments(split, Split((), (Text("x", "fact 4"),)), None, 64, 3)


def test_at_most_so_many_texts_are_read(monkeypatch):
  split = Split((), tuple(Text(str(n), f"fact {n}") for n in range(6)))
  monkeypatch.setattr(fisher, "tokenise", lambda recipe, *_: SimpleNamespace(segments={"general": recipe.general}))
  read = lambda most: [row.id for row in fisher.general_segments(split, Split((), ()), None, 64, most)]
  assert len(set(read(3))) == 3 and read(3) == read(3) and sorted(read(9)) == sorted("012345")
  assert read(3) == read(4)[:3]  # fewer are a part of more


# On eight devices


def worker(out: Path) -> None:
  assert jax.device_count() == 8
  for name, mesh in {"one": one_device(), "eight": make_mesh({"data": 2, "fsdp": 2, "tensor": 2})}.items():
    model = language_model(mesh)
    found = fisher.compute(model, texts(), PATHS, out / name)
    shards = [found["embedding"].sharding == model.params["embedding"].sharding]
    shards += [found["embedding"].addressable_shards[0].data.size < found["embedding"].size]
    np.savez(out / f"{name}.npz", shards=shards, **{path: np.asarray(x) for path, x in found.items()})


def test_eight_devices_find_what_one_finds(tmp_path):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                 "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # fmt: skip
  command = [sys.executable, "-m", "tests.train.test_fisher", str(tmp_path)]
  done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  one, eight = (np.load(tmp_path / f"{name}.npz") for name in ("one", "eight"))
  assert eight["shards"].all(), "laid out like the weights, in parts"
  for path in PATHS:
    assert_allclose(eight[path], one[path], rtol=1e-4, atol=1e-7, err_msg=path)
    assert (one[path] > 0).any()


if __name__ == "__main__":
  worker(Path(sys.argv[1]))
