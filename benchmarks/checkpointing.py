"""What saving in the background costs: steps with a checkpoint every N of them, and steps without.

  python benchmarks/checkpointing.py --every 20 --steps 200

The same run twice in one process, of LoRA on a model: once with checkpoints, once with none but the last. A warm-up run
compiles. Prints seconds a step of both (the mean over all steps but those that compile, saves included), their ratio,
and how long `save` held a step up. The last save is waited for outside of both, as a run waits once at its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from jaxbias import compare, config
from jaxbias.models.sources import cache_folder
from jaxbias.train import reference
from jaxbias.train.loop import Run, Trainer, train


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--variant", default="sft", help="of configs/quickstart.py")
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--every", type=int, default=20)
  options = parser.parse_args()
  settings, _ = config.from_command_line([
    "--config=configs/quickstart.py", f"--config.model={options.model}", f"--config.compare=('{options.variant}',)",
    f"--config.train.steps={options.steps}", f"--config.train.checkpoint_every={options.every}",
  ])  # fmt: skip
  folder = Path(tempfile.mkdtemp(prefix="checkpointing-"))
  job = compare.prepare(settings, folder / "work", "benchmarks/checkpointing.py")
  (variant,), shapes, asked = job.variants, job.shapes(), job.reference_segments()
  ref = reference.compute(job.trainer.model, asked, cache_folder() / "reference") if asked else None
  sampler = job.sampler(variant, settings.seeds[0], ref)

  def run(name: str, steps: int, every: int) -> tuple[float, float]:
    """Seconds a step, and of these in `save`; compiling apart."""
    plain = job.trainer.train.copy_and_resolve_references()
    plain.update(steps=steps, checkpoint_every=every)
    trainer: Trainer = dataclasses.replace(job.trainer, train=plain)
    (folder / name).mkdir()
    records = []
    spec = Run(folder / name, job.plain, variant.objective, variant.coefficients, sampler, shapes[variant.objective])
    train(trainer, spec, records.append)
    steady = [record for record in records if "compile" not in record["spent"]]
    held = sum(record["spent"].get("checkpoint", 0.0) for record in steady)
    whole = sum(record["seconds"] + sum(record["spent"].values()) for record in steady)
    return whole / len(steady), held / len(steady)

  run("warm", 3, 3)
  without, _ = run("without", options.steps, options.steps)
  saving, held = run("saving", options.steps, options.every)
  print(f"{options.steps} steps of {options.variant}, {job.trainer.num_trainable:,} trained parameters\n"
        f"without checkpoints {without:.4f} s a step\n"
        f"every {options.every} steps      {saving:.4f} s a step: {100 * (saving / without - 1):+.2f} %, of which "
        f"{100 * held / saving:.2f} % in `save`")  # fmt: skip


if __name__ == "__main__":
  main()
