"""The same answers on every mesh and from every process.

  python -m tests.multidevice.test_answers FOLDER [PORT PROCESS]      # what the tests run, with XLA_FLAGS set
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from numpy.testing import assert_allclose

from jaxbias import cli, distributed
from jaxbias.data.rows import Prompt, Text
from jaxbias.errors import UserError
from jaxbias.evals import run, task
from jaxbias.evals.answers import answer
from jaxbias.models import language_model
from tests.evals.answering import CHOICES, NATS, write_model
from tests.train import read

TEXTS = [Text("a", "the cat"), Text("b", "she is a nurse")]


def told(model) -> list:
  """Ids in order, scores and vectors; the last of both are of a set smaller than eight devices."""
  scores, vectors = answer(model, CHOICES).by_id, answer(model, TEXTS, task.EMBEDDINGS).by_id
  few = answer(model, CHOICES[:2])
  scores |= {f"{name} of few": pairs for name, pairs in few.by_id.items()}
  return [list(scores), [s for pairs in scores.values() for s, _ in pairs], [v.tolist() for v in vectors.values()],
          [tuple(shape) for shape in few.shapes]]  # fmt: skip


def assert_told(found: list, expected: list):
  assert found[0] == expected[0]
  assert_allclose(found[1], expected[1], rtol=0, atol=NATS)
  assert_allclose(found[2], expected[2], rtol=0, atol=1e-5)


def start(folder: Path, devices: int, *arguments: str) -> subprocess.Popen:
  flags = f"--xla_force_host_platform_device_count={devices}"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                 "JAXBIAS_CACHE": str(folder / "cache")}
  return subprocess.Popen([sys.executable, "-m", "tests.multidevice.test_answers", str(folder), *arguments], text=True,
                          env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
  """What it printed; every process that a test started has ended by then, however the test ends."""
  try:
    printed, errors = process.communicate(timeout=600)
  finally:
    process.kill()
  assert process.returncode == 0, errors[-3000:]
  return printed


# Several devices


def on_meshes(folder: Path) -> None:
  from jax.sharding import AxisType

  from jaxbias.mesh import AXES, make_mesh

  assert jax.device_count() == 8
  one = jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
  meshes = [one, make_mesh({"data": 8}), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})]
  for name in ("gpt2", "bert"):
    found = [told(language_model.load(str(folder / name), "float32", mesh)) for mesh in meshes]
    (folder / f"{name}.json").write_text(json.dumps(found))


def test_eight_devices_answer_as_one(tmp_path):
  for name in ("gpt2", "bert"):
    write_model(name, tmp_path / name)
  finish(start(tmp_path, 8))
  for name in ("gpt2", "bert"):
    expected, *others = read(tmp_path / f"{name}.json")
    for found in others:
      assert_told(found, expected)
      ((rows, length, *_),) = found[3]
      assert rows % 4 == 0 and length <= 64, "few texts are spread in short rows, not each device given a long one"


# Several processes: scores, vectors and continuations

BENCHMARKS = "crows_pairs,seat"
ROWS = [{"id": row.id, "context": row.context, "options": row.options} for row in CHOICES]
PROMPTS = [Prompt("greedy", "the cat sat", 3), Prompt("drawn", "she is", 3, samples=4, temperature=1.0)]
WORDS = {"targ1": ["cat", "dog"], "targ2": ["mat", "nurse"], "attr1": ["she"], "attr2": ["he"]}


def arguments(folder: Path, found: str) -> tuple[list[str], list[str]]:
  model = ["--model", str(folder / "gpt2")]
  data = {"crows_pairs": "pairs.csv", "seat": "sent-x.jsonl"}
  sources = [part for name, file in data.items() for part in ("--data", f"{name}={folder / file}")]
  return (["score", *model, "--rows", str(folder / "rows.jsonl"), "--out", str(folder / f"{found} scores.json")],
          ["evaluate", *model, "--benchmark", BENCHMARKS, *sources, "--out", str(folder / f"{found}.json")])


def in_processes(folder: Path, port: str, number: str) -> None:
  """Joins once, for both verbs; a process that is not the first and writes something fails."""
  if number != "0":
    run.write_json = None
  score, evaluate = arguments(folder, "two")
  joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", number]
  assert not cli.main([*score, *joined]) and not cli.main(evaluate)
  assert jax.process_count() == 2 and jax.device_count() == 4
  (folder / f"continued by {number}.json").write_text(json.dumps(continued(folder)))


def continued(folder: Path) -> dict[str, list[str]]:
  return answer(language_model.load(str(folder / "gpt2"), "float32"), PROMPTS, task.CONTINUATIONS).by_id


def test_two_processes_write_once_what_one_writes(tmp_path, cache, capsys):
  write_model("gpt2", tmp_path / "gpt2")
  jsonl = lambda name, rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  jsonl("rows.jsonl", ROWS)
  jsonl("sent-x.jsonl", [{name: {"examples": words} for name, words in WORDS.items()}])
  (tmp_path / "pairs.csv").write_text(
    ",sent_more,sent_less,stereo_antistereo,bias_type\n0,the cat sat,the dog sat,stereo,age\n"
    "1,she is a nurse,he is a doctor,antistereo,gender\n2,a mat,a dog,stereo,age\n")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  processes = [start(tmp_path, 2, port, number) for number in "01"]
  printed, silent = map(finish, processes)
  assert all(name in printed for name in BENCHMARKS.split(",")) and "crows_pairs" not in silent
  for verb in arguments(tmp_path, "one"):
    assert cli.main(verb) == 0
  capsys.readouterr()
  assert [read(tmp_path / f"continued by {number}.json") for number in "01"] == [continued(tmp_path)] * 2
  one, two = ([read(tmp_path / f"{found}{name}.json") for name in (" scores", "")] for found in ("one", "two"))
  assert list(two[0]) == [row["id"] for row in ROWS]
  assert_same(two[0], one[0])
  one, two = one[1], two[1]
  assert_same(two["answers"]["crows_pairs"], one["answers"]["crows_pairs"])
  for name in BENCHMARKS.split(","):
    values, expected = ([{metric: e["value"] for metric, e in group.items()} for group in
                         found["benchmarks"][name]["estimates"].values()] for found in (two, one))
    for value, other in zip(values, expected, strict=True):
      assert value == pytest.approx(other, abs=NATS, nan_ok=True)


def assert_same(found: dict, expected: dict):
  assert list(found) == list(expected)
  for name, pairs in expected.items():
    assert_allclose(found[name], pairs, rtol=0, atol=NATS, err_msg=name)


# How processes find each other


@pytest.fixture
def joined(monkeypatch) -> list:
  """What `jax.distributed.initialize` was called with."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **how: calls.append(given))
  return calls


