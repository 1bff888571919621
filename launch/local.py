"""Several processes on this machine as one run, over jax.distributed, each with fake CPU devices.

  python launch/local.py --processes=2 --devices=4 -- score --model=M --rows=rows.jsonl --out=scores.json

What follows `--` is handed to `python -m jaxbias` in every process. Process 0 speaks on the terminal; every process
writes LOGS/process-I.log. The first process that fails ends the run with its exit code: the others get SIGTERM at once
and SIGKILL after --grace seconds. SIGTERM and SIGINT to the launcher are passed on in the same way.

Exit code 75 (EX_TEMPFAIL) means "saved, start me again"; after 134, 137 and 143 a process was lost, to its runtime, the
system or someone's SIGTERM. With --restart=N all are then started anew, N times at most, unless the launcher itself was
told to stop.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

RESTART = (75, 134, 137, 143)  # EX_TEMPFAIL of sysexits.h; 128 + SIGABRT, SIGKILL, SIGTERM
POLL = 0.1  # seconds between two looks at the processes
LAST_LINES = 15  # of the failed process's log, repeated at the end


def main(arguments: Sequence[str] | None = None) -> int:
  """The exit code: 0 where every process ended well, else that of the first that did not (128 + N for signal N)."""
  options = parse(arguments)
  if options.dry_run:
    port = options.port or free_port()
    for process in range(options.processes):
      print(f"{shell_line(options, process, port)}  # log: {log_of(options, process)}")
    return 0
  stopping = Stopping()
  for attempt in range(options.restart + 1):
    code = run_once(options, stopping, "w" if attempt == 0 else "a")
    if code not in RESTART or stopping.signal or attempt == options.restart:
      return code
    say(f"exit code {code}: starting all again ({attempt + 1} of {options.restart})")
  raise AssertionError("the last attempt returns")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """Raises SystemExit(2) with one line for arguments that make no run."""
  parser = argparse.ArgumentParser(prog="local.py", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--processes", metavar="N", type=int, required=True)
  parser.add_argument("--devices", metavar="K", type=int, default=1, help="fake CPU devices of each; default 1")
  parser.add_argument("--logs", metavar="DIR", type=Path, default=Path("runs/local"), help="default: runs/local")
  parser.add_argument("--restart", metavar="N", type=int, default=0, help="start again on exit codes "
                      f"{', '.join(map(str, RESTART))}, at most N times; default 0")
  parser.add_argument("--grace", metavar="SECONDS", type=float, default=30.0, help="from SIGTERM to SIGKILL; "
                      "default 30")
  parser.add_argument("--port", metavar="PORT", type=int, default=0, help="of the coordinator; default: a free one")
  parser.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")
  parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="what jaxbias is to do")
  options = parser.parse_args(arguments)
  options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
  if not options.command:
    fail("what to run is missing; write it behind --, such as: -- score --model=M --rows=F --out=G")
  if options.processes < 1 or options.devices < 1:
    fail(f"--processes={options.processes} --devices={options.devices}: both have to be at least 1.")
  if options.restart < 0 or options.grace < 0:
    fail(f"--restart={options.restart} --grace={options.grace:g}: neither can be negative.")
  return options


def fail(message: str) -> None:
  print(f"local.py: {message}", file=sys.stderr)
  raise SystemExit(2)


def say(message: str) -> None:
  print(f"local.py: {message}", file=sys.stderr, flush=True)


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def command_line(options: argparse.Namespace, process: int, port: int) -> list[str]:
  """A single process needs no coordinator, and then every verb can be run."""
  joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={options.processes}", f"--process={process}"]
  return [sys.executable, "-m", "jaxbias", *options.command, *(joined if options.processes > 1 else [])]


def environment(options: argparse.Namespace) -> dict[str, str]:
  """What the processes get beside the launcher's own environment; the last XLA flag of a name counts."""
  fake = f"--xla_force_host_platform_device_count={options.devices}"
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {fake}".strip()}


def shell_line(options: argparse.Namespace, process: int, port: int) -> str:
  settings = [f"{name}={shlex.quote(value)}" for name, value in environment(options).items()]
  return " ".join([*settings, shlex.join(command_line(options, process, port))])


