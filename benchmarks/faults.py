"""A run that is killed again and again, beside the same run left alone: what was lost, and whether the end is the same.

  python -m benchmarks.faults --kills=20 --steps=200

A tiny model (tests/train) is trained and evaluated by `python -m jaxbias compare`. Each kill is a SIGKILL at a moment
that is drawn from a seed, and the same command follows it. The table counts, by moment: kills, kills that met a
checkpoint being written, files or checkpoints under a final name that cannot be read, runs that went on from another
step than the newest checkpoint, and the most steps that were done again. The last lines compare both runs bit by bit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.faults.kills import Left, Moment, differences, half_written, stop
from tests.train import CONFIG, Workplace, stereoset, tiny_model

RUN = "npo-seed0"
MOMENTS = ("start", "steps", "saving", "evaluation")


def plan(run: Path, kills: int, steps: int, every: int, seed: int) -> list[Moment]:
  """Moments in the order in which a run comes by them: a tenth before the first step, a fifth in evaluation, and of
  the others two in three between steps and one while a checkpoint is written."""
  rng = np.random.default_rng(seed)
  ends = {"start": max(1, kills // 10), "evaluation": max(1, kills // 5)}
  at = np.sort(rng.integers(1, steps - every, kills - sum(ends.values())))
  middle = [Moment(run, "saving" if i % 3 == 1 else "steps", int(step)) for i, step in enumerate(at)]
  return [Moment(run, "start", 0)] * ends["start"] + middle + [Moment(run, "evaluation", steps)] * ends["evaluation"]


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(arguments)
  place = Workplace(Path(tempfile.mkdtemp(prefix="faults-")))
  model, data = tiny_model(place.folder / "model"), stereoset(place.folder / "stereoset.json")
  place.config.write_text(CONFIG.format(model=str(model), data=str(data)))
  overrides = [f"--config.train.steps={options.steps}", f"--config.train.checkpoint_every={options.every}",
               "--config.seeds=(0,)", f"--config.compare=('{RUN.split('-')[0]}',)"]  # fmt: skip

  def start(workdir: Path) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return place.start("compare", "--config", place.config, "--workdir", workdir, *overrides, **quiet)

  def finish(workdir: Path) -> None:
    if start(workdir).wait():
      sys.exit(f"the run in {workdir} failed; the same command there says why.")

  alone, killed = place.folder / "alone", place.folder / "killed"
  finish(alone)
  rows, left, began = {name: [0, 0, 0, 0, 0] for name in MOMENTS}, None, time.monotonic()

  def settle() -> None:
    """Where the process that followed a kill began, once it has gone on."""
    row = rows[left[0]]
    row[3] += left[1].went_on_from() != left[1].saved
    row[4] = max(row[4], len(left[1].seconds) - left[1].saved)

  for moment in plan(killed / RUN, options.kills, options.steps, options.every, options.seed):
    if not stop(start(killed), moment):
      sys.exit(f"the run was done before the moment `{moment.name}` {moment.step}; give more --steps.")
    if left:
      settle()
    left = moment.name, Left.of(killed / RUN)
    row = rows[moment.name]
    row[0], row[1], row[2] = row[0] + 1, row[1] + left[1].saving, row[2] + len(half_written(killed))
  finish(killed)
  settle()
  print(f"{options.kills} kills of a run of {options.steps} steps, a checkpoint every {options.every}, "
        f"{time.monotonic() - began:.0f} s\n")  # fmt: skip
  print("| killed | kills | met a save | half written | went on elsewhere | steps done again, at most |")
  print("|---|---|---|---|---|---|")
  for name, row in rows.items():
    print(f"| {name} | {' | '.join(map(str, row))} |")
  different = differences(killed / RUN, alone / RUN)
  said = f"{', '.join(different)} differ" if different else "metrics, scores and checkpoint are the same bits"
  print(f"\nagainst the run left alone: {said}.")
  return int(bool(different) or any(row[2] or row[3] for row in rows.values()))


if __name__ == "__main__":
  sys.exit(main())
