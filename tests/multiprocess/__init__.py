"""Processes of this machine that train as one: forks of a server that has imported everything already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["jaxbias.cli", "jaxbias.compare", "jaxbias.report.write", "jaxbias.preemption"])
PATIENCE = 300.0  # seconds, on a busy machine


def start(count: int, arguments: Sequence[str], log: Path, cache: Path, devices: int = 1) -> list[BaseProcess]:
  """`python -m jaxbias ARGUMENTS` as `count` processes with so many fake devices each; what they say is in LOG-i."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"] if count > 1 else []
  out = []
  for i in range(count):
    each = [*arguments, *joined, *([f"--process={i}"] if joined else [])]
    out.append(SERVER.Process(target=_main, args=(each, f"{log}-{i}", str(cache), devices)))
    out[-1].start()
  return out


def say_to(log: str) -> None:
  """This process's stdout and stderr go to a file."""
  said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(said, 1)
  os.dup2(said, 2)


def _main(arguments: Sequence[str], log: str, cache: str, devices: int) -> None:
  say_to(log)
  os.environ |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAXBIAS_CACHE": cache}
  import jax

  from jaxbias import cli

  jax.config.update("jax_platforms", "cpu")
  sys.argv = ["jaxbias", *arguments]
  code = cli.main(arguments)
  atexit._run_exitfuncs()  # a fork leaves without
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def ended(processes: Sequence[BaseProcess]) -> list[int]:
  """Their exit codes; all have to end."""
  until = time.monotonic() + PATIENCE
  for process in processes:
    process.join(max(0.0, until - time.monotonic()))
  codes = [process.exitcode for process in processes]
  for process in processes:
    process.kill()
  return codes


def wait_until(so: Callable[[], bool], processes: Sequence[BaseProcess]) -> None:
  """Until it is so, while all processes run."""
  until = time.monotonic() + PATIENCE
  while not so():
    assert all(process.is_alive() for process in processes), "ended too early"
    assert time.monotonic() < until, "it takes too long"
    time.sleep(0.02)
