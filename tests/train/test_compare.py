"""The comparison from end to end on a tiny model: what it writes, in which order, and what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxbias import cli
from jaxbias import compare as comparison
from jaxbias import config as configs
from jaxbias.train.loop import Run, train
from tests.train import RUNS, Workplace, lines, read, untimed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


@pytest.fixture(scope="module")
def workdir(tiny):
  return tiny.finished()


@pytest.fixture(scope="module")
def results(workdir):
  return read(workdir / "results.json")


def test_everything_promised_is_written(workdir):
  there = {p.name for p in workdir.iterdir()}
  files = {"config.json", "provenance.json", "results.json", "table.md", "report.html"}
  files |= {"data_card.json", "data_card.md"}
  assert there - {"provenance.diff"} == {*files, "figures", "base", *RUNS}  # of a tree with uncommitted changes
  assert {p.name for p in (workdir / "base").iterdir()} == {"evaluation.json"}
  for name in RUNS:
    inside = {p.name for p in (workdir / name).iterdir()}
    assert inside == {"metrics.jsonl", "tensorboard", "evaluation.json", "checkpoints"}
    assert {p.name for p in (workdir / name / "checkpoints").iterdir()} == {"3", "6"}
  page = (workdir / "report.html").read_text()
  assert "<svg" in page and "SFT on anti-stereotypes" in page and "src=\"http" not in page


def test_rows_come_in_the_configs_order_after_the_base(results):
  assert [row["name"] for row in results["rows"]] == ["base", "sft", "npo"]
  assert list(results["curves"]) == ["sft", "npo"]
  assert [list(results["curves"][name]) for name in ("sft", "npo")] == [["0", "1"]] * 2
  assert results["seeds"] == [0, 1] and results["steps"] == 6


def test_the_base_forgot_exactly_nothing(results):
  for name, estimate in results["rows"][0]["estimates"].items():
    if name.startswith("f_") or name == "preference_shift":
      assert (estimate["value"], estimate["low"], estimate["high"]) == (0.0, 0.0, 0.0), name


def test_a_trained_variant_moved(results):
  for row in results["rows"][1:]:
    assert all(row["estimates"][name]["value"] != 0.0 for name in ("f_all", "f_st", "f_anti"))
    assert len(row["estimates"]["f_all"]["per_seed"]) == 2 and len(set(row["estimates"]["f_all"]["per_seed"])) == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_sft_learns(results, seed):
  losses = [record["parts"]["sft"] for record in results["curves"]["sft"][str(seed)]]
  assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.05


@pytest.mark.parametrize("name", RUNS)
def test_each_step_is_in_the_metrics_once(workdir, name):
  records = lines(workdir / name / "metrics.jsonl")
  assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
  for record in records:
    assert np.isfinite([record["loss"], record["gradient_norm"], *record["parts"].values()]).all()
    assert record["seconds"] > 0 and record["tokens"] > 0
  drawn = EventAccumulator(str(workdir / name / "tensorboard")).Reload()
  for tag, value in {"loss": lambda r: r["loss"], "parts/sft": lambda r: r["parts"]["sft"]}.items():
    events = [(event.step, pytest.approx(event.tensor_proto.float_val[0])) for event in drawn.Tensors(tag)]
    assert events == [(record["step"], value(record)) for record in records]


def test_a_run_can_be_made_again_from_what_it_recorded(workdir, results, tiny):
  config, about = read(workdir / "config.json"), read(workdir / "provenance.json")
  assert about["config_hash"] == results["config_hash"] == configs.config_hash(config)
  assert config["train"]["steps"] == 6 and config["model"] == str(tiny.folder / "model")
  assert about["versions"]["jax"] == jax.__version__ and len(about["git"]["commit"]) == 40
  assert str(tiny.config) in about["command"] and results["model"]["fingerprint"]
  assert about["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} and about["seeds"] == [0, 1] and about["overrides"] == []
  assert about["inputs"].keys() == {"model", "tokenizer", "data", "data.source"} and "continued" not in about


def test_the_same_command_again_computes_nothing(tiny, workdir, results):
  stamp = lambda: {p: p.stat().st_mtime_ns for name in ("base", *RUNS) for p in (workdir / name).rglob("*")}
  before, table = stamp(), (workdir / "table.md").read_text()
  again = tiny.compare(workdir)
  assert again.returncode == 0 and "train sft" not in again.stderr
  assert stamp() == before
  assert read(workdir / "results.json") == results
  assert (workdir / "table.md").read_text() == table


def test_another_order_is_another_config(tiny, workdir, capsys):
  """The table's order is part of the config, so that one folder never holds two tables."""
  before = {p: p.read_bytes() for p in workdir.glob("*.*")}
  arguments = ["--config", str(tiny.config), "--workdir", str(workdir), "--config.compare=('npo', 'sft')"]
  assert cli.main(["compare", *arguments]) == 2
  assert "compare: ['sft', 'npo'] there, ['npo', 'sft'] here" in capsys.readouterr().err
  assert {p: p.read_bytes() for p in workdir.glob("*.*")} == before


