"""A full-parameter step on eight FSDP devices sends what its plan says: read off the program that trains.

  python -m tests.multidevice.test_collectives MODEL      # what the test runs, with XLA_FLAGS set; prints JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import tiny_model

ROOT = Path(__file__).parents[2]
LENGTH = 64


def worker(folder: str) -> None:
  import jax
  import numpy as np

  from jaxbias import plan
  from jaxbias.config import from_command_line
  from jaxbias.hlo import collective_bytes
  from jaxbias.losses.registry import parse
  from jaxbias.mesh import batch_sharding, make_mesh, replicated
  from jaxbias.models import language_model
  from jaxbias.train.loop import Trainer

  config = from_command_line(["--config=configs/quickstart.py", "--config.mesh.fsdp=8", "--config.dtype=float32",
                              "--config.lora.rank=0", "--config.train.base=('*',)"])[0]  # fmt: skip
  planned = plan.plan(config, folder, "sft", 8, LENGTH)
  model = language_model.load(folder, "float32", make_mesh(config.mesh))
  trainer, (objective, coefficients) = Trainer.of(model, config), parse({"sft": {}})
  state = trainer.initial_state(0, objective)
  ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), plan.abstract_batch(config, objective, 8, LENGTH, model))
  batch = jax.device_put(ones, batch_sharding(model.mesh))
  traced = {"learning_rate": np.float32(1e-3), "losses": jax.tree.map(np.float32, coefficients)}
  traced = jax.device_put(traced, replicated(model.mesh))
  step = trainer.step_for(objective)
  arguments = (state, {"params": model.params, "lora_scale": trainer.scale}, batch, traced)
  text = step.lower(*arguments).compile().as_text()
  sent, unknown = collective_bytes(text, 8)
  before = np.asarray(state.params["base"]["layers"]["mlp"]["up"]["kernel"])
  state, metrics = step(*arguments)
  moved = not np.array_equal(before, np.asarray(state.params["base"]["layers"]["mlp"]["up"]["kernel"]))
  print(json.dumps({"planned": planned.collectives, "sent": sent, "unknown": unknown, "moved": moved,
                    "finite": bool(metrics["finite"])}))  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
  folder = tiny_model(tmp_path_factory.mktemp("collectives") / "model")
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  command = [sys.executable, "-m", "tests.multidevice.test_collectives", str(folder)]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_the_program_that_trains_sends_what_its_plan_says(found):
  assert found["finite"] and found["moved"] and found["unknown"] == 0
  assert found["sent"] == found["planned"] and {"all-gather", "all-reduce"} <= found["sent"].keys()


if __name__ == "__main__":
  worker(sys.argv[1])
