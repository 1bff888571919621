"""Being told to stop, and stopping where nothing is lost: SIGTERM, or the notice that a machine will be taken away.

A run asks `due` at its step boundaries, saves and raises Preempted; between two batches of an evaluation, where there
is nothing to save, `check` does both. Several processes hear through jax's preemption service, which makes all of them
stop at the same boundary, whichever was told.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from jaxbias.errors import Preempted

HANG = 1800  # seconds between two boundaries, compiling included, after which one of several processes ends itself

_listening, _told = False, False
_boundaries = 0  # asked so far: jax's service agrees on a number, and so counts through all runs of a command


@contextlib.contextmanager
def listening() -> Iterator[None]:
  """Within, SIGTERM is for `due` to tell; a second one ends the process, as the first would have done before.

  In several processes jax's service listens from their meeting on (`distributed.initialize`), and a second SIGTERM
  counts from the boundary on at which they stop.
  """
  global _listening, _told
  mine = not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
  before = signal.signal(signal.SIGTERM, lambda *_: _hear()) if mine else None
  _listening = True
  try:
    yield
  finally:
    _listening = _told = False
    if mine:
      signal.signal(signal.SIGTERM, before)
    else:
      faulthandler.cancel_dump_traceback_later()


def _hear() -> None:
  global _told
  _told = True
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def due() -> bool:
  """Whether to save and stop here. All processes have to ask at the same places, and get the same answer.

  To ask is a sign of life, too: one of several processes that does not for HANG seconds ends with a traceback of what
  it was doing.
  """
  global _boundaries
  if _listening and jax.distributed.is_initialized():
    faulthandler.dump_traceback_later(HANG, exit=True)
    _boundaries += 1
    if not _told and multihost_utils.reached_preemption_sync_point(_boundaries):
      _hear()
  return _told


def check() -> None:
  """Raises Preempted where it is due: what is finished is on disk already."""
  if due():
    raise Preempted("what was finished is saved")
