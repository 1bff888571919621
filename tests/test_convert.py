"""`convert` and runs as models: what a trained run becomes elsewhere, its card, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

import jaxbias
from jaxbias import convert as converting
from jaxbias.cli import main
from jaxbias.convert import convert
from jaxbias.data.rows import Choice
from jaxbias.errors import UserError
from jaxbias.evals.scoring import score
from jaxbias.models import language_model, peft
from jaxbias.models.adapted import Adapted, find
from jaxbias.models.checkpoints import read_config
from jaxbias.models.lora import LoraConfig, init_lora, merge
from jaxbias.train.checkpoint import Checkpoints
from jaxbias.types import TrainState
from tests.train import Workplace, read, tiny_model

LORA = {"rank": 2, "alpha": 6.0, "targets": ["q", "down"]}
METRICS = {
  "ss": {"label": "SS", "unit": "%", "ideal": 50.0, "better": "ideal", "help": "stereotype score"},
  "f_all": {"label": "F_all", "unit": "nats/token", "ideal": 0.0, "better": "lower", "help": "overall forgetting"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def loaded(base) -> language_model.LanguageModel:
  return language_model.load(str(base))


def factors(model: language_model.LanguageModel) -> dict:
  config = LoraConfig(LORA["rank"], LORA["alpha"], tuple(LORA["targets"]))
  rng = np.random.default_rng(3)
  drawn = init_lora(jax.random.key(0), model.params, config)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), drawn)


@pytest.fixture
def run(base, loaded, tmp_path) -> Path:
  """A finished run's folder, as `compare` leaves it: WORKDIR/npo-seed1, of seeds 0 and 1."""
  folder = tmp_path / "work" / "npo-seed1"
  config = {"model": str(base), "lora": LORA, "train": {"steps": 6}, "variant": "npo", "seed": 1,
            "variants": {"npo": {"losses": {"npo": {"weight": 1.0, "beta": 0.1}}}}}  # fmt: skip
  lora = factors(loaded)
  checkpoints = Checkpoints(folder / "checkpoints")
  for step, state in ((3, jax.tree.map(jnp.zeros_like, lora)), (6, lora)):
    checkpoints.save(TrainState(jnp.int32(step), state, {"mu": lora}), config)
  checkpoints.close()
  estimate = lambda value, seeds: {"value": value, "low": 0.9 * value, "high": 1.1 * value, "per_seed": seeds}
  trained = {"ss": estimate(53.0, [52.0, 54.0]), "f_all": estimate(0.0124, [0.011, 0.0138])}
  rows = [{"name": "base", "label": "base model", "estimates": {"ss": estimate(64.0, [64.0])}},
          {"name": "npo", "label": "NPO", "estimates": trained}]  # fmt: skip
  made = {"command": "python -m jaxbias compare --config=x.py", "config_hash": "0123456789ab", "created": "2026-01-02",
          "hardware": "2 cores", "versions": {"jax": "0.10.2"}, "git": {"commit": "abc", "dirty": False}}  # fmt: skip
  results = {"schema": 1, "title": "T", "model": {"source": str(base), "fingerprint": loaded.fingerprint},
             "data": {"name": "triples", "fingerprint": "fff"}, "seeds": [0, 1], "steps": 6, "interval": "95 %",
             "metrics": METRICS, "rows": rows, **made}  # fmt: skip
  (folder.parent / "results.json").write_text(json.dumps(results))
  (folder.parent / "provenance.json").write_text(json.dumps(made))
  return folder


def merged(model: language_model.LanguageModel) -> dict:
  return merge(model.params, factors(model), {"scale": np.full(2, LORA["alpha"] / LORA["rank"])})


def assert_same(ours, theirs, atol: float = 0.0) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=atol), ours, theirs)


# What is written


def test_a_run_becomes_a_hugging_face_folder_with_its_card(run, base, loaded, tmp_path, capsys):
  out = tmp_path / "out"
  assert main(["convert", "--run", str(run), "--to", "hf", "--out", str(out)]) == 0
  assert capsys.readouterr().out == f"model: {out}\n"
  assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
  assert_same(language_model.load(str(out)).params, merged(loaded), atol=1e-6)
  assert read_config(out) == read_config(base) | {"torch_dtype": "float32"}
  assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
  card = (out / "README.md").read_text()
  for said in (
    "library_name: transformers", "# tiny, NPO", '"npo": {"weight": 1.0', "seed 1, step 6 of 6",
    "| metric | base model | this variant, mean of 2 seeds | seed 1 |",
    r"| SS % → 50 | 64.0 \[57.6, 70.4] | 53.0 \[47.7, 58.3] | 54.0 |",
    r"| F_all nats/token ↓ 0 | n/a | +0.012 \[0.011, 0.014] | +0.014 |", "In brackets: 95 %.", "AutoModelForCausalLM",
    "### Intended use", "### Limits", loaded.fingerprint, "hash `0123456789ab`", "commit: abc", "jax 0.10.2",
    "python -m jaxbias compare --config=x.py", "python -m jaxbias ",
  ):  # fmt: skip
    assert said in card, said


