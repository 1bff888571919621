"""Several processes of this machine: what is started, how they end together, when they are started again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from jaxbias import cli
from tests.launch import run, start, stub
from tests.train import Workplace, read

LISTEN = """
import os, pathlib, signal, sys, time
me = next(a.split("=")[1] for a in sys.argv if a.startswith("--process="))
def told(number, frame):
  print("told", me, flush=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, told)
with open("starts", "a") as starts:
  print(me, os.getpid(), file=starts)
print("here is", me, flush=True)
"""


def starts(folder: Path) -> list[list[str]]:
  """[process, its id] of every start."""
  path = folder / "starts"
  return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def alive(number: str) -> bool:
  try:
    os.kill(int(number), 0)
  except ProcessLookupError:
    return False
  return True


def local(folder: Path, *flags: str, processes: int = 2):
  return run("local.py", f"--processes={processes}", *flags, "--", "score", where=folder)


def test_a_dry_run_says_each_process_and_starts_none(tmp_path):
  done = run("local.py", "--processes=3", "--devices=4", "--dry-run", "--", "score", "--rows=a b.jsonl",
             where=tmp_path, XLA_FLAGS="--xla_dump_to=d")  # fmt: skip
  lines = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
  assert done.returncode == 0 and not list(tmp_path.iterdir())
  for process, line in enumerate(lines):
    assert line[:2] == ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_dump_to=d --xla_force_host_platform_device_count=4"]
    assert line[3:7] == ["-m", "jaxbias", "score", "--rows=a b.jsonl"]
    assert line[8:] == ["--processes=3", f"--process={process}"]
  (coordinator,) = {line[7] for line in lines}
  assert coordinator.startswith("--coordinator=127.0.0.1:") and len(lines) == 3


def test_a_single_process_needs_no_coordinator(tmp_path):
  done = run("local.py", "--processes=1", "--devices=8", "--dry-run", "--", "train", "--workdir=w", where=tmp_path)
  assert shlex.split(done.stdout, comments=True)[3:] == ["-m", "jaxbias", "train", "--workdir=w"]


@pytest.mark.parametrize("flags, said", [
  (["--processes=2"], "what to run is missing; write it behind --"),
  (["--processes=0", "--", "score"], "--processes=0 --devices=1: both have to be at least 1."),
  (["--processes=2", "--restart=-1", "--", "score"], "--restart=-1 --grace=30: neither can be negative."),
])  # fmt: skip
def test_arguments_that_make_no_run(flags, said):
  done = run("local.py", *flags)
  assert done.returncode == 2 and done.stderr.startswith(f"local.py: {said}") and done.stderr.count("\n") == 1


def test_two_processes_score_as_one(tmp_path, cache, tmp_path_factory):
  """The real jaxbias over a real jax.distributed, two devices in each."""
  place = Workplace.of(tmp_path_factory)
  rows = [{"id": str(i), "context": f"the cat {word}", "options": [" on the mat", " 12"]}
          for i, word in enumerate(("sat", "ran", "is"))]  # fmt: skip
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  score = lambda out: ["score", f"--model={place.folder / 'model'}", f"--rows={tmp_path / 'rows.jsonl'}",
                       f"--out={tmp_path / out}"]  # fmt: skip
  done = run("local.py", "--processes=2", "--devices=2", f"--logs={tmp_path / 'logs'}", "--", *score("two.json"),
             JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert cli.main(score("one.json")) == 0
  two, one = read(tmp_path / "two.json"), read(tmp_path / "one.json")
  assert list(two) == list(one) == ["0", "1", "2"]
  for name, pairs in one.items():
    assert_allclose(two[name], pairs, rtol=0, atol=1e-4, err_msg=name)
  assert {path.name for path in (tmp_path / "logs").iterdir()} == {"process-0.log", "process-1.log"}


def test_the_terminal_hears_process_0_and_the_logs_hear_all(tmp_path):
  folder = stub(tmp_path, LISTEN)
  done = local(folder, "--logs=logs", processes=3)
  assert done.returncode == 0 and done.stdout == "here is 0\n"
  for process in "012":
    assert (folder / "logs" / f"process-{process}.log").read_text() == f"here is {process}\n"


def test_one_that_fails_ends_the_run_with_its_code_and_message_in_time(tmp_path):
  """The other one is deaf to SIGTERM, as one is that waits in a collective; it is killed after --grace seconds."""
  folder = stub(tmp_path, LISTEN + """
if me == "1":
  while not pathlib.Path("deaf").exists(): time.sleep(0.05)
  pathlib.Path("failed").touch()
  sys.exit("jaxbias: there is no such model")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("deaf").touch()
time.sleep(300)
""")
  done = local(folder, "--grace=1")
  took = time.time() - (folder / "failed").stat().st_mtime
  assert done.returncode == 1 and 1 < took < 30, took  # 1 s, and what a busy machine needs
  assert "process 1 ended with exit code 1; the others are stopped within 1 s" in done.stderr
  assert "process-1.log:\n  here is 1\n  jaxbias: there is no such model" in done.stderr
  assert not [number for _, number in starts(folder) if alive(number)]


def test_one_that_a_signal_ends_counts_as_the_shell_counts_it(tmp_path):
  folder = stub(tmp_path, LISTEN + "if me == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(300)")
  assert local(folder).returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("restarts, code, count", [(0, 75, 1), (1, 75, 2), (5, 0, 3)])
def test_exit_code_75_starts_all_again(tmp_path, restarts, code, count):
  folder = stub(tmp_path, LISTEN + """
while me == "1" and not pathlib.Path("done").exists(): time.sleep(0.05)
if me == "0" and open("starts").read().count("0 ") < 3: sys.exit(75)
pathlib.Path("done").touch()
""")
  done = local(folder, f"--restart={restarts}")
  assert done.returncode == code
  assert [process for process, _ in starts(folder)].count("0") == count
  assert (folder / "runs" / "local" / "process-0.log").read_text().count("here is 0") == count
  assert done.stderr.count("starting all again") == count - 1


def test_sigterm_is_passed_on_to_all_and_nothing_is_started_again(tmp_path):
  folder = stub(tmp_path, LISTEN + "time.sleep(300)")
  process = start("local.py", "--processes=2", "--restart=3", "--", "score", where=folder)
  until = time.monotonic() + 60
  while len(starts(folder)) < 2 and time.monotonic() < until:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 75 and "SIGTERM is passed on" in err and "starting all again" not in err
  assert "told 0" in out and "told 1" in (folder / "runs" / "local" / "process-1.log").read_text()
  assert len(starts(folder)) == 2
