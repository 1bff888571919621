"""Sweeps: which points a command with several values stands for, what is skipped, and how they are run."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import sweep
from tests.launch import run, stub

RATES, SEEDS = "--config.train.learning_rate=1e-4,2e-4", "--config.seeds=(0,),(1,)"
COMPARE = ["compare", "--config=c.py"]
RUN = """
import json, pathlib, sys
workdir = pathlib.Path(next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--workdir=")))
print("ran", *sys.argv[1:])
if "--config.train.steps=2" in sys.argv and not pathlib.Path("mended").exists():
  sys.exit(3)
workdir.mkdir(parents=True)
command = "python -m jaxbias " + " ".join(sys.argv[1:])
(workdir / "results.json").write_text(json.dumps({"command": command, "rows": [{"name": "base"}]}))
"""


def points(*command: str, zipped: bool = False) -> list[tuple[str, list[str]]]:
  """Name and overrides of every point."""
  found = sweep.expand([*COMPARE, *command], Path("w"), zipped)
  for point in found:
    assert point.arguments[:2] == ("compare", "--config=c.py")
    assert point.arguments[-1] == f"--workdir={point.workdir}" and point.workdir == Path("w") / point.name
  return [(point.name, list(point.arguments[2:-1])) for point in found]


def test_all_combinations_the_last_axis_fastest():
  found = points(RATES, "--config.train.steps=5", SEEDS)
  assert [name for name, _ in found] == [
    "learning_rate=1e-4_seeds=0", "learning_rate=1e-4_seeds=1", "learning_rate=2e-4_seeds=0",
    "learning_rate=2e-4_seeds=1"]  # fmt: skip
  assert found[1][1] == ["--config.train.learning_rate=1e-4", "--config.train.steps=5", "--config.seeds=(1,)"]


def test_zip_takes_value_by_value():
  found = points(RATES, SEEDS, zipped=True)
  assert [overrides for _, overrides in found] == [
    ["--config.train.learning_rate=1e-4", "--config.seeds=(0,)"],
    ["--config.train.learning_rate=2e-4", "--config.seeds=(1,)"]]  # fmt: skip


@pytest.mark.parametrize("text, values", [
  ("('npo','dpo')", ("('npo','dpo')",)),
  ("('a',),('b','c')", ("('a',)", "('b','c')")),
  ("'0,10,100',log", ("0,10,100", "log")),
  ("'0,10'", ("0,10",)),
  ('"it\'s, so",b', ("it's, so", "b")),
  ("'a'b'c'", ("'a'b'c'",)),
  ("'',log", ("", "log")),
  ("a=b,c", ("a=b", "c")),
])  # fmt: skip
def test_commas_separate_outside_of_brackets_and_quotes(text, values):
  assert sweep.split(f"--config.k={text}") == values


def test_names_tell_keys_and_values_apart():
  found = points("--config.variants.npo.losses.npo.beta=0.1,0.2", "--config.variants.dpo.losses.dpo.beta=.3,.4")
  assert found[0][0] == "npo.beta=0.1_dpo.beta=.3"
  assert points("--config.watch.steps='',log")[0][0] == "steps=empty"


@pytest.mark.parametrize("command, zipped, said", [
  ([], False, "no override has several values"),
  (["--config.seeds=(0,1)"], False, "no override has several values"),
  ([RATES, "--workdir=x"], False, "each point gets a workdir of its own"),
  ([RATES, "--config.seeds"], False, "--config.seeds has no value"),
  ([RATES, RATES], False, "--config.train.learning_rate is given twice"),
  (["--config.a=1,2,1"], False, "--config.a has the value 1 twice"),
  (["--config.a=1,,2"], False, "a value between two commas is empty"),
  (["--config.seeds=(0,),(1"], False, "a bracket is not closed"),
  (["--config.seeds=0),(1"], False, "a bracket is not closed"),
  (["--config.a='x,y"], False, "a quote is not closed"),
  ([RATES, "--config.a=1,2,3"], True, "takes the same number of values of each: train.learning_rate has 2, a has 3"),
  (["--config.a=(1,),[1]"], False, "two points would share the folder a=1"),
  ([f"--config.a={'x' * 250},1"], False, "is too long for a folder"),
])  # fmt: skip
def test_commands_that_are_no_sweep(command, zipped, said):
  with pytest.raises(sweep.Wrong) as wrong:
    points(*command, zipped=zipped)
  assert said in str(wrong.value)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
  done = run("sweep.py", f"--workdir={tmp_path}", "--", *COMPARE)
  assert done.returncode == 2 and done.stderr.startswith("sweep.py: no override") and done.stderr.count("\n") == 1
  assert run("sweep.py", "--workdir=w", "--parallel=0", "--", *COMPARE, RATES).returncode == 2


def finish(point: sweep.Point, command: str, **row) -> None:
  point.workdir.mkdir(parents=True, exist_ok=True)
  results = {"command": f"python -m jaxbias {command}", "rows": [{"name": "npo", **row}]}
  (point.workdir / "results.json").write_text(json.dumps(results))


def test_a_finished_point_is_one_whose_results_are_complete_and_of_this_command(tmp_path):
  point = sweep.expand([*COMPARE, RATES], tmp_path)[0]
  mine = f"compare --config=c.py --config.train.learning_rate=1e-4 --workdir={tmp_path}/moved"
  assert not sweep.finished(point)
  finish(point, mine)
  assert sweep.finished(point)
  finish(point, mine, failed="the loss is not a number")
  assert not sweep.finished(point)
  finish(point, mine.replace("c.py", "other.py"))
  with pytest.raises(sweep.Wrong, match="was made by another command .compare --config=other.py"):
    sweep.finished(point)
  (point.workdir / "results.json").write_text("{")
  with pytest.raises(sweep.Wrong, match="is not a comparison's results"):
    sweep.finished(point)


def test_a_dry_run_says_what_is_left_to_do(tmp_path):
  first, *_ = sweep.expand([*COMPARE, RATES, SEEDS], tmp_path)
  finish(first, shlex.join(first.arguments))
  before = sorted(tmp_path.rglob("*"))
  done = run("sweep.py", f"--workdir={tmp_path}", "--dry-run", "--", *COMPARE, RATES, SEEDS)
  lines = done.stdout.splitlines()
  assert lines[0] == f"# finished: {first.workdir}" and len(lines) == 4
  assert shlex.split(lines[1])[1:5] == ["-m", "jaxbias", "compare", "--config=c.py"]
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("parallel", [1, 3])
def test_one_that_fails_does_not_stop_the_others_and_is_all_that_is_done_again(tmp_path, parallel):
  folder = stub(tmp_path, RUN)
  go = lambda: run("sweep.py", "--workdir=w", f"--parallel={parallel}", "--", *COMPARE, "--config.train.steps=1,2,3",
                   where=folder)  # fmt: skip
  done = go()
  assert done.returncode == 3 and "failed with exit code 3, see w/steps=2.log:  steps=2" in done.stdout
  assert {path.parent.name for path in folder.glob("w/*/results.json")} == {"steps=1", "steps=3"}
  (folder / "mended").touch()
  done = go()
  assert done.returncode == 0 and "3 points, 2 finished before" in done.stdout
  assert done.stdout.count("start ") == 1
  assert (folder / "w" / "steps=2.log").read_text().count("ran compare") == 2


def test_submitit_is_asked_for_only_when_it_is_needed(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "submitit", None)
  arguments = [f"--workdir={tmp_path}", "--submit=slurm", "--set=timeout_min=60"]
  assert sweep.main([*arguments, "--dry-run", "--", *COMPARE, RATES]) == 0
  assert f"# submitit, cluster slurm, folder {tmp_path}/submitit: timeout_min=60" in capsys.readouterr().out
  assert sweep.main([*arguments, "--", *COMPARE, RATES]) == 2
  assert capsys.readouterr().err.startswith("sweep.py: --submit needs submitit; install it with: pip install")


def test_submitit_gets_one_job_a_point(tmp_path, monkeypatch, capsys):
  """Against a stand-in with the parts of submitit's interface that are used."""
  given, jobs = {}, []

  class Executor:
    def __init__(self, folder, cluster):
      if cluster == "local":
        raise RuntimeError("no such cluster here")
      given.update(folder=folder, cluster=cluster)

    def update_parameters(self, **parameters):
      if "wrong" in parameters:
        raise NameError("Unknown argument 'wrong'")
      given.update(parameters)

    def batch(self):
      return contextlib.nullcontext()

    def submit(self, function):
      jobs.append(function)
      return SimpleNamespace(job_id=len(jobs), paths=SimpleNamespace(stdout="log"))

  module = SimpleNamespace(AutoExecutor=Executor, helpers=SimpleNamespace(CommandFunction=lambda command: command))
  monkeypatch.setitem(sys.modules, "submitit", module)
  flags = [f"--workdir={tmp_path}", "--submit=slurm", "--set=timeout_min=60", "--set=slurm_partition=gpu"]
  assert sweep.main([*flags, "--", *COMPARE, RATES]) == 0
  assert given == {"folder": tmp_path / "submitit", "cluster": "slurm", "timeout_min": 60, "slurm_partition": "gpu"}
  assert jobs == [point.command for point in sweep.expand([*COMPARE, RATES], tmp_path)]
  assert sweep.main([*flags, "--set=wrong=1", "--", *COMPARE, RATES]) == 2
  assert sweep.main([*flags, "--set=x", "--", *COMPARE, RATES]) == 2
  assert sweep.main([*flags, "--submit=local", "--", *COMPARE, RATES]) == 2
  wrong, shape, absent = capsys.readouterr().err.splitlines()
  assert "--submit=local does not work on this machine: no such cluster here" in absent
  assert "submitit does not take" in wrong and "--set x has to be KEY=VALUE" in shape and len(jobs) == 2
