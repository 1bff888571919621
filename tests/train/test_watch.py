"""Looks at a run while it trains: exact at the start, the same after an interruption, free of recompilation."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias import cli
from jaxbias import compare as comparison
from jaxbias import config as configs
from jaxbias.evals import forgetting, probe
from jaxbias.losses.registry import parse
from jaxbias.models.lora import merge
from jaxbias.progress import Tracker
from jaxbias.train import conflict
from jaxbias.train.loop import Run, train
from jaxbias.train.step import loss
from jaxbias.train.watch import Watcher
from tests.evals.looks import UNCHANGED, whole_logits
from tests.train import Workplace, lines, read, untimed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


@pytest.fixture(scope="module")
def general(tmp_path_factory):
  """Ten texts of four documents, some of them about a cat; the field `kind` says which."""
  path = tmp_path_factory.mktemp("general") / "general.jsonl"
  texts = [("she", "He sat on the mat."), ("cat", "the cat ran")] * 3 + [("rain", f"it rained {n}") for n in range(4)]
  rows = [{"id": f"g{i}", "text": f"{text} {i}", "document": f"d{i % 4}", "kind": kind}
          for i, (kind, text) in enumerate(texts)]  # fmt: skip
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def arguments(tiny, workdir, general, **more) -> list[str]:
  settings = {"compare": "('npo',)", "seeds": "(0,)", "watch.steps": "0,1,3", "watch.general": general,
              "watch.group": "kind"} | more  # fmt: skip
  return ["--config", str(tiny.config), "--workdir", str(workdir),
          *(f"--config.{key}={value}" for key, value in settings.items())]  # fmt: skip


@pytest.fixture(scope="module")
def watched(tiny, general, tmp_path_factory):
  """The work folder of a comparison that was looked at."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXBIAS_CACHE", str(tiny.cache))
    workdir = tmp_path_factory.mktemp("watched") / "run"
    assert cli.main(["compare", *arguments(tiny, workdir, general)]) == 0
    yield workdir


@pytest.fixture(scope="module")
def job(tiny, general, watched, tmp_path_factory):
  given = [a for a in arguments(tiny, "", general) if a.startswith("--config.")]
  config = configs.from_command_line([f"--config={tiny.config}", *given])[0]
  return comparison.prepare(config, tmp_path_factory.mktemp("job") / "work", "a test")


@pytest.fixture(scope="module")
def run(job) -> Run:
  npo = job.variants[0]
  return Run(job.workdir / "npo-seed0", job.plain, npo.objective, npo.coefficients, job.sampler(npo, 0, None),
             job.shapes()[npo.objective], watch=job.watch(Tracker("test", 1.0, quiet=True)))  # fmt: skip


def moved(job, run: Run, size: float = 0.3):
  """A state whose adapters do something."""
  state = job.trainer.initial_state(0, run.objective)
  rng = np.random.default_rng(1)
  return state.replace(params=jax.tree.map(lambda x: x + size * rng.standard_normal(x.shape, np.float32), state.params))


def frozen_of(job) -> dict:
  return {"params": job.trainer.model.params, "lora_scale": job.trainer.scale}


# A run that is watched


def test_a_look_at_the_start_finds_nothing_forgotten_to_the_last_bit(watched):
  first, *later = lines(watched / "npo-seed0" / "watch.jsonl")
  assert [first["step"], *(line["step"] for line in later)] == [0, 1, 3, 6]
  for group in ("overall", "span"):
    assert first[group].keys() == forgetting.BENCHMARK.metrics.keys()
    for name in UNCHANGED:
      assert set(first[group][name].values()) == {0.0}, name
    assert first[group]["perplexity_ratio"]["value"] == 1.0
  assert first["distance"] == 0.0
  for line in later:
    assert line["distance"] > 0 and line["overall"]["f_all"]["value"] != 0 and line["overall"]["kl"]["value"] > 0
    assert line["span"]["f_st"]["value"] != line["overall"]["f_st"]["value"]
  assert np.all(np.diff([line["distance"] for line in (first, *later)]) > 0)


def test_groups_of_general_text_add_up_in_every_line(watched):
  for line in lines(watched / "npo-seed0" / "watch.jsonl"):
    groups = line["groups"]
    assert {name: part["share"] for name, part in groups["kind"].items()} == {"cat": 0.3, "rain": 0.4, "she": 0.3}
    assert {name: part["share"] for name, part in groups["gender"].items()} == {"gendered": 0.3, "not gendered": 0.7}
    for parts in groups.values():
      for metric in ("f_all", "kl"):
        total = sum(part["share"] * part[metric]["value"] for part in parts.values())
        assert_allclose(total, line["overall"][metric]["value"], atol=1e-12)


