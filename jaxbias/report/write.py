"""A run's folder in, its report out: table.md, report.html and figures/, each written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from jaxbias.errors import UserError
from jaxbias.report.figures import FIGURES
from jaxbias.report.html import html
from jaxbias.report.results import load
from jaxbias.report.tables import markdown


def write(folder: str | Path) -> Path:
  """Draw folder/results.json beside itself and return the path of report.html. Raises UserError, see `load`."""
  folder = Path(folder)
  results = load(folder)
  svgs = {name: draw(results) for name, draw in FIGURES.items()}
  for name, svg in svgs.items():
    if svg is not None:
      _replace(folder / "figures" / f"{name}.svg", svg.encode())
      _replace(folder / "figures" / f"{name}.png", FIGURES[name](results, "png"))
  _replace(folder / "table.md", markdown(results).encode())
  page = folder / "report.html"
  _replace(page, html(results, svgs).encode())
  return page


def _replace(path: Path, content: bytes) -> None:
  """Write under a temporary name, then rename: a reader, or a full disk, never leaves half a file."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f"{path} could not be written: {error.strerror}.") from None
  finally:
    temporary.unlink(missing_ok=True)
