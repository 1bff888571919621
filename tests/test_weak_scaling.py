"""The page of weak scaling rests on a closed form: it is what the plan reads off the step that it compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.weak_scaling import CHIPS, MODELS, Shape, received, seconds_of_traffic

ROOT = Path(__file__).parents[1]
TINY = Shape(layers=3, D=64, F=128, V=208, heads=4, kv_heads=2, head_dim=16, tied=False, rank=4)
MODES = {"full": ["--config.lora.rank=0", "--config.train.base=('*',)"], "lora": [f"--config.lora.rank={TINY.rank}"]}
SCALAR = 4 * 2 * 7 / 8  # a loss or a norm, all-reduced by eight


def tiny_config(path: Path) -> Path:
  of = json.loads((ROOT / "tests" / "oracles" / "models" / "llama" / "config.json").read_text())
  path.write_text(json.dumps(of | {
    "num_hidden_layers": TINY.layers, "hidden_size": TINY.D, "intermediate_size": TINY.F, "vocab_size": TINY.V,
    "num_attention_heads": TINY.heads, "num_key_value_heads": TINY.kv_heads, "head_dim": TINY.head_dim,
    "tie_word_embeddings": TINY.tied,
  }))  # fmt: skip
  return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_the_closed_form_is_the_plans_figure(mode, mesh, tmp_path):
  out = tmp_path / "plan.json"
  command = [sys.executable, "-m", "jaxbias", "plan", "--config=configs/quickstart.py", "--variant=sft", "--devices=8",
             f"--model-config={tiny_config(tmp_path / 'config.json')}", f"--config.mesh.{mesh}=8", "--batch=8",
             "--length=64", f"--out={out}", *MODES[mode]]  # fmt: skip
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  planned, predicted = json.loads(out.read_text())["collectives"], received(TINY, mode, mesh, 8, 1, 64)
  assert planned.keys() == predicted.keys()
  for kind, size in predicted.items():
    scalars = (planned[kind] - size) / SCALAR
    assert scalars == int(scalars) and 0 <= scalars < 100 * (kind == "all-reduce") + 1, (kind, planned[kind], size)


def test_the_shapes_are_the_published_ones():
  assert [round(m.parameters / 1e6) for m in MODELS.values()] == [1236, 8030, 70554]


def test_an_island_takes_in_what_its_chips_share_once():
  h100 = CHIPS["H100"]
  assert seconds_of_traffic(450e9, h100, 8) == 1.0
  one = 1e9 * 15 / 16  # a gigabyte over 16 chips: each island of 8 lacks half, and has eight links
  assert seconds_of_traffic(one, h100, 16) == pytest.approx(max(one / 450e9, 0.5e9 / 400e9))
