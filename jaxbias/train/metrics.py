"""Where a run's numbers go: JSONL always, TensorBoard beside it, Weights & Biases where it is asked for. Rewound on
resume, so that no step is there twice."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from tensorboard.summary import Writer as BoardWriter

from jaxbias.errors import UserError
from jaxbias.files import replace, write_json


class Writer(Protocol):
  """Something that takes the record of each step, once and in order."""

  def write(self, step: int, record: Mapping) -> None: ...

  def close(self) -> None: ...


class MetricsWriter:
  """Appends one JSON line a step to `folder/metrics.jsonl`, and gives the record to other writers."""

  def __init__(self, folder: Path, after_step: int, project: str = "", config: Mapping | None = None):
    """Keeps the lines up to `after_step`: those that came later will be computed again.

    project: of Weights & Biases, "" for none, which is shown `config`.
    """
    path = folder / "metrics.jsonl"
    kept = rewind(path, lambda line: line["step"] <= after_step)
    self._lines = path.open("a", encoding="utf-8")
    self._others: list[Writer] = [Board(folder / "tensorboard")]
    if project:
      self._others.append(WeightsAndBiases(project, folder, after_step, config or {}))
    for line in kept:
      self._others[0].write(line["step"], line)

  def write(self, step: int, record: Mapping) -> None:
    self._lines.write(json.dumps({"step": step, **record}) + "\n")
    self._lines.flush()
    for other in self._others:
      other.write(step, record)

  def close(self) -> None:
    self._lines.close()
    for other in self._others:
      other.close()


class Board:
  """TensorBoard's scalars. Its files cannot be rewound: they are written anew."""

  def __init__(self, folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    self._board = BoardWriter(str(folder))

  def write(self, step: int, record: Mapping) -> None:
    for name, value in scalars(record).items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._board.close()


class WeightsAndBiases:
  """The same scalars as a run of a Weights & Biases project. It goes on under the same id, and leaves out the steps
  that it has seen before, which are the same."""

  def __init__(self, project: str, folder: Path, after_step: int, config: Mapping):
    init, path = package(), folder / "wandb.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"id": uuid.uuid4().hex[:8]}
    write_json(path, known)
    self._run = init(project=project, name=f"{folder.parent.name}-{folder.name}", dir=str(folder), config=dict(config),
                     id=known["id"], resume="allow")  # fmt: skip

  def write(self, step: int, record: Mapping) -> None:
    self._run.log(scalars(record), step=step)

  def close(self) -> None:
    self._run.finish()


def package() -> Callable:
  """`wandb.init`. Raises UserError where Weights & Biases is not installed."""
  try:
    from wandb import init
  except ImportError:
    raise UserError("log.wandb_project is set and the package wandb is not installed; pip install 'jaxbias[wandb]', or "
                    "leave the project empty.") from None
  return init


def scalars(record: Mapping) -> dict[str, float]:
  """{name, or group/name: value} of the numbers that are drawn."""
  flat = {k: v for k, v in record.items() if isinstance(v, float)}
  groups = (group for group in ("parts", "notes", "spent") if group in record)
  return flat | {f"{group}/{k}": v for group in groups for k, v in record[group].items()}


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
