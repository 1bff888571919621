"""Where a run's numbers go: JSONL always, TensorBoard beside it. Rewound on resume, so no step is there twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tensorboard.summary import Writer

from jaxbias.files import replace


class MetricsWriter:
  """Appends one JSON line a step to `folder/metrics.jsonl` and the same scalars to `folder/tensorboard`."""

  def __init__(self, folder: Path, after_step: int):
    """Keeps the lines up to `after_step`: those that came later will be computed again."""
    self.path = folder / "metrics.jsonl"
    kept = rewind(self.path, lambda line: line["step"] <= after_step)
    self._lines = self.path.open("a", encoding="utf-8")
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # its files cannot be rewound: they are written anew
    self._board = Writer(str(folder / "tensorboard"))
    for line in kept:
      self._draw(line["step"], line)

  def write(self, step: int, record: dict) -> None:
    self._lines.write(json.dumps({"step": step, **record}) + "\n")
    self._lines.flush()
    self._draw(step, record)

  def _draw(self, step: int, record: dict) -> None:
    scalars = {k: v for k, v in record.items() if isinstance(v, float)}
    nested = {f"{group}/{k}": v for group in ("parts", "notes") for k, v in record.get(group, {}).items()}
    for name, value in {**scalars, **nested}.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._lines.close()
    self._board.close()


def rewind(path: Path, keep: Callable[[dict], bool]) -> list[dict]:
  """Drop the lines of a file that `keep` does not hold of, because they will be written again; returns the others."""
  kept = [line for line in read_jsonl(path) if keep(line)]
  replace(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
  return kept


def read_jsonl(path: Path) -> list[dict]:
  """The complete lines of a metrics file; a last line that was cut short by a kill is left out."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]
