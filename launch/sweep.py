"""Many runs of one command, one for each point of a grid of overrides.

  python launch/sweep.py --workdir=runs/lr -- compare --config=configs/quickstart.py \\
    --config.train.learning_rate=1e-4,2e-4 --config.seeds='(0,)','(1,)'

Every `--config.KEY=A,B` with several values is an axis; all combinations are run, or with --zip the first values
together, then the second ones. Commas inside brackets or quotes do not separate: --config.watch.steps="'0,10,100'" is
one value. Each point has its own workdir under --workdir, named after its values, and its output in NAME.log beside it.
A point whose workdir holds the results.json of the same command is skipped, so the same sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2  # seconds between two looks at the runs
LONGEST_NAME = 200  # bytes; file systems take 255, and .log follows
OPEN, CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Axis:
  """An override with several values, by its key without `--config.`."""

  key: str
  values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
  """One run: its name, its own folder and what is handed to `python -m jaxbias`."""

  name: str
  workdir: Path
  arguments: tuple[str, ...]

  @property
  def command(self) -> list[str]:
    return [sys.executable, "-m", "jaxbias", *self.arguments]

  @property
  def log(self) -> Path:
    return self.workdir.parent / f"{self.name}.log"


class Wrong(Exception):
  """Something the user can mend; the message says what and what now."""


def main(arguments: Sequence[str] | None = None) -> int:
  """0 where every point is finished, 2 for bad input, else the exit code of the first point that failed."""
  options = parse(arguments)
  try:
    points = expand(options.command, options.workdir, options.zip)
    todo = [point for point in points if not finished(point)]
    if options.dry_run:
      return show(points, todo, options)
    print(f"{len(points)} points, {len(points) - len(todo)} finished before")
    if options.submit:
      return submit(todo, options)
    return run(todo, options.parallel)
  except Wrong as wrong:
    print(f"sweep.py: {wrong}", file=sys.stderr)
    return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="of the sweep; each point's is in it")
  parser.add_argument("--zip", action="store_true", help="value by value instead of all combinations")
  parser.add_argument("--parallel", metavar="N", type=int, default=1, help="points at a time on this "
                      "machine; default 1")
  parser.add_argument("--submit", choices=("slurm", "local"), help="hand the points to submitit instead; local: its "
                      "processes on this machine, to try it")
  parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="of submitit's executor, such as "
                      "timeout_min=240, gpus_per_node=1 or slurm_partition=gpu")
  parser.add_argument("--dry-run", action="store_true", help="print the command lines and start nothing")
  parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="what jaxbias is to do")
  options = parser.parse_args(arguments)
  options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
  return options


# From a command with several values to points


def expand(command: Sequence[str], workdir: Path, zipped: bool = False) -> list[Point]:
  """Every point, the last axis varying fastest. Raises Wrong for a command that is no sweep."""
  if not command:
    raise Wrong("what to run is missing; write it behind --, such as: -- compare --config=configs/quickstart.py")
  if any(argument.split("=")[0] == "--workdir" for argument in command):
    raise Wrong("each point gets a workdir of its own; give --workdir before the --.")
  values = {at: split(argument) for at, argument in enumerate(command) if argument.startswith("--config.")}
  axes = {at: Axis(key_of(command[at]), found) for at, found in values.items() if len(found) > 1}
  check(axes.values(), [key_of(command[at]) for at in values], zipped)
  chosen = zip(*(axis.values for axis in axes.values()), strict=True) if zipped else \
    itertools.product(*(axis.values for axis in axes.values()))  # fmt: skip
  short, points = short_keys([axis.key for axis in axes.values()]), []
  for combination in chosen:
    here = {at: found[0] for at, found in values.items()} | dict(zip(axes, combination, strict=True))
    arguments = [f"--config.{key_of(argument)}={here[at]}" if at in here else argument
                 for at, argument in enumerate(command)]  # fmt: skip
    name = "_".join(f"{key}={slug(value)}" for key, value in zip(short, combination, strict=True))
    points.append(Point(name, workdir / name, (*arguments, f"--workdir={workdir / name}")))
  check_names(points)
  return points


def key_of(argument: str) -> str:
  return argument.removeprefix("--config.").partition("=")[0]


def split(argument: str) -> tuple[str, ...]:
  """The values of `--config.KEY=A,B`, at commas outside of brackets and quotes; quotes around a whole value go away."""
  _, equals, text = argument.partition("=")
  if not equals:
    raise Wrong(f"{argument} has no value; write {argument}=VALUE.")
  values, depth, quote = [""], 0, ""
  for letter in text:
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"":
      quote = letter
    elif letter in OPEN + CLOSE:
      depth += 1 if letter in OPEN else -1
    if letter == "," and not depth and not quote:
      values.append("")
    else:
      values[-1] += letter
    if depth < 0:
      break
  if depth or quote:
    raise Wrong(f"{argument}: {'a quote' if quote else 'a bracket'} is not closed; mind that the shell takes one "
                "pair of quotes away.")
  if len(values) > 1 and not all(values):
    raise Wrong(f"{argument}: a value between two commas is empty; write '' for an empty one.")
  return tuple(unquoted(value) for value in values)


def unquoted(value: str) -> str:
  """Without the quotes that hold all of it, and no other, together."""
  if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in value[1:-1]:
    return value[1:-1]
  return value


def check(axes: Sequence[Axis], keys: Sequence[str], zipped: bool) -> None:
  if not axes:
    raise Wrong("no override has several values; write one as --config.train.learning_rate=1e-4,2e-4")
  for key in keys:
    if keys.count(key) > 1:
      raise Wrong(f"--config.{key} is given twice; put all its values into one, with commas between.")
  for axis in axes:
    if twice := [value for value in axis.values if axis.values.count(value) > 1]:
      raise Wrong(f"--config.{axis.key} has the value {twice[0]} twice.")
  lengths = {axis.key: len(axis.values) for axis in axes}
  if zipped and len(set(lengths.values())) > 1:
    found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
    raise Wrong(f"--zip takes the same number of values of each: {found}.")


def check_names(points: Sequence[Point]) -> None:
  names = [point.name for point in points]
  for name in names:
    if names.count(name) > 1:
      raise Wrong(f"two points would share the folder {name}, as letters that no file name should have are left out; "
                  "run them as two sweeps with two --workdir.")
    if len(name.encode()) > LONGEST_NAME:
      raise Wrong(f"{name[:60]}... is too long for a folder; run fewer axes in one sweep.")


def short_keys(keys: Sequence[str]) -> list[str]:
  """Each key's last words, as many as tell it from the others."""
  ending = lambda key, words: ".".join(key.split(".")[-words:])
  return [next(ending(key, words) for words in itertools.count(1)
               if ending(key, words) == key or [ending(k, words) for k in keys].count(ending(key, words)) == 1)
          for key in keys]  # fmt: skip