class Stopping:
  """Remembers the first SIGTERM or SIGINT that the launcher gets, 0 before."""

  def __init__(self):
    self.signal = 0
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._told)

  def _told(self, number: int, frame) -> None:
    self.signal = self.signal or number


def run_once(options: argparse.Namespace, stopping: Stopping, mode: str) -> int:
  """Start all processes, wait for their end, and return the exit code of the first that failed, 0 where none did."""
  options.logs.mkdir(parents=True, exist_ok=True)
  port = options.port or free_port()
  running, echo = [], None
  with open(log_of(options, 0), f"{mode}b") as first_log:
    try:
      for process in range(options.processes):
        running.append(start(options, process, port, mode))
      echo = threading.Thread(target=copy, args=(running[0].stdout, first_log), daemon=True)
      echo.start()
      code = wait(options, running, stopping)
    finally:
      stop(running, options.grace)
      if echo:
        echo.join(timeout=POLL * 10)  # a grandchild may hold the pipe open
  return code


def log_of(options: argparse.Namespace, process: int) -> Path:
  return options.logs / f"process-{process}.log"


def start(options: argparse.Namespace, process: int, port: int, mode: str) -> subprocess.Popen:
  """In a session of its own, so that Ctrl-C reaches a process only once, through the launcher."""
  how = {"env": os.environ | environment(options) | {"PYTHONUNBUFFERED": "1"}, "stdin": subprocess.DEVNULL,
         "stderr": subprocess.STDOUT, "start_new_session": True}  # fmt: skip
  command = command_line(options, process, port)
  if process == 0:
    return subprocess.Popen(command, stdout=subprocess.PIPE, **how)
  with open(log_of(options, process), f"{mode}b") as log:
    return subprocess.Popen(command, stdout=log, **how)


def copy(pipe, log) -> None:
  """Process 0's output to the terminal and to its log, as it comes."""
  while piece := os.read(pipe.fileno(), 65536):
    log.write(piece)
    log.flush()
    sys.stdout.buffer.write(piece)
    sys.stdout.flush()


def wait(options: argparse.Namespace, running: Sequence[subprocess.Popen], stopping: Stopping) -> int:
  """Until all have ended well, one has not, or the launcher is told to stop."""
  while True:
    codes = [process.poll() for process in running]
    failed = next((i for i, code in enumerate(codes) if code), None)
    if failed is not None:
      report(options, failed, exit_code(codes[failed]))
      return exit_code(codes[failed])
    if None not in codes:
      return 0
    if stopping.signal:
      return told_to_stop(options, running, stopping)
    time.sleep(POLL)


def told_to_stop(options: argparse.Namespace, running: Sequence[subprocess.Popen], stopping: Stopping) -> int:
  """Passes the signal on; the exit code of the first that failed, else 128 + the signal where some had to be killed."""
  say(f"{signal.Signals(stopping.signal).name} is passed on; SIGKILL follows in {options.grace:g} s")
  killed = stop(running, options.grace, stopping.signal)
  codes = [exit_code(process.returncode) for process in running]
  return 128 + stopping.signal if killed else next(filter(None, codes), 0)


def stop(running: Sequence[subprocess.Popen], grace: float, number: int = signal.SIGTERM) -> bool:
  """End those that still run, within `grace` seconds; whether one had to be killed."""
  left = [process for process in running if process.poll() is None]
  for process in left:
    process.send_signal(number)
  until = time.monotonic() + grace
  while any(process.poll() is None for process in left) and time.monotonic() < until:
    time.sleep(POLL)
  stubborn = [process for process in left if process.poll() is None]
  for process in stubborn:
    process.kill()
    process.wait()
  return bool(stubborn)


def exit_code(returned: int) -> int:
  return returned if returned >= 0 else 128 - returned


def report(options: argparse.Namespace, process: int, code: int) -> None:
  """Which process failed, and the end of its log; the others are stopped after this."""
  path = log_of(options, process)
  say(f"process {process} ended with exit code {code}; the others are stopped within {options.grace:g} s")
  if process:  # process 0 has said it on the terminal
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    print("\n".join([f"the end of {path}:", *(f"  {line}" for line in lines)]), file=sys.stderr, flush=True)


if __name__ == "__main__":
  sys.exit(main())