def test_the_last_look_is_what_the_run_is_reported_with(watched):
  line, row = lines(watched / "npo-seed0" / "watch.jsonl")[-1], read(watched / "results.json")["rows"][1]
  assert line["overall"]["f_all"] and read(watched / "results.json")["watch"]["npo"]["0"][-1] == line
  drawn = {path.name for path in (watched / "figures").iterdir()}
  assert {f"{name}.{kind}" for name in ("forgetting_path", "gradient_conflict") for kind in ("svg", "png")} <= drawn
  assert row["name"] == "npo" and "forgetting against" in (watched / "report.html").read_text().lower()


@pytest.mark.parametrize("kept, extra", [(3, '{"step": 6, "over'), (None, "")])
def test_a_continued_run_looks_as_an_uninterrupted_one(watched, tiny, general, tmp_path, monkeypatch, kept, extra):
  """As if killed behind step 3 in the middle of a line, and before anything was saved."""
  monkeypatch.setenv("JAXBIAS_CACHE", str(tiny.cache))
  again = shutil.copytree(watched, tmp_path / "run")
  folder = again / "npo-seed0"
  (folder / "evaluation.json").unlink()
  shutil.rmtree(folder / "checkpoints" / "6") if kept else shutil.rmtree(folder / "checkpoints")
  with (folder / "watch.jsonl").open("a") as out:
    out.write(extra)
  assert cli.main(["compare", *arguments(tiny, again, general)]) == 0
  assert (folder / "watch.jsonl").read_bytes() == (watched / "npo-seed0" / "watch.jsonl").read_bytes()
  assert untimed(lines(folder / "metrics.jsonl")) == untimed(lines(watched / "npo-seed0" / "metrics.jsonl"))


def test_a_run_is_the_same_with_looks_and_without(watched, job, run):
  ref = comparison.reference.compute(job.trainer.model, job.reference_segments(), job.workdir / "reference")
  plain = dataclasses.replace(run, watch=None, folder=job.workdir / "plain",
                              sampler=dataclasses.replace(run.sampler, reference=ref))  # fmt: skip
  train(job.trainer, plain)
  assert not (plain.folder / "watch.jsonl").exists()
  assert untimed(lines(plain.folder / "metrics.jsonl")) == untimed(lines(watched / "npo-seed0" / "metrics.jsonl"))


def test_of_ten_looks_the_first_alone_compiles(job, run):
  compiled = []
  monitoring.register_event_duration_secs_listener(
    lambda event, _, **more: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None)
  run.folder.mkdir(parents=True, exist_ok=True)
  watcher, counts = Watcher(job.trainer, run, run.watch, done=0), []
  coefficients = jax.tree.map(jnp.float32, run.coefficients)
  for step in range(10):
    state = moved(job, run, 0.01 * step).replace(step=jnp.int32(step))
    assert compiled, "the listener hears of what `moved` compiled"
    compiled.clear()
    watcher.look(state, run.sampler, frozen_of(job), coefficients)
    counts.append(len(compiled))
  assert counts[1:] == [0] * 9
  assert [line["step"] for line in lines(watcher.path)] == list(range(10))


# What a look computes


def test_losses_and_divergence_are_those_of_whole_logits(job, run):
  state, model = moved(job, run), job.trainer.model
  found = probe.look(model, job.probe, run.watch.start, job.trainer.adapters(state), "sum")
  variables = {"params": model.params, **job.trainer.adapters(state)}

  whole = whole_logits(model)
  log_p = lambda variables, ids: whole(variables, np.array([model.tokenizer.start_id, *ids]))[:-1]
  for i in (0, 7):
    ids = model.tokenizer.encode(job.probe.general.texts[i].text)
    now, start = log_p(variables, ids), log_p({"params": model.params}, ids)
    assert_allclose(found.general[i], -now[np.arange(len(ids)), ids].mean(), rtol=1e-5)
    assert_allclose(found.kl[i], (np.exp(start) * (start - now)).sum(-1).mean(), rtol=1e-4)
  triple = job.probe.triples[3]
  for label, sentence in enumerate(triple.sentences):
    ids = model.tokenizer.encode(sentence)
    each = -log_p(variables, ids)[np.arange(len(ids)), ids]
    filling = range(len(ids) - len(model.tokenizer.encode(sentence[triple.prefix :])), len(ids) - 1)  # but for the "."
    span = job.probe.spans[3][label]
    assert set(filling) >= set(range(span.start, span.stop)) and span.stop - span.start >= len(filling) - 1
    assert_allclose([found.sentences[3, label], found.spans[3, label]], [each.mean(), each[span].mean()], rtol=1e-5)
    assert_allclose(found.score[3, label], -each.sum(), rtol=1e-5)


