"""Errors for people: one line that says what was wrong, where, and what to do.

`UserError` is anything the user can mend (a path, a key, a file's content). The command line prints
its message after `jaxbias: ` and exits with code 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """Something the user can mend; the message says what, where and what now."""


class Preempted(Exception):
  """Told to stop, and stopped where nothing is lost; the message says what is saved."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
  """The valid name closest to `name`, or None when nothing is close."""
  found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
  return found[0] if found else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
  """A clause for the end of a message: the nearest valid name, else all of them."""
  valid = sorted(valid)
  close = nearest(name, valid)
  return f"did you mean `{close}`?" if close else f"choose from {', '.join(valid)}."
