"""Neural collapse of a model: its states read packed, at all layers at once, on one device and on eight.

  python -m tests.evals.test_collapse_models MODEL.gguf OUT.npz      # what the last test runs, with XLA_FLAGS set
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.errors import UserError
from jaxbias.evals import collapse, collapse_run
from jaxbias.evals.class_labels import Text
from jaxbias.evals.class_statistics import collect, programs, sites_of
from jaxbias.models import language_model
from tests.conftest import llama_tensors

ROOT = Path(__file__).parents[2]
TEXTS = [" the cat a the cat 12 a cat" + " the" * n + " a12 cat" * (n % 3) for n in range(12)]


@pytest.fixture
def tiny(make_gguf, cache) -> language_model.LanguageModel:
  tensors = {name: 0.2 * value + (value.ndim == 1) for name, value in llama_tensors(seed=3).items()}
  return language_model.load(str(make_gguf(tensors=tensors)), dtype="float32")


def alone(module):
  return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs,
                                                      capture=("residual_in", "residual_out")))  # fmt: skip


def test_every_layer_is_that_of_the_texts_read_alone(tiny):
  plan = collapse.prepare(tiny, TEXTS, "vocabulary", held_out=0.25)
  C, ids = len(plan.classes), plan.classes.ids[:, 0]
  weight = collapse.weights(tiny, plan.classes, tiny.params)
  assert_array_equal(weight, np.asarray(tiny.params["embedding"])[ids])
  sites = sites_of(tiny.config, ["all"])
  found = collect(tiny.module, tiny.mesh, {"params": tiny.params}, plan.fit, plan.held, C, weight, sites=sites)
  held = set(np.random.default_rng(0).permutation(12)[:3].tolist())
  program = alone(tiny.module)
  sample = {site: [] for site in sites}
  for i, text in enumerate(TEXTS):
    read = [tiny.tokenizer.start_id, *tiny.tokenizer.encode(text)]
    pad = np.pad(read, (0, 64 - len(read)))[None]
    there = (np.arange(64) < len(read)).astype(np.int32)[None]
    hidden, captured = program(tiny.params, pad, there, np.arange(64)[None])
    named = dict(zip(sites, [captured["residual_in"][0], *captured["residual_out"], hidden], strict=True))
    for site, x in named.items():  # the state at t predicts the token at t + 1
      sample[site] += [(i in held, token, np.asarray(x[0, t])) for t, token in enumerate(read[1:])]
  for site, each in sample.items():
    for c, token in enumerate(ids):
      mine = np.stack([x for later, label, x in each if label == token and not later]).astype(np.float64)
      assert found[site].count[c] == len(mine) >= 2
      assert_allclose(found[site].mean[c], mine.mean(0), rtol=1e-4, atol=1e-5)
      variance = ((mine - mine.mean(0)) ** 2).sum() / len(mine)
      assert_allclose(found[site].variance[c], variance, rtol=1e-3, atol=1e-6)
    later = [(np.flatnonzero(ids == label)[0], x) for late, label, x in each if late and label in ids]
    x, mean = np.stack([x for _, x in later]), found[site].mean
    same = (x @ np.asarray(weight).T).argmax(1) == ((x[:, None] - mean) ** 2).sum(-1).argmin(1)
    assert_array_equal(found[site].agreement[0], np.bincount([c for c, _ in later], minlength=C))
    assert found[site].agreement[1].sum() == same.sum()
  twice = collect(tiny.module, tiny.mesh, {"params": tiny.params}, plan.fit, (), C, None, sites=sites, passes=2)
  for site in sites:
    assert_allclose(twice[site].variance, found[site].variance, rtol=1e-4, atol=1e-6)


def test_checkpoints_compile_once(tiny):
  scaled = lambda step: jax.tree.map(lambda x: x * (1 + 0.01 * step), tiny.params)
  moved = [dataclasses.replace(tiny, name=str(step), params=scaled(step)) for step in range(10)]
  found = collapse.neural_collapse(moved, TEXTS, classes="vocabulary", sites=("head_input",))
  run = programs(tiny.module, tiny.mesh, ("head_input",), 1)
  assert run.add._cache_size() == run.agree._cache_size() == 1
  assert [one.model for one in found] == [str(step) for step in range(10)]
  norms = [one.result.estimates["overall"]["norm"].value for one in found]
  assert len(set(norms)) == 10
  rows = collapse_run.rows(found)
  assert {row["step"] for row in rows} == set(range(10)) and rows[0].keys() >= {"site", "group", "metric", "value"}
  assert collapse_run.tables(found)[0].row_count == len(found[0].result.estimates["overall"])


def test_a_run_that_trained_the_head_is_measured_against_its_own(tiny):
  moved = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape), tiny.params)
  plan = collapse.prepare(tiny, TEXTS, classes="vocabulary")
  ours, expected = (collapse.measure(model, plan, adapters=adapters)[0].result.estimates["overall"]["similarity"].value
                    for model, adapters in ((tiny, {"params": moved}), (dataclasses.replace(tiny, params=moved), None)))
  assert ours == expected != collapse.measure(tiny, plan)[0].result.estimates["overall"]["similarity"].value


def test_what_is_missing_is_said_and_the_rest_is_kept(tiny, tmp_path):
  words = tmp_path / "words.json"
  words.write_text(json.dumps({"male": ["cat", "12"], "female": ["xyz"]}))
  (found,) = collapse.neural_collapse([tiny], TEXTS, classes=str(words), held_out=0.0)
  assert found.classes == ("cat",) and found.about["unseen"] == 0
  assert "one class only" in found.missing["cdnv"] and "no text is held out" in found.missing["agreement"]
  assert "female" in found.missing and found.result.estimates["overall"]["similarity"].low is None
  assert "predicts it" in found.about["pairing"] and found.about["shift"] == 1
  (none,) = collapse.neural_collapse([tiny], ["x"], classes=str(words))
  assert none.missing["norm"] == "none of the 1 classes is seen 2 times in the 1 texts (0 are seen once)"
  (pooled,) = collapse.neural_collapse([tiny], TEXTS, classes=str(words), pieces="pooled", min_count=1)
  assert pooled.about["of"] == 3 and "cat" in pooled.classes
  spans = [Text("the cat a the", ((4, 7, "animal"), (8, 9, "article"), (10, 13, "article")))] * 3
  (own,) = collapse.neural_collapse([tiny], spans, classes="labels", pieces="pooled", shift="0")
  assert own.classes == ("animal", "article") and "no output weights" in own.missing["similarity"]
  assert own.result.estimates["overall"]["cdnv"].value >= 0
  (some,) = collapse.neural_collapse([tiny], TEXTS, classes="random:3", seed=1)
  assert len(some.classes) == 3 and some.about["of"] == tiny.config.vocab_size


@pytest.mark.parametrize(("asked", "said"), [
  ({"classes": "random:x"}, "write random:N"), ({"pieces": "all"}, "it is one of single, first, pooled"),
  ({"shift": "2"}, "it is one of auto, 0, 1"), ({"min_count": 0}, "at least one sample"),
  ({"held_out": 1.0}, "from 0 to below 1"), ({"sites": ["head"]}, "did you mean `head_input`"),
  ({"classes": "labels"}, "no text has `labels`"), ({"window": 2}, "it has to be 4 or more"),
])  # fmt: skip
def test_what_cannot_be_asked_is_named(tiny, asked, said):
  with pytest.raises(UserError, match=said):
    collapse.neural_collapse([tiny], TEXTS, **{"classes": "vocabulary"} | asked)


def test_another_tokenizer_is_refused(tiny):
  plan = collapse.prepare(tiny, TEXTS, "vocabulary")
  other = dataclasses.replace(tiny, tokenizer=dataclasses.replace(tiny.tokenizer, fingerprint="another"))
  with pytest.raises(UserError, match="has another tokenizer"):
    collapse.measure(other, plan)


# Eight devices


def worker(path: str, out: str) -> None:
  from jaxbias.mesh import make_mesh

  assert jax.device_count() == 8
  jax.config.update("jax_disable_most_optimizations", True)
  arrays = {}
  for devices in (1, 8):
    model = language_model.load(path, "float32", make_mesh({"data": -1}, jax.devices()[:devices]))
    plan = collapse.prepare(model, TEXTS, "vocabulary")
    assert plan.fit[0]["tokens"].shape[0] == 8 * devices
    weight = collapse.weights(model, plan.classes, model.params)
    found = collect(model.module, model.mesh, {"params": model.params}, plan.fit, plan.held, len(plan.classes), weight,
                    sites=("layer_1", "head_input"))  # fmt: skip
    for site, one in found.items():
      arrays |= {f"{devices} {site} {name}": value for name, value in one._asdict().items()}
  np.savez(out, **arrays)


def test_eight_devices_sum_to_one(make_gguf, cache, tmp_path):
  path, out = make_gguf(tensors=llama_tensors(seed=3)), tmp_path / "out.npz"
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-m", "tests.evals.test_collapse_models", str(path), str(out)], cwd=ROOT, check=True,
                 env=environment)  # fmt: skip
  found = np.load(out)
  for name in [name for name in found.files if name.startswith("8")]:
    one, eight = found["1" + name[1:]], found[name]
    assert_allclose(eight, one, rtol=1e-4, atol=1e-4)
    assert one.dtype == eight.dtype and (one.dtype != np.int64 or (one == eight).all())


if __name__ == "__main__":
  worker(*sys.argv[1:])
