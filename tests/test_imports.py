"""Who may import whom (shared/DESIGN.md), read off the source; and what `--help` may cost.

types, config, errors, files <- mesh <- models <- losses, interp <- methods, train, evals <- report, cli, compare
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
  {"types", "config", "errors", "files", "distributed", "hlo", "preemption", "progress", "provenance",
   "workdir"},
  {"data"},
  {"mesh"},
  {"models"},
  {"losses", "interp"},
  {"methods", "train", "evals"},
  {"report", "arguments", "cli", "compare", "convert", "diagnose", "finetune", "groups", "handle", "inputs", "plan",
   "__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
NEVER = {  # room -> rooms that it must not know, whatever their layer
  "data": {"distributed", "files", "progress", "provenance"},
  "losses": {"config"},
  "evals": {"train"},
}
WITHOUT_JAX = ("data", "report", "methods", "config", "errors", "files", "progress", "arguments", "cli", "__main__",
               "__init__")  # fmt: skip
FILES = sorted((ROOT / "jaxbias").rglob("*.py"))


def inside(path: Path) -> Path:
  """The path below the package."""
  at = max(i for i, part in enumerate(path.parts) if part == "jaxbias")
  return Path(*path.parts[at + 1 :])


def room_of(path: Path) -> str:
  return inside(path).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool, int]]:
  """(dotted module, whether it is imported at module top, line) of every import of a file."""
  out = []

  def visit(node: ast.AST, top: bool) -> None:
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.Import):
        out.extend((alias.name, top, child.lineno) for alias in child.names)
      elif isinstance(child, ast.ImportFrom):
        assert child.level == 0, f"{path}:{child.lineno}: imports here are absolute"
        out.extend((f"{child.module}.{alias.name}", top, child.lineno) for alias in child.names)
      for_checkers = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
      visit(child, top and not for_checkers and not isinstance(child, ast.FunctionDef | ast.Lambda))

  visit(ast.parse(path.read_text(encoding="utf-8")), True)
  return out


def ours(path: Path) -> list[tuple[str, bool, int]]:
  """(room, at module top, line) of what a file imports from jaxbias."""
  found = [(name.split("."), top, line) for name, top, line in imports(path)]
  return [(parts[1], top, line) for parts, top, line in found if parts[0] == "jaxbias" and len(parts) > 1]


def broken(path: Path) -> list[str]:
  """The imports of one file that the rule forbids."""
  room, out = room_of(path), []
  for name, top, line in ours(path):
    where = f"{inside(path)}:{line} imports {name}"
    if name == room:
      continue
    if name not in RANK:
      out.append(f"{where}, which is in no layer")
    elif RANK[name] > RANK[room]:
      out.append(f"{where}, which is above {room}")
    elif RANK[name] == RANK[room] and RANK[room] not in (0, RANK["train"], RANK["cli"]):
      out.append(f"{where}, which is beside {room}")
    elif name in NEVER.get(room, ()):
      out.append(f"{where}, which {room} must not know")
    elif room == "data" and name == "types" and top:
      out.append(f"{where} at module top, and types imports jax")
  return out


def test_every_room_is_in_one_layer():
  rooms = {room_of(path) for path in FILES} - {"__init__"}
  assert rooms == set(RANK)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) != "__init__"], ids=lambda p: str(inside(p)))
def test_imports_point_down(path):
  assert not broken(path)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in WITHOUT_JAX], ids=lambda p: str(inside(p)))
def test_rooms_without_jax_do_not_import_it_at_module_top(path):
  heavy = {"jax", "jaxlib", "flax", "optax", "orbax"}
  assert not [f"line {line}: {name}" for name, top, line in imports(path) if top and name.split(".")[0] in heavy]


@pytest.mark.parametrize("room,source,forbidden", [
  ("losses", "from jaxbias.train.step import loss", "above losses"),
  ("models", "def late():\n  from jaxbias.evals import run", "above models"),
  ("losses", "from jaxbias import config", "must not know"),
  ("evals", "import jaxbias.train.loop", "must not know"),
  ("data", "from jaxbias.types import ROLES", "at module top"),
  ("mesh", "from jaxbias import novelty", "in no layer"),
])  # fmt: skip
def test_the_rule_would_catch(tmp_path, room, source, forbidden):
  path = tmp_path / "jaxbias" / room / "x.py"
  path.parent.mkdir(parents=True)
  path.write_text(source)
  assert len(broken(path)) == 1 and forbidden in broken(path)[0]


@pytest.mark.parametrize("module", ["jaxbias.cli", "jaxbias.config", "jaxbias.data.sources", "jaxbias.data.pipeline",
                                    "jaxbias.methods", "jaxbias.report.write"])  # fmt: skip
def test_importing_it_does_not_import_jax(module):
  code = f"import sys, {module}; print([m for m in ('jax', 'flax', 'torch', 'tensorflow') if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_help_takes_less_than_a_second_of_computing():
  """Of this process's children alone, so that it does not matter what else the machine does."""
  spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  before = spent()
  done = subprocess.run([sys.executable, "-m", "jaxbias", "--help"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and "compare" in done.stdout
  assert spent() - before < 1.0