def slug(value: str) -> str:
  """What of a value can stand in a file name: `(0,1)` becomes `0-1`."""
  return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-") or "empty"


# What is finished, and what would be done


def finished(point: Point) -> bool:
  """Whether the point's results are there and complete. Raises Wrong where another command made them."""
  path = point.workdir / "results.json"
  if not path.is_file():
    return False
  try:
    results = json.loads(path.read_text(encoding="utf-8"))
    made_by, rows = shlex.split(results["command"])[3:], results["rows"]
  except (ValueError, KeyError, TypeError):
    raise Wrong(f"{path} is not a comparison's results; choose another --workdir.") from None
  if sorted(without_workdir(made_by)) != sorted(without_workdir(point.arguments)):
    raise Wrong(f"{path} was made by another command ({shlex.join(made_by)}); choose another --workdir.")
  return not any(row.get("failed") for row in rows)


def without_workdir(arguments: Sequence[str]) -> list[str]:
  """The folder may be named in several ways, and a finished sweep may have been moved."""
  return [argument for argument in arguments if not argument.startswith("--workdir=")]


def show(points: Sequence[Point], todo: Sequence[Point], options: argparse.Namespace) -> int:
  for point in points:
    print(shlex.join(point.command) if point in todo else f"# finished: {point.workdir}")
  if options.submit:
    settings = ", ".join(options.set) or "its defaults"
    print(f"# submitit, cluster {options.submit}, folder {submitit_folder(options)}: {settings}")
  return 0


# Running


def run(points: Sequence[Point], parallel: int) -> int:
  """Start the points in order, `parallel` at a time; one that fails does not stop the others.

  SIGINT and SIGTERM are passed on to those that run, and no more are started. Returns the first exit code other than 0.
  """
  if parallel < 1:
    raise Wrong(f"--parallel={parallel}: it has to be at least 1.")
  told, passed_on = [], 0
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(number))
  waiting, running, first = list(points), {}, 0
  while running or (waiting and not told):
    while waiting and len(running) < parallel and not told:
      point = waiting.pop(0)
      print(f"start  {point.name}", flush=True)
      running[point] = begin(point)
    time.sleep(POLL)
    for number in told[passed_on:]:
      passed_on += 1
      for process, _ in running.values():
        process.send_signal(number)
    for point, (process, began) in list(running.items()):
      if process.poll() is not None:
        del running[point]
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        first = first or code
        how = "done " if code == 0 else f"failed with exit code {code}, see {point.log}:"
        print(f"{how}  {point.name}  {time.monotonic() - began:.0f} s", flush=True)
  return first or (128 + told[0] if told else 0)


def begin(point: Point) -> tuple[subprocess.Popen, float]:
  """The process, in a session of its own as signals are passed on, and when it began. Its log is appended to."""
  point.workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(point.log, "ab") as log:
    process = subprocess.Popen(point.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                               start_new_session=True)  # fmt: skip
  return process, time.monotonic()


def submitit_folder(options: argparse.Namespace) -> Path:
  return options.workdir / "submitit"


def submit(points: Sequence[Point], options: argparse.Namespace) -> int:
  """One submitit job a point, on SLURM all in one array; prints their ids and returns, while they wait and run."""
  try:
    import submitit
  except ImportError:
    raise Wrong("--submit needs submitit; install it with: pip install 'jaxbias[launch]'") from None
  try:
    executor = submitit.AutoExecutor(folder=submitit_folder(options), cluster=options.submit)
  except RuntimeError as error:
    raise Wrong(f"--submit={options.submit} does not work on this machine: {error}") from None
  try:
    executor.update_parameters(**dict(map(setting, options.set)))
  except (NameError, AssertionError, TypeError, ValueError) as error:
    raise Wrong(f"submitit does not take --set {' --set '.join(options.set)}: {' '.join(str(error).split())}") from None
  if not points:
    return 0
  with executor.batch():
    jobs = [executor.submit(submitit.helpers.CommandFunction(point.command)) for point in points]
  for point, job in zip(points, jobs, strict=True):
    print(f"job {job.job_id}  {point.name}  log: {job.paths.stdout}")
  return 0


def setting(text: str) -> tuple[str, int | str]:
  """KEY=VALUE, whole numbers as such."""
  key, equals, value = text.partition("=")
  if not (key and equals and value):
    raise Wrong(f"--set {text} has to be KEY=VALUE, such as timeout_min=240.")
  return key, int(value) if value.isdecimal() else value


if __name__ == "__main__":
  sys.exit(main())