def test_gradients_of_the_terms_are_those_of_each_term_alone(job, run):
  state, frozen = moved(job, run), frozen_of(job)
  batches = [run.sampler.batch(i, run.shape)[0] for i in range(2)]
  coefficients = jax.tree.map(jnp.float32, run.coefficients["losses"])
  keys = list(coefficients)
  spec = job.variants[0].spec["losses"]

  def flat(key: str, batch) -> np.ndarray:
    objective, values = parse({key: spec[key]})
    batch = jax.tree.map(jnp.asarray, batch)
    module = job.trainer.model.module
    of = lambda params: loss(module, objective, state.replace(params=params), frozen, batch, values, {})
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.grad(of, has_aux=True)(state.params)[0])])

  gradients = np.array([np.mean([flat(key, batch) for batch in batches], axis=0) for key in keys], np.float64)
  found = conflict.measure(job.trainer.model.module, run.objective, state, frozen, batches, {"losses": coefficients})
  assert_allclose(found, gradients @ gradients.T, rtol=1e-3, atol=1e-6)
  none_trains = {"losses": coefficients, "remedy": {"layers": jnp.zeros(job.trainer.model.config.num_layers)}}
  nothing = conflict.measure(job.trainer.model.module, run.objective, state, frozen, batches, none_trains)
  assert_array_equal(nothing, 0)  # adapters are in layers alone
  said = conflict.describe(keys, found)
  norms = np.linalg.norm(gradients, axis=1)
  assert set(keys) == {"kl", "npo", "sft"}
  assert_allclose([said["norm"][key] for key in keys], norms, rtol=1e-3)
  assert_allclose(said["norm"]["total"], np.linalg.norm(gradients.sum(0)), rtol=1e-3)
  for i, j in ((0, 1), (0, 2), (1, 2)):
    cosine = gradients[i] @ gradients[j] / norms[i] / norms[j]
    assert_allclose(said["cosine"][f"{keys[i]} | {keys[j]}"], cosine, atol=1e-3)


@pytest.mark.parametrize("small", [0.0, 1e-6])
def test_a_term_without_a_gradient_has_no_cosine(small):
  said = conflict.describe(["a", "b"], np.array([[4.0, small], [small, small**2]]))
  assert said["norm"] == {"a": 2.0, "b": small, "total": pytest.approx(2.0, abs=1e-5)}
  assert said["cosine"] == {"a | b": None}


def test_the_distance_is_that_of_merged_weights(job, run):
  state, params = moved(job, run), job.trainer.model.params
  coefficients = jax.tree.map(jnp.float32, run.coefficients)
  halved = dataclasses.replace(run, adapter_scale=-0.5, folder=job.workdir / "halved")
  halved.folder.mkdir()
  Watcher(job.trainer, halved, run.watch, 0).look(state, run.sampler, frozen_of(job), coefficients)
  merged = merge(params, {"layers": state.params["layers"]}, job.trainer.scale)
  square = sum(jax.tree.leaves(jax.tree.map(lambda new, old: float(((new - old) ** 2).sum()), merged, params)))
  assert_allclose(lines(halved.folder / "watch.jsonl")[0]["distance"], 0.5 * np.sqrt(square), rtol=1e-4)


# Refusals


@pytest.mark.parametrize("key, value, said", [
  ("steps", "0,ten", "`ten` is no step of a run of 6"),
  ("steps", "0,7", "`7` is no step of a run of 6"),
  ("split", "tset", "watch.split = `tset` is not known; did you mean `test`?"),
  ("group", "kind", "a field of the file watch.general, which is not given"),
  ("batches", "0", "gradients need at least one"),
  ("mask_draws", "3", "fewer than 4"),
  ("mask_share", "1.0", "above 0 and below 1"),
  ("mask_seed", "-1", "whole number from 0 on"),
  ("general", "nowhere.jsonl", "there is no such file"),
])  # fmt: skip
def test_bad_settings_are_named_before_anything_runs(tiny, tmp_path, capsys, key, value, said):
  given = {"watch.steps": "log", "watch.general": "", "watch.group": "", f"watch.{key}": value}
  assert cli.main(["compare", *arguments(tiny, tmp_path / "x", "", **given)]) == 2
  assert said in capsys.readouterr().err


@pytest.mark.parametrize("steps, total, expected", [
  ("log", 6, (0, 1, 3, 6)), ("log", 300, (0, 1, 3, 10, 30, 100, 300)), ("log", 1, (0, 1)),
  ("log", 100, (0, 1, 3, 10, 30, 100)), ("", 6, ()), (" 0, 5,5", 6, (0, 5)),
])  # fmt: skip
def test_steps_of_looks(steps, total, expected):
  c = configs.defaults()
  c.watch.steps, c.train.steps = steps, total
  assert configs.watched(c) == expected
