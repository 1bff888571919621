"""Benchmarks by name: all are found, none twice, and each says what a person needs to know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jaxbias.errors import UserError
from jaxbias.evals import registry, show
from jaxbias.evals.metrics import Higher, Ideal, Lower, Neutral
from jaxbias.evals.task import CAUSAL, EITHER, MASKED

EVALS = Path(registry.__file__).parent


def test_every_file_that_defines_tasks_is_found():
  defining = {path.stem for path in EVALS.glob("*.py") if "\nTASKS = (" in path.read_text()}
  assert set(registry.families()) == defining and {"stereoset", "bbq", "seat", "tofu"} <= defining


def test_names_are_unique_and_lead_back():
  tasks = registry.tasks()
  assert len(tasks) == sum(map(len, registry.members().values())) and len(tasks) > 50
  for name, task in tasks.items():
    assert registry.get(name) is task and task.name == name
    assert task in registry.members()[registry.family_of(name)]


def test_two_tasks_of_one_name_are_refused(monkeypatch):
  monkeypatch.setattr(registry, "families", lambda: ("lambada", "lambada"))
  found = registry.members.__wrapped__
  monkeypatch.setattr(registry.importlib, "import_module", lambda name: type("file", (), {"TASKS": twice}))
  twice = (registry.get("lambada_openai"),) * 2
  with pytest.raises(ValueError, match="lambada_openai"):
    found()


def test_the_nearest_name_is_told():
  with pytest.raises(UserError, match="no benchmark `crows_pair`; did you mean `crows_pairs`"):
    registry.get("crows_pair")


@pytest.mark.parametrize("task", registry.tasks().values(), ids=registry.tasks())
def test_each_says_which_data_models_and_metrics(task):
  assert len(show.expected(task)) > 20
  assert task.models in (CAUSAL, MASKED, EITHER) and task.bos in ("prefixed_bos", "split_bos")
  assert task.benchmark.metrics and task.benchmark.source and task.benchmark.cluster


@pytest.mark.parametrize("direction, said", [
  (Ideal(50.0, "%"), "m % -> 50"), (Higher(), "m up"), (Lower("nats"), "m nats down"), (Neutral(), "m"),
])  # fmt: skip
def test_a_metric_says_which_way_is_better(direction, said):
  assert show.label("m", direction) == said


def test_the_list_names_all():
  console = Console(width=200, record=True, file=open("/dev/null", "w"))
  console.print(show.listing(registry.members()))
  printed = console.export_text()
  assert all(name in printed for name in registry.tasks())
  assert "ss % -> 50, lms % up" in printed and "causal or masked" in printed


def test_listing_imports_no_jax():
  code = ("import sys; from jaxbias.evals import registry, show; show.listing(registry.members()); "
          "print('jax' in sys.modules)")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "False"