def test_a_run_becomes_an_adapter_and_the_adapter_the_same_model(run, base, loaded, tmp_path):
  """Run, PEFT folder and merged folder are one model; adapters go round bit for bit."""
  assert convert(None, run, "peft", tmp_path / "adapter") == []
  assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"README.md", peft.CONFIG, peft.WEIGHTS}
  back = peft.load_adapters(tmp_path / "adapter", loaded.config)
  jax.tree.map(assert_array_equal, back["lora"], factors(loaded))
  jax.tree.map(assert_array_equal, find(run).read(loaded.config)["lora"], factors(loaded))
  assert back["lora_scale"]["scale"].tolist() == [3.0, 3.0]
  assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
  models = [language_model.load(str(source)) for source in (run, tmp_path / "adapter")]
  assert_same(models[0].params, models[1].params)
  assert models[0].fingerprint == models[1].fingerprint != loaded.fingerprint
  assert_same(models[0].params, merged(loaded), atol=1e-6)
  assert models[0].name == "tiny + npo-seed1"
  convert(str(tmp_path / "adapter"), None, "hf", tmp_path / "merged")
  assert_same(language_model.load(str(tmp_path / "merged")).params, models[0].params, atol=1e-6)
  assert "the adapter adapter" in (tmp_path / "merged" / "README.md").read_text()


def test_a_model_alone_is_written_as_it_is(base, loaded, tmp_path):
  convert(str(base), None, "hf", tmp_path / "out")
  ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
  assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
  convert(str(base), None, "hf", tmp_path / "half", dtype="bfloat16")
  half = language_model.load(str(tmp_path / "half"))
  assert_same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params))
  convert(str(tmp_path / "half"), None, "hf", tmp_path / "again")  # its own dtype
  assert read_config(tmp_path / "again")["torch_dtype"] == "bfloat16"


def test_a_run_that_trained_the_base_as_well(run, loaded, tmp_path):
  """Its leaves are exchanged before adapters are merged; a loss's own parameters stay behind."""
  embedding = np.asarray(loaded.params["embedding"]) + 1
  config = find(run).run
  for step, layers in ((7, factors(loaded)), (8, {})):
    params = layers | {"base": {"embedding": jnp.asarray(embedding)}, "losses": {"head": {"w": jnp.ones(3)}}}
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(TrainState(jnp.int32(step), params, {"mu": jnp.zeros(2)}), config)
    checkpoints.close()
    expected = (merged(loaded) if layers else loaded.params) | {"embedding": embedding}
    assert_same(language_model.load(str(run)).params, expected, atol=1e-6)
    convert(None, run, "hf", tmp_path / str(step))
    assert_same(language_model.load(str(tmp_path / str(step))).params, expected, atol=1e-6)
    with pytest.raises(UserError, match=r"trained parameters of the base itself \(train.base\).*ask for --to=hf"):
      convert(None, run, "peft", tmp_path / "adapter")


def test_a_run_on_a_model_of_another_size(run, tmp_path, make_gguf, cache):
  with pytest.raises(UserError, match="npo-seed1 does not fit this model: the adapter of layers/.* is for another"):
    convert(str(make_gguf()), run, "hf", tmp_path / "out")


def test_a_gguf_becomes_a_hugging_face_folder(make_gguf, cache, tmp_path):
  path = make_gguf()
  convert(str(path), None, "hf", tmp_path / "out")
  assert_same(language_model.load(str(tmp_path / "out")).params, language_model.load(str(path)).params)


def test_a_finished_run_is_fused_with_its_base(run, loaded):
  """docs/losses.md: theta_0 + factor * (theta - theta_0); 0 is the base to the last bit."""
  start, half, whole = (jaxbias.load(str(run), "float32", factor=factor).params for factor in (0.0, 0.5, 1.0))
  assert_same(start, loaded.params)
  jax.tree.map(lambda a, b, c: assert_allclose(b, (a + c) / 2, atol=1e-6), start, half, whole)
  kernel = lambda params: params["layers"]["mlp"]["down"]["kernel"]
  assert np.abs(kernel(whole) - kernel(start)).max() > 0.1


@pytest.mark.parametrize("control, said", [("", ["the run is at step 4 of 8: its training did not finish."]),
                                           ("signed", [])])
