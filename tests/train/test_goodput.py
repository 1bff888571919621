"""Where time goes, what devices could do, and what a step needs; a trace and a third writer on demand."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from jaxbias import cli
from jaxbias.errors import UserError
from jaxbias.losses.registry import parse
from jaxbias.models.config import CAUSAL, ModelConfig
from jaxbias.train import flops, goodput
from jaxbias.train.metrics import MetricsWriter
from jaxbias.train.profile import window
from jaxbias.types import Batch
from tests.train import Workplace, lines, read

RECORD = {"loss": 2.0, "parts": {"sft": 3.0}, "seconds": 0.5, "spent": {"data": 0.1}, "tokens": 7}


def test_time_is_split_without_rest(monkeypatch):
  now = iter([0.0, 1.0, 4.0, 4.5, 5.0, 10.0, 12.0])
  monkeypatch.setattr(goodput.time, "perf_counter", lambda: next(now))
  clock = goodput.Stopwatch()
  with clock.on("compile"):  # 1 to 4
    pass
  with clock.on("data"):  # 4.5 to 5
    pass
  assert clock.lap() == (10.0 - 3.5, {"compile": 3.0, "data": 0.5})
  assert clock.lap() == (2.0, {})


def test_goodput_is_the_share_of_steps():
  records = [{"seconds": 6.0, "spent": {"compile": 3.0, "data": 0.5}, "tokens": 100}, {"seconds": 0.5, "tokens": 30}]
  found = goodput.summary(records)
  assert found == {"seconds": 10.0, "tokens": 130, "goodput": 0.65, "spent": {"compile": 3.0, "data": 0.5}}
  assert goodput.describe(found) == "20 tokens/s in steps, goodput 65.0 % (compile 30.0 %, data 5.0 %)"


def test_peaks_are_known_or_given_and_never_made_up():
  devices = lambda kind, n=1: [types.SimpleNamespace(device_kind=kind)] * n
  assert flops.peak_flops(devices("cpu", 8)) is None
  assert flops.peak_flops(devices("cpu", 8), tflops=0.1) == pytest.approx(8e11)
  assert flops.peak_flops(devices("TPU v5 lite", 4)) == 4 * 197e12 and flops.peak_flops(devices("TPU v5")) == 459e12
  assert flops.peak_flops(devices("NVIDIA H100 PCIe")) < flops.peak_flops(devices("NVIDIA H100 80GB HBM3")) == 989e12


def test_a_step_needs_six_flops_a_weight_and_token():
  """Trained whole: 2 forward, 2 to the inputs, 2 to the weights; frozen: 4; adapters 6. Scores 4 L H C T, thrice."""
  c = ModelConfig(family="llama", architecture="", task=CAUSAL, norm_eps=1e-5, tied_head=True, vocab_size=50,
                  hidden_size=16, mlp_size=32, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
                  max_positions=64)  # fmt: skip
  layer = 16 * 8 * (2 * 2 + 2) + 3 * 16 * 32
  matrices = {"layers": {"all": np.zeros((3, layer))}, "embedding": np.zeros((50, 16))}
  count = dict(tokens=10, context=5, scored=4, compared=0)
  scores = 3 * 4 * 3 * 2 * 8 * 5 * 10
  whole = flops.trained_flops(c, {"base": matrices}, **count)
  assert whole == 6 * 3 * layer * 10 + scores + 6 * 50 * 16 * 4
  adapters = {"layers": {"a": np.zeros((3, 7))}}
  assert flops.trained_flops(c, adapters, **count) == 4 * 3 * layer * 10 + 6 * 21 * 10 + scores + 4 * 50 * 16 * 4
  objective, _ = parse({"sft": {}})
  i = lambda *rows: np.array(rows, np.int32)
  batch = Batch(tokens=np.zeros((2, 8)), segment=i([1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]), position=None,
                score_at=None, target=None, score_segment=i([1, 2, 0], [1, 1, 0]))  # fmt: skip
  needed = dict(tokens=10, context=(9 + 9 + 16) / 10, scored=4, compared=0)
  assert flops.needed_flops(c, batch, adapters, objective) == flops.trained_flops(c, adapters, **needed)


# Writers


@pytest.fixture
def wandb(monkeypatch):
  """A stand-in for the package, and what it was told."""
  told = []

  class Run:
    log = staticmethod(lambda values, step: told.append((step, values)))
    finish = staticmethod(lambda: told.append("finished"))

  def init(**given):
    told.append(given)
    return Run

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  return told


def test_all_writers_are_told_the_same_and_a_run_goes_on_under_its_id(wandb, tmp_path):
  folder = tmp_path / "work" / "sft-seed0"
  folder.mkdir(parents=True)
  for first in (1, 2):
    writer = MetricsWriter(folder, first - 1, "bias", {"steps": 2})
    writer.write(first, RECORD)
    writer.close()
  assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2]
  begun, one, done, again, two, _ = wandb
  assert begun == again and begun["project"] == "bias" and begun["name"] == "work-sft-seed0"
  assert begun["config"] == {"steps": 2} and begun["resume"] == "allow"
  assert begun["id"] == read(folder / "wandb.json")["id"]
  assert one == (1, {"loss": 2.0, "seconds": 0.5, "parts/sft": 3.0, "spent/data": 0.1}) and done == "finished"
  assert two[0] == 2


def test_a_missing_package_is_said_before_anything_is_loaded(tmp_path, monkeypatch, tmp_path_factory, capsys):
  monkeypatch.setitem(sys.modules, "wandb", None)
  tiny = Workplace.of(tmp_path_factory)
  arguments = ["--config", str(tiny.config), "--workdir", str(tmp_path / "work"), "--config.log.wandb_project=bias"]
  assert cli.main(["compare", *arguments]) == 2
  assert "the package wandb is not installed; pip install 'jaxbias[wandb]'" in capsys.readouterr().err
  assert not (tmp_path / "work").exists()


# Profile, in a run of the command line


@pytest.mark.parametrize("given", ["3", "0:2", "4:3", "a:b", "1:2:3"])
def test_a_window_is_two_steps(given):
  with pytest.raises(UserError, match=f"--profile={given} has to be FROM:TO"):
    window(given)


def test_a_run_leaves_a_trace_rates_and_goodput(tmp_path, tmp_path_factory):
  tiny, workdir = Workplace.of(tmp_path_factory), tmp_path / "work"
  command = ["train", "--config", tiny.config, "--variant=sft", "--workdir", workdir, "--config.seeds=(0,)",
             "--config.log.peak_tflops=0.1"]  # fmt: skip
  late = tiny.run(*command, "--profile=2:7")
  assert late.returncode == 2 and "--profile ends at step 7, the runs at train.steps = 6." in late.stderr
  done = tiny.run(*command, "--profile=2:3")
  assert done.returncode == 0, done.stderr
  run = workdir / "sft-seed0"
  assert list((run / "profile").rglob("*.xplane.pb")), "jax.profiler wrote a trace"
  records = lines(run / "metrics.jsonl")
  assert {"start", "data", "compile"} <= records[0]["spent"].keys() and "tokens_per_second" not in records[0]
  assert records[3]["spent"].keys() == {"data", "checkpoint"}
  for record in records[1:]:
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert 0 < record["mfu"] < 1
  spent = read(run / "evaluation.json")["train"]
  assert spent == json.loads(json.dumps(goodput.summary(records))) and 0 < spent["goodput"] < 1
  assert f"sft-seed0: {goodput.describe(spent)}" in done.stderr
  assert read(workdir / "results.json")["rows"][1]["train"]["goodput"] == [spent["goodput"]]
