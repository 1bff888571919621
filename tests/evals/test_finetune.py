"""Fine-tuning on a downstream task: what is learned, what an interruption costs, and the command."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias import cli
from jaxbias import finetune as finetuning
from jaxbias.config import to_dict
from jaxbias.data import glue
from jaxbias.data.glue import TASKS, Example
from jaxbias.errors import UserError
from jaxbias.evals import downstream
from jaxbias.finetune import Settings, finetune
from jaxbias.models import language_model
from jaxbias.models.adapted import find
from jaxbias.train.loop import TrainingFailed
from tests.evals.answering import write_model
from tests.train import read

BOTH = pytest.mark.parametrize("name", ["llama", "bert"])
QUICK = Settings(seeds=(0,), rank=4, learning_rate=2e-2, epochs=4, batch=16)


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
  """Random words, and one of two that says the label."""
  rng, others = np.random.default_rng(seed), ["the", "cat", "sat"]
  out = []
  for n in range(count):
    words = [*rng.choice(others, rng.integers(1, 4)), ("he", "she")[n % 2]]
    out.append((" ".join(rng.permutation(words)), n % 2))
  return out


def write(path: Path, rows: list[tuple], head: str = "sentence\tlabel") -> Path:
  path.write_text("".join(line + "\n" for line in (head, *("\t".join(map(str, row)) for row in rows))))
  return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("toy")
  write(folder / "train.tsv", sentences(160, 0))
  write(folder / "dev.tsv", sentences(50, 1))
  return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return functools.cache(lambda name: write_model(name, folder / name))


def logits_of(folder: Path) -> np.ndarray:
  return np.array(read(folder / finetuning.ANSWERS)["logits"])


# Learning


@BOTH
def test_a_separable_task_is_learned_and_the_run_is_a_model(models, data, tmp_path, name):
  table, failed = finetune(str(models(name)), "sst2", [str(data)], QUICK, tmp_path / "w")
  found = read(tmp_path / "w" / "finetune.json")
  assert not failed and found["estimates"]["accuracy"]["value"] >= 90.0
  assert found["estimates"]["majority"]["value"] == 50.0 and found["spread"] is None
  folder = tmp_path / "w" / "sst2-seed0"
  model, before = language_model.load(str(folder), "float32"), language_model.load(str(models(name)), "float32")
  assert model.fingerprint != before.fingerprint == found["model"]["fingerprint"]
  dev = glue.read(str(data / "dev.tsv"), TASKS["sst2"], "dev")
  segments = downstream.encode(dev, model.tokenizer, model.config.causal, 128).segments
  merged = downstream.predict(model, segments, head_of(folder))
  assert_allclose(merged, logits_of(folder), atol=2e-3)


def head_of(folder: Path) -> dict:
  with ocp.CheckpointManager(folder.absolute() / "checkpoints") as manager:
    state = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
  return state["params"]["losses"]["classify"]


def test_all_of_the_base_can_train(models, data, tmp_path):
  settings = Settings(seeds=(0,), rank=0, base=("*",), epochs=1, batch=32, train_limit=40, limit=10)
  finetune(str(models("llama")), "sst2", [str(data)], settings, tmp_path / "w")
  found, adapted = read(tmp_path / "w" / "finetune.json"), find(tmp_path / "w" / "sst2-seed0")
  assert found["settings"]["train"]["learning_rate"] == finetuning.BASE_RATE
  assert found["data"]["train"]["subset"] == "the first 40 of 160 examples"
  assert found["data"]["dev"] | {"source": ""} == {"source": "", "examples": 10, "of": 50, "truncated": 0,
                                                   "subset": "the first 10 of 50 examples"}  # fmt: skip
  before = language_model.load(str(models("llama")), "float32")
  trained = adapted.read(before.config)["params"]
  assert found["model"]["trainable"] == before.num_parameters == sum(x.size for x in jax.tree.leaves(trained))
  kernel, start = (tree["layers"]["mlp"]["up"]["kernel"] for tree in (trained, before.params))
  assert not np.array_equal(kernel, start)


# Seeds, and stopping in the midst


@pytest.fixture(scope="module")
def finished(models, data, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("finished") / "w"
  finetune(str(models("llama")), "sst2", [str(data)], SEEDS, workdir)
  return workdir


SEEDS = Settings(seeds=(0, 1), rank=2, learning_rate=5e-3, epochs=2, batch=16)


def test_a_seed_gives_the_same_numbers_alone_and_another_seed_others(finished, models, data, tmp_path):
  finetune(str(models("llama")), "sst2", [str(data)], Settings(**vars(SEEDS) | {"seeds": (1,)}), tmp_path / "w")
  assert_array_equal(logits_of(tmp_path / "w" / "sst2-seed1"), logits_of(finished / "sst2-seed1"))
  assert np.abs(logits_of(finished / "sst2-seed0") - logits_of(finished / "sst2-seed1")).max() > 1e-3
  found = read(finished / "finetune.json")
  assert list(found["seeds"]) == ["0", "1"] and found["missing_seeds"] == []
  by_seed = [found["seeds"][seed]["accuracy"] for seed in "01"]
  assert by_seed == found["estimates"]["accuracy"]["per_seed"]
  assert_allclose(found["spread"], abs(by_seed[0] - by_seed[1]) / np.sqrt(2), atol=1e-9)
  assert found["predicted"]["1"] == logits_of(finished / "sst2-seed1").argmax(-1).tolist()


def test_what_was_finished_is_kept_and_the_rest_goes_on_where_it_stopped(finished, models, data, tmp_path, monkeypatch):
  original, stop = finetuning.train, {"seed": 1, "step": 13}

  def stopping(trainer, run, on_step):
    def told(record):
      on_step(record)
      if (run.sampler.seed, record["step"]) == (stop["seed"], stop["step"]):
        raise KeyboardInterrupt

    return original(trainer, run, told)

  monkeypatch.setattr(finetuning, "train", stopping)
  again = functools.partial(finetune, str(models("llama")), "sst2", [str(data)], SEEDS, tmp_path / "w")
  with pytest.raises(KeyboardInterrupt):
    again()
  kept = read(tmp_path / "w" / "finetune.json")
  assert list(kept["seeds"]) == ["0"] and kept["missing_seeds"] == [1]
  trained = []
  monkeypatch.setattr(finetuning, "train", lambda trainer, run, on_step: original(
    trainer, run, lambda record: trained.append((run.sampler.seed, record["step"])) or on_step(record)))  # fmt: skip
  again()
  steps = read(finished / "finetune.json")["settings"]["train"]["steps"]
  assert trained == [(1, step) for step in range(11, steps + 1)], "from the checkpoint of step 10"
  for seed in (0, 1):
    assert_array_equal(logits_of(tmp_path / "w" / f"sst2-seed{seed}"), logits_of(finished / f"sst2-seed{seed}"))
  ours, theirs = (read(folder / "finetune.json") for folder in (tmp_path / "w", finished))
  assert ours["estimates"] == theirs["estimates"] and ours["predicted"] == theirs["predicted"]


def test_a_seed_that_fails_costs_only_itself(models, data, finished, tmp_path, monkeypatch):
  original = finetuning.train

  def failing(trainer, run, on_step):
    if run.sampler.seed == 0:
      raise TrainingFailed("sst2-seed0: the gradient is not finite")
    return original(trainer, run, on_step)

  monkeypatch.setattr(finetuning, "train", failing)
  short = Settings(**vars(SEEDS) | {"epochs": 0.2})
  _, failed = finetune(str(models("llama")), "sst2", [str(data)], short, tmp_path / "w")
  found = read(tmp_path / "w" / "finetune.json")
  assert failed == ["sst2-seed0: the gradient is not finite"]
  assert list(found["seeds"]) == ["1"] and found["missing_seeds"] == [0]
  with pytest.raises(UserError, match="the gradient is not finite"):
    finetune(str(models("llama")), "sst2", [str(data)], Settings(**vars(short) | {"seeds": (0,)}), tmp_path / "other")


def test_a_folder_of_other_settings_or_other_data_is_left_alone(finished, models, data, tmp_path):
  other = Settings(**vars(SEEDS) | {"rank": 3})
  with pytest.raises(UserError, match="belongs to another config .*lora.rank: 2 there, 3 here"):
    finetune(str(models("llama")), "sst2", [str(data)], other, finished)
  changed = write(tmp_path / "train.tsv", sentences(160, 5))
  with pytest.raises(UserError, match="belongs to another config .*sha256"):
    finetune(str(models("llama")), "sst2", [f"train={changed}", f"dev={data / 'dev.tsv'}"], SEEDS, finished)


# Figures


def test_accuracy_majority_gain_and_spread():
  label_E = np.array([0, 0, 1, 1, 1, 1, 0, 1])
  predicted_ME = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0, 0]])
  found = downstream.reduce(label_E, predicted_ME, 1)
  assert found["accuracy"].per_seed == (87.5, 62.5) and found["accuracy"].value == 75.0
  assert found["majority"].value == 62.5 and found["gain"].per_seed == (25.0, 0.0)
  assert_allclose(downstream.spread(found["accuracy"]), np.std([87.5, 62.5], ddof=1))
  assert all(one.low <= one.value <= one.high for one in found.values())
  exact = downstream.reduce(label_E, label_E[None], 1)["accuracy"]
  assert (exact.value, exact.low, exact.high, downstream.spread(exact)) == (100.0, 100.0, 100.0, None)


def test_the_majority_is_the_training_sets():
  of = lambda *labels: downstream.majority_class([Example("e", ("x",), label) for label in labels])
  assert of(0, 1, 1) == 1 and of(1, 0) == 0
  with pytest.raises(UserError, match="all 2 training examples have the label 1; raise --train-limit"):
    of(1, 1)


# The command


def test_the_verb_prints_and_writes(models, data, tmp_path, cache, capsys):
  arguments = ["finetune", "--model", str(models("llama")), "--task=sst2", "--data", str(data), "--seeds=0,2",
               "--epochs=0.2", "--rank=2", "--train-limit=0", "--limit=20",
               "--workdir", str(tmp_path / "w")]  # fmt: skip
  assert cli.main(arguments) == 0
  printed, found = capsys.readouterr().out, read(tmp_path / "w" / "finetune.json")
  assert "train: 160 examples, dev: the first 20 of 50 examples" in printed
  assert f"{found['estimates']['accuracy']['value']:.2f} [" in printed and "finetune.json" in printed
  assert {"versions", "git", "hardware", "command", "created", "files", "tokenizer", "dtype"} <= found.keys()
  assert list(found["seeds"]) == ["0", "2"] and found["overlap"] >= 0 and len(found["files"]) == 2


@pytest.mark.parametrize("change,message", [
  ({"--task": "sst3"}, "there is no task `sst3`; did you mean `sst2`"),
  ({"--seeds": "0,0"}, "--seeds=0,0; give whole numbers from 0 on, each of them once"),
  ({"--seeds": "a"}, "`a` has to be whole numbers"),
  ({"--rank": "0"}, "--rank=0 leaves the model as it is"),
  ({"--epochs": "0"}, "--epochs=0.0; it has to be positive"),
  ({"--train-limit": "-1"}, "--train-limit=-1; it cannot be negative"),
  ({"--train-limit": "1"}, "all 1 training examples have the label 0"),
  ({"--max-length": "1"}, "--max-length=1 leaves no room"),
  ({"--base": "embeding"}, "`embeding`, which matches no parameter; did you mean `embedding`"),
  ({"--sheeds": "1"}, "has no argument --sheeds; did you mean `--seeds`"),
])  # fmt: skip
def test_the_verb_refuses_in_one_line(models, data, tmp_path, capsys, monkeypatch, change, message):
  monkeypatch.setattr(cli, "_start_jax", lambda: None)
  arguments = {"--model": models("llama"), "--task": "sst2", "--data": data, "--workdir": tmp_path / "w"} | change
  assert cli.main(["finetune", *(f"{name}={value}" for name, value in arguments.items())]) == 2
  said = capsys.readouterr().err
  assert message in said and said.count("\n") == 1 and not (tmp_path / "w").exists()


def test_the_settings_reach_the_trainers_config():
  found = to_dict(Settings(rank=4, epochs=3, batch=32).config("m", None, 1000))
  assert found["train"]["steps"] == 94 and found["train"]["warmup_steps"] == 5
  assert found["train"]["learning_rate"] == finetuning.ADAPTER_RATE and found["lora"]["rank"] == 4