def test_the_best_state_of_a_controlled_run_is_no_unfinished_run(tmp_path, control, said):
  found = Adapted(tmp_path, "base", dict, {"train": {"steps": 8}, "control": {"name": control}}, step=4)
  assert converting._notes(found, "base", SimpleNamespace(fingerprint="f"), None) == said


def test_what_a_user_should_know_is_said_and_in_the_card(run, loaded, tmp_path, capsys):
  """A run that did not finish, and weights that are not those it was trained on."""
  shutil.rmtree(run / "checkpoints" / "6")
  other = tiny_model(tmp_path / "other")
  weights = (other / "model.safetensors").read_bytes()
  (other / "model.safetensors").write_bytes(weights[:-4] + np.float32(2).tobytes())
  assert main(["convert", "--model", str(other), "--run", str(run), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
  said = capsys.readouterr().err
  for note in ("step 3 of 6: its training did not finish", "the adapters were trained on other weights"):
    assert note in said and note in (tmp_path / "out" / "README.md").read_text()
  (run.parent / "results.json").unlink()
  convert(None, run, "peft", tmp_path / "adapter")
  assert "nothing is claimed here about its bias" in (tmp_path / "adapter" / "README.md").read_text()


# What is refused


@pytest.mark.parametrize("arguments,said", [
  ((None, None, "hf"), "name what to convert: a model with --model, a trained run with --run"),
  (("BASE", None, "peft"), "has no adapters of its own to write; name a run with --run"),
  ((None, "RUN", "peft", "bfloat16"), "--dtype is for --to=hf"),
  ((None, "WORK", "hf"), "not the folder of a training run: it has no checkpoints; it holds the runs npo-seed1"),
  ((None, "BASE", "hf"), "not the folder of a training run: it has no checkpoints."),
  (("./nowhere", None, "hf"), "there is no file or folder ./nowhere"),
])  # fmt: skip
def test_arguments_that_do_not_fit_together(arguments, said, run, base, tmp_path):
  places = {"BASE": str(base), "RUN": run, "WORK": run.parent}
  source, folder, to, *dtype = (places.get(argument, argument) for argument in arguments)
  with pytest.raises(UserError) as error:
    convert(source, folder and Path(folder), to, tmp_path / "out", *dtype)
  assert said in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused_at_once(run, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(language_model, "load", None)
  assert main(["convert", "--run", str(run), "--to", "hf", "--out", str(tmp_path)]) == 2
  assert capsys.readouterr().err.startswith(f"jaxbias: {tmp_path} exists already and is not an empty folder")


def test_a_run_without_a_whole_checkpoint(run, tmp_path):
  config = language_model.load(str(run)).config
  for path in (run / "checkpoints" / "6" / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"cut")
  with pytest.raises(UserError, match=r"the checkpoint .*checkpoints/6 is damaged; delete it"):
    find(run).read(config)
  shutil.rmtree(run / "checkpoints" / "6")
  shutil.rmtree(run / "checkpoints" / "3")
  with pytest.raises(UserError, match="npo-seed1 has no whole checkpoint yet; run the training command again"):
    language_model.load(str(run))


def test_an_adapter_that_names_no_base(run, tmp_path):
  convert(None, run, "peft", tmp_path / "adapter")
  hf = read(tmp_path / "adapter" / peft.CONFIG)
  (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(hf | {"base_model_name_or_path": None}))
  with pytest.raises(UserError, match="names no base model; write its name to `base_model_name_or_path`"):
    language_model.load(str(tmp_path / "adapter"))
  for named, source in (("org/name", "hf:org/name"), ("smollm2-135m-instruct", "smollm2-135m-instruct")):
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(hf | {"base_model_name_or_path": named}))
    assert find(tmp_path / "adapter").base == source


# A real run


def test_a_trained_run_scores_as_base_and_adapters_do(tmp_path_factory):
  """The newest checkpoint of a comparison, read by the library that wrote it, on the base that the run started from."""
  tiny = Workplace.of(tmp_path_factory)
  run = tiny.finished() / "sft-seed1"
  base, model = (language_model.load(str(source)) for source in (tiny.folder / "model", run))
  with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
    restored = manager.restore(6, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]["params"]
  adapters = {"lora": {"layers": restored["layers"]}, "lora_scale": {"scale": np.full(2, 16.0 / 2, np.float32)}}
  rows = [Choice(name, f"{name} sat on", (" the cat.", " a hat.", " 12.")) for name in ("he", "the cat")]
  before, theirs, ours = score(base, rows), score(base, rows, adapters), score(model, rows)
  sums = lambda scores: np.array([option[0] for row in rows for option in scores[row.id]])
  assert np.abs(sums(ours) - sums(theirs)).max() < 1e-3 < 0.1 < np.abs(sums(before) - sums(theirs)).max()
