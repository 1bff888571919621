"""`results.json`, schema 1: reading, checking, and the few questions that every table and picture asks of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxbias.errors import UserError

SCHEMA = 1
REQUIRED = ("title", "model", "data", "config_hash", "seeds", "steps", "interval", "metrics", "rows")
DIRECTIONS = ("ideal", "higher", "lower", "none")


class Estimate(NamedTuple):
  """A finite value with its interval (None where there is none) and the value of each seed."""

  value: float
  low: float | None
  high: float | None
  per_seed: tuple[float, ...]


def load(path: str | Path) -> dict[str, Any]:
  """The results in `path`: a results.json or the folder that holds one. Raises UserError unless it is schema 1."""
  path = Path(path)
  file = path / "results.json" if path.is_dir() else path
  try:
    results = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"there is no {file}; `python -m jaxbias compare` writes one when it is done.") from None
  except OSError as error:
    raise UserError(f"{file} could not be read: {error.strerror}.") from None
  except UnicodeDecodeError:
    raise UserError(f"{file} is not a text file; a results.json was expected.") from None
  except json.JSONDecodeError as error:
    raise UserError(f"{file} is not JSON: line {error.lineno} column {error.colno}: {error.msg}.") from None
  _check(results, file)
  return results


def _check(results: Any, file: Path) -> None:
  if not isinstance(results, dict) or "schema" not in results:
    raise UserError(f"{file} is not a jaxbias results file: it has no `schema`.")
  if results["schema"] != SCHEMA:
    raise UserError(f"{file} has schema {results['schema']!r}; this jaxbias reads schema {SCHEMA}.")
  if missing := [key for key in REQUIRED if key not in results]:
    raise UserError(f"{file} lacks {', '.join(f'`{key}`' for key in missing)}; run `python -m jaxbias compare` again.")
  for key, kind in {"model": dict, "data": dict, "metrics": dict, "rows": list, "seeds": list}.items():
    if not isinstance(results[key], kind):
      raise UserError(f"{file}: `{key}` must be {'an object' if kind is dict else 'a list'}.")
  for name, metric in results["metrics"].items():
    if not isinstance(metric, dict) or metric.get("better") not in DIRECTIONS:
      raise UserError(f"{file}: `metrics.{name}.better` must be one of {', '.join(DIRECTIONS)}.")
    if metric["better"] == "ideal" and not isinstance(metric.get("ideal"), int | float):
      raise UserError(f"{file}: `metrics.{name}` has no `ideal` value.")
  for index, row in enumerate(results["rows"]):
    if not isinstance(row, dict) or "name" not in row:
      raise UserError(f"{file}: `rows[{index}]` has no `name`.")


def finite(value: Any) -> float | None:
  """`value` as a float, or None where it is missing or not finite."""
  return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def base(results: Mapping) -> Mapping | None:
  """The untrained model's row."""
  return next((row for row in results["rows"] if row["name"] == "base"), None)


def trained(results: Mapping) -> list[Mapping]:
  """The variants' rows in the order of the file, failed ones included."""
  return [row for row in results["rows"] if row["name"] != "base"]


def rows(results: Mapping) -> list[Mapping]:
  """Every row, the base model first."""
  first = base(results)
  return ([first] if first else []) + trained(results)


def label(row: Mapping) -> str:
  """What people call the row, on one line."""
  text = str(row.get("label") or row["name"])
  return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def estimate(row: Mapping, metric: str, domain: str | None = None) -> Estimate | None:
  """The row's estimate of a metric, overall or in one domain; None where there is none."""
  found = _raw(row, metric, domain)
  if (value := finite(found.get("value"))) is None:
    return None
  seeds = tuple(number for seed in found.get("per_seed") or () if (number := finite(seed)) is not None)
  return Estimate(value, finite(found.get("low")), finite(found.get("high")), seeds)


def reason(row: Mapping, metric: str) -> str | None:
  """Why the row has no estimate of the metric, where the file says so."""
  return _raw(row, metric).get("reason")


def _raw(row: Mapping, metric: str, domain: str | None = None) -> Mapping:
  estimates = (row.get("domains") or {}).get(domain) if domain else row.get("estimates")
  return (estimates or {}).get(metric) or {}


def domains(results: Mapping) -> list[str]:
  """The domains that any row was measured in, in the order of the file."""
  return list(dict.fromkeys(name for row in rows(results) for name in row.get("domains") or {}))


def number(value: float, metric: Mapping) -> str:
  """A value as it is printed: percentages to 0.1, nats to 0.001 with their sign (they are changes)."""
  return f"{value:z.1f}" if metric.get("unit") == "%" else f"{value:+z.3f}"


def interval(found: Estimate, metric: Mapping) -> str:
  """`[low, high]`, or nothing where the estimate has no interval."""
  if found.low is None or found.high is None:
    return ""
  low, high = (number(end, metric).removeprefix("+") for end in (found.low, found.high))
  return f"[{low}, {high}]"


def distance(found: Estimate, metric: Mapping) -> tuple[float, float]:
  """How near and how far from the ideal the interval reaches; for a plain value, its own distance twice."""
  low, high = (found.value if end is None else end for end in (found.low, found.high))
  ends = abs(low - metric["ideal"]), abs(high - metric["ideal"])
  return 0.0 if low <= metric["ideal"] <= high else min(ends), max(ends)
