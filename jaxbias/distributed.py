"""Several processes that compute as one: how they find each other, and arrays that lie across them.

Every process runs the same program on the same input and feeds the devices it has; the first one alone prints and
writes. One process is the case in which nothing here does anything.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxbias.errors import UserError

AUTO = "auto"
PATIENCE = 5.0  # seconds in which processes that fail alike end together
LOST = re.compile("by peer|remote process exited|timed out|heartbeat", re.IGNORECASE)  # gloo's words, NCCL's, jax's
NEEDED = ("several processes need --coordinator HOST:PORT (of the first of them), --processes N and --process I; or "
          f"--coordinator={AUTO} alone, where SLURM, Open MPI, Cloud TPU or GKE start them")  # fmt: skip


def initialize(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300,
  silence: int = 100, notice: bool = False,
) -> None:  # fmt: skip
  """Join the other processes, before anything is computed; nothing happens where no argument is given.

  coordinator: HOST:PORT of process 0, the same for all, or "auto": `jax.distributed` finds all three by itself.
  timeout: seconds in which the others have to come; where process 0 misses one, the runtime ends it with a message.
  silence: seconds without a sign of life of one process after which the runtime ends all others with a message.
  notice: whether SIGTERM is for `preemption.due` to hear, instead of ending the process.
  Raises UserError for arguments that do not make one run, and where process 0 cannot be reached.
  """
  given = (coordinator, processes, process)
  if given == (None, None, None):
    return
  if coordinator != AUTO:
    _check(coordinator, processes, process)
  elif given != (AUTO, None, None):
    raise UserError(f"--coordinator={AUTO} finds the number of processes itself; leave out --processes and --process.")
  if process:
    _wait_for(coordinator, timeout)
  jax.config.update("jax_enable_preemption_service", notice)
  try:
    jax.distributed.initialize(None if coordinator == AUTO else coordinator, processes, process,
                               initialization_timeout=timeout, heartbeat_timeout_seconds=silence)  # fmt: skip
  except ValueError as error:
    raise UserError(f"no launcher was found ({error}); {NEEDED}.") from None


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
  named = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in named.items() if value is None]
  if missing:
    raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {NEEDED}.")
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdigit()):
    raise UserError(f"--coordinator={coordinator} has to be HOST:PORT, such as 10.0.0.1:1234.")
  if processes < 1 or not 0 <= process < processes:
    raise UserError(f"--process={process} has to be from 0 to {processes - 1}, one of each, with "
                    f"--processes={processes}.")


def _wait_for(coordinator: str, timeout: float) -> None:
  """Until process 0 listens. The runtime would abort instead of raising where it never does."""
  host, _, port = coordinator.rpartition(":")
  until = time.monotonic() + timeout
  while True:
    try:
      return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
    except OSError as error:
      if time.monotonic() > until:
        raise UserError(f"nothing listens at --coordinator={coordinator} after {timeout} s ({error}); process 0 has to "
                        "run there, with the same --coordinator.") from None
    time.sleep(0.2)


def first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def to_devices(arrays: Any, sharding: Sharding) -> Any:
  """A tree of NumPy arrays, the same on every process, onto the devices of all: each process feeds its own."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, sharding)
  with jax.transfer_guard_host_to_device("allow"):  # as a device_put is: this is no hidden copy
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def on_host(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
  """The whole of each array, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(list(arrays))
  return [np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in arrays]


def everywhere(here: bool) -> bool:
  """Whether it is so in every process: files that each looks for on its own disk, for one."""
  return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(here)).all())


def from_first(do: Callable[[], Any]) -> Any:
  """What `do()` returns in the first process, plain data as JSON has them; the others wait for it, and do nothing.

  What is decided by looking at files is decided so, and what is written to be read by all. A UserError or an OSError of
  the first process is raised in all.
  """
  if jax.process_count() == 1:
    return do()
  said = {}
  if first():
    try:
      said = {"value": do()}
    except UserError as error:
      said = {"user": str(error)}
    except OSError as error:
      said = {"system": (error.errno, error.strerror, str(error.filename))}
  said = json.loads(_broadcast(json.dumps(said).encode()))
  if "user" in said:
    raise UserError(said["user"])
  if "system" in said:
    raise OSError(*said["system"])
  return said["value"]


def _broadcast(text: bytes) -> bytes:
  """The first process's bytes; in a few static shapes, each of which compiles once."""
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  whole = np.zeros(1 << max(8, (length - 1).bit_length()), np.uint8)
  if first():
    whole[:length] = np.frombuffer(text, np.uint8)
  return multihost_utils.broadcast_one_to_all(whole)[:length].tobytes()


def lost_another(error: Exception) -> bool:
  """Whether a computation failed because another process is gone."""
  return jax.distributed.is_initialized() and bool(LOST.search(str(error)))


def leave(code: int) -> None:
  """End this process with an exit code other than 0; nothing happens to one that never joined others.

  The usual end waits for all other processes, and these may be waiting for this one in the midst of a computation. So
  it is given PATIENCE seconds, in which processes that fail alike end together; the runtime ends the others.
  """
  if not jax.distributed.is_initialized():
    return
  together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  together.start()
  together.join(PATIENCE)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
