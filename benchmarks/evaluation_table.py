"""The estimates of `python -m jaxbias evaluate --out FILE` as Markdown: python benchmarks/evaluation_table.py FILE"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxbias.evals.metrics import Estimate
from jaxbias.evals.registry import get
from jaxbias.evals.show import label, number


def table(name: str, record: dict) -> str:
  """One benchmark: a row for each group, a column for each metric that has a value somewhere."""
  metrics = {metric: direction for metric, direction in get(name).benchmark.metrics.items()
             if any(metric in estimates for estimates in record["estimates"].values())}
  lines = [[f"`{name}`", *(label(*metric) for metric in metrics.items())], ["---", *["---:"] * len(metrics)]]
  for group, estimates in record["estimates"].items():
    lines.append([group, *(number(Estimate(**estimates[metric]), direction.unit) if metric in estimates else ""
                           for metric, direction in metrics.items())])
  of = record["subset"] or f"{record['of']:,} example{'s' * (record['of'] != 1)}"
  return "\n".join([*("| " + " | ".join(cells) + " |" for cells in lines), "", f"({of}; {record['source']})"])


if __name__ == "__main__":
  found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
  print(f"{found['model']['name']}, {found['dtype']}, {found['hardware']}\n")
  print("\n\n".join(table(name, record) for name, record in found["benchmarks"].items()))
