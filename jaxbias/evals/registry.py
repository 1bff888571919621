"""name -> Task. A benchmark is a file of this folder that defines `TASKS`; nothing else needs to know of it."""

from __future__ import annotations

import functools
import importlib
import re
from importlib import resources

from jaxbias.errors import UserError, did_you_mean
from jaxbias.evals.task import Task


@functools.cache
def families() -> tuple[str, ...]:
  """The files that define TASKS, by their names. Found by their text: importing the others would import jax."""
  files = [file for file in resources.files("jaxbias.evals").iterdir() if file.name.endswith(".py")]
  return tuple(sorted(file.name.removesuffix(".py") for file in files
                      if re.search(r"^TASKS\b", file.read_text(encoding="utf-8"), re.MULTILINE)))


@functools.cache
def members() -> dict[str, tuple[Task, ...]]:
  """{family: its tasks}. Raises ValueError where two tasks have one name."""
  found = {family: importlib.import_module(f"jaxbias.evals.{family}").TASKS for family in families()}
  names = [task.name for tasks in found.values() for task in tasks]
  if twice := {name for name in names if names.count(name) > 1}:
    raise ValueError(f"two tasks have the name {sorted(twice)[0]}")
  return found


def tasks() -> dict[str, Task]:
  return {task.name: task for found in members().values() for task in found}


def get(name: str) -> Task:
  """Raises UserError with the nearest name for one that there is not."""
  if name not in tasks():
    raise UserError(f"there is no benchmark `{name}`; {did_you_mean(name, tasks())}")
  return tasks()[name]


def family_of(name: str) -> str:
  return next(family for family, found in members().items() if any(task.name == name for task in found))
