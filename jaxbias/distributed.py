"""Several processes that compute as one: how they find each other, and arrays that lie across them.

Every process runs the same program on the same input and feeds the devices it has; the first one alone prints and
writes. One process is the case in which nothing here does anything.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxbias.errors import UserError

AUTO = "auto"
NEEDED = ("several processes need --coordinator HOST:PORT (of the first of them), --processes N and --process I; or "
          f"--coordinator={AUTO} alone, where SLURM, Open MPI, Cloud TPU or GKE start them")  # fmt: skip


def initialize(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
  """Join the other processes, before anything is computed; nothing happens where no argument is given.

  coordinator: HOST:PORT of process 0, the same for all, or "auto": `jax.distributed` finds all three by itself.
  timeout: seconds in which the others have to come; where process 0 misses one, the runtime ends it with a message.
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
  try:
    jax.distributed.initialize(None if coordinator == AUTO else coordinator, processes, process,
                               initialization_timeout=timeout)  # fmt: skip
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
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def on_host(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
  """The whole of each array, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(list(arrays))
  return [np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in arrays]