# The training loop, in this process


@pytest.fixture(scope="module")
def job(tiny, workdir, tmp_path_factory):
  """The comparison of `workdir` before its first step, with the programs that were compiled for it."""
  config = configs.from_command_line([f"--config={tiny.config}"])[0]
  with pytest.MonkeyPatch.context() as patch, compiled_in(tiny.cache / "xla"):
    patch.setenv("JAXBIAS_CACHE", str(tiny.cache))
    yield comparison.prepare(config, tmp_path_factory.mktemp("job") / "work", "a test")


@contextlib.contextmanager
def compiled_in(folder):
  """Compiled programs are read from `folder` meanwhile."""

  def use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()

  before = jax.config.jax_compilation_cache_dir
  use(str(folder))
  try:
    yield
  finally:
    use(before)


def test_the_optimizer_knows_the_adapters_only(job):
  state = job.trainer.initial_state(0)
  sizes = lambda tree: sorted(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
  assert sizes(state.opt_state) == sorted(2 * sizes(state.params))  # two moments of each factor, beside the counters
  assert sum(sizes(state.params)) == job.trainer.num_trainable < job.trainer.model.num_parameters


def test_training_moves_the_adapters_and_nothing_else(job, workdir):
  params = job.trainer.model.params
  before = jax.tree.map(np.array, params)
  sft = job.variants[0]
  shape = job.shapes()[sft.objective]
  run = Run(job.workdir / "run", job.plain, sft.objective, sft.coefficients, job.sampler(sft, 0, None), shape)
  seen = []
  state = train(job.trainer, run, seen.append)
  assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(params)))
  moved = jax.tree.map(lambda new, old: bool((new != old).any()), state.params, job.trainer.initial_state(0).params)
  assert all(jax.tree.leaves(moved)) and int(state.step) == 6
  assert [record["texts"] for record in seen] == [4] * 6
  assert untimed(lines(run.folder / "metrics.jsonl")) == untimed(lines(workdir / "sft-seed0" / "metrics.jsonl"))


def test_a_batch_is_a_function_of_seed_and_step(job):
  sft = job.variants[0]
  shape = job.shapes()[sft.objective]
  draw = lambda seed, step: job.sampler(sft, seed, None).batch(step, shape)
  (batch, ids), (again, same) = draw(0, 3), draw(0, 3)
  assert ids == same and all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(again)))
  assert ids not in (draw(1, 3)[1], draw(0, 4)[1]) and len(ids) == 4
  assert all(name.endswith("/anti-stereotype") for name in ids)


def test_train_runs_one_variant(tiny, workdir, job, tmp_path, monkeypatch, capsys):
  """`train --variant` gives the numbers of the comparison, in a folder of its own."""
  (tmp_path / "one").mkdir()
  for name in ("base", "sft-seed0", "sft-seed1"):  # what is there is not computed again: only the table is
    shutil.copytree(workdir / name, tmp_path / "one" / name)
  config = read(workdir / "config.json") | {"compare": ["sft"]}
  (tmp_path / "one" / "config.json").write_text(json.dumps(config))
  shutil.copy(workdir / "provenance.json", tmp_path / "one")
  monkeypatch.setenv("JAXBIAS_CACHE", str(tiny.cache))
  arguments = ["--config", str(tiny.config), "--variant", "sft", "--workdir", str(tmp_path / "one")]
  assert cli.main(["train", *arguments]) == 0
  assert f"report: {tmp_path / 'one' / 'report.html'}" in capsys.readouterr().out
  rows = read(tmp_path / "one" / "results.json")["rows"]
  assert untimed(rows) == untimed(read(workdir / "results.json")["rows"][:2])