def test_flags_are_passed_on_and_without_any_nothing_is_joined(joined):
  distributed.initialize()
  assert not joined
  with socket.create_server(("127.0.0.1", 0)) as listening:
    where = f"127.0.0.1:{listening.getsockname()[1]}"
    distributed.initialize(where, 4, 3)
  distributed.initialize("10.0.0.1:1234", 4, 0)
  distributed.initialize("auto")
  assert joined == [(where, 4, 3), ("10.0.0.1:1234", 4, 0), (None, None, None)]


@pytest.mark.parametrize("flags, said", [
  (["--processes", "2"], "--coordinator and --process are missing: several processes need --coordinator HOST:PORT"),
  (["--coordinator", "a:1", "--process", "0"], "--processes is missing: several processes need"),
  (["--coordinator", "a", "--processes", "2", "--process", "0"], "--coordinator=a has to be HOST:PORT"),
  (["--coordinator", "a:b", "--processes", "2", "--process", "0"], "--coordinator=a:b has to be HOST:PORT"),
  (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "--process=2 has to be from 0 to 1"),
  (["--coordinator", "auto", "--processes", "2"], "--coordinator=auto finds the number of processes itself"),
])  # fmt: skip
def test_flags_that_make_no_run(joined, capsys, flags, said):
  assert cli.main(["evaluate", "--data", "builtin", *flags]) == 2
  err = capsys.readouterr().err
  assert err.startswith(f"jaxbias: {said}") and err.count("\n") == 1 and not joined


def test_a_first_process_that_is_not_there_is_told(joined):
  with socket.create_server(("127.0.0.1", 0)) as gone:
    where = f"127.0.0.1:{gone.getsockname()[1]}"
  with pytest.raises(UserError, match=rf"nothing listens at --coordinator={where} after 0.3 s .*; process 0 has"):
    distributed.initialize(where, 2, 1, timeout=0.3)
  assert not joined


def test_a_launcher_that_is_not_there_is_told(monkeypatch):
  def alone(*given, **how):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", alone)
  with pytest.raises(UserError, match="no launcher was found .coordinator_address should be defined.*--processes N"):
    distributed.initialize("auto")


if __name__ == "__main__":
  folder, *process = sys.argv[1:]
  in_processes(Path(folder), *process) if process else on_meshes(Path(folder))
