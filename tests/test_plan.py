"""`plan`: the train step of a tiny model on pretended devices, and the reading of a program's collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxbias import plan as planning
from jaxbias.config import from_command_line
from jaxbias.hlo import collective_bytes

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / "tests" / "oracles" / "models" / "llama" / "config.json"  # 3 layers, 32 wide, 199 tokens


def plan(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "jaxbias", "plan", "--config=configs/quickstart.py", *arguments]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """(the command's end, its JSON) for a Llama of 3 layers on fsdp 4 x tensor 2, one GiB each."""
  out = tmp_path_factory.mktemp("plan") / "plan.json"
  done = plan(f"--model-config={LLAMA}", "--devices=8", "--config.mesh.preset=fsdp_tensor", "--config.lora.rank=2",
              "--variant=biasunlearn", "--batch=8", "--length=32", "--device-memory=1", f"--out={out}")  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  return done, json.loads(out.read_text())


def test_what_lies_on_a_device_is_counted_by_hand(found):
  _, plan = found
  assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
  D, F, V, L, H, G, C, R = 32, 56, 199, 3, 4, 2, 8, 2  # as config.json says
  layer = (D * C * (2 * H + 2 * G) + 3 * D * F) // 8 + 2 * D // 4  # every kernel over both axes, norms over fsdp
  table = V * D // 4  # 199 tokens do not divide over tensor; the head is the same table
  weights = 2 * (L * layer + table + D // 4)
  assert plan["memory"]["parameters (frozen)"] == weights + 4 * L  # bfloat16, and a float32 scale a layer
  q, kv, wide = D // 4 + H * C // 2, D // 4 + G * C // 2, D // 4 + F // 2
  adapters = L * R * (2 * q + 2 * kv + 3 * wide)
  assert plan["memory"]["adapters"] == 4 * adapters
  assert plan["memory"]["optimizer state"] == 8 * adapters + 8  # two moments, two counters
  assert plan["peak"] == sum(plan["memory"].values()) and plan["memory"]["temporaries"] > 0


def test_flops_and_collectives_are_of_the_right_size(found):
  _, plan = found
  D, F, L, H, G, C, T, tokens = 32, 56, 3, 4, 2, 8, 32, 256
  products = 2 * L * (D * C * (2 * H + 2 * G) + 3 * D * F)
  most = 4 * products + 12 * L * H * C * T + 12 * D * 199 + 0.2 * products  # every token at the head; adapters
  assert 3 * products * tokens < plan["flops"] < most * tokens
  assert {"all-gather", "all-reduce"} <= plan["collectives"].keys() and plan["unknown_loops"] == 0
  gathered = 2 * 2 * L * (D * C * (2 * H + 2 * G) + 3 * D * F) // 2 * 3 / 4  # bfloat16, there and back, over fsdp
  assert plan["collectives"]["all-gather"] > gathered


def test_the_table_is_for_a_person(found):
  done, plan = found
  for said in ("fsdp 4 x tensor 2", "optimizer state", "peak", "of 1 GiB", "received by all-gather", "FLOPs of a step",
               "8 rows of 32 tokens", "temporaries are an estimate"):  # fmt: skip
    assert said in " ".join(done.stdout.split()), said
  assert done.stderr.count("replicated: vocab (199 over tensor=2) of embedding.") == 1


def test_the_program_is_as_long_for_twelve_layers_as_for_three(tmp_path, monkeypatch):
  """So compiling it takes as long: what is compiled is one layer, and how often it turns."""
  lengths = {}

  def stop_before_compiling(lowered):
    lengths[layers] = len(lowered.as_text().splitlines())
    raise InterruptedError

  monkeypatch.setattr(planning, "_compile", stop_before_compiling)
  settings = from_command_line(["--config=configs/quickstart.py", "--config.lora.rank=2"])[0]
  for layers in (3, 12):
    config = tmp_path / f"{layers}.json"
    config.write_text(json.dumps(json.loads(LLAMA.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(InterruptedError):
      planning.plan(settings, str(config), "biasunlearn", length=32)
  assert lengths[3] == lengths[12] > 1000


@pytest.mark.parametrize("arguments, said", [
  (["--device-memory=0.00001", "--length=16"], "are there; most are temporaries, which fewer rows (--batch)"),
  (["--batch=3"], "--batch 3 packed rows cannot be cut into 2 equal parts"),
  (["--length=5000"], "--length 5000 is past the model's"),
  (["--config.mesh.preset=fdsp"], "mesh.preset = `fdsp` is not known; did you mean `fsdp`?"),
  (["--config.mesh.rules.vocab=tensr"], "mesh.rules.vocab = `tensr` is not known; did you mean `tensor`?"),
  (["--config.mesh.rules.mpl=tensor"], "has no key `mesh.rules.mpl`; did you mean `mesh.rules.mlp`?"),
  (["--config.mesh.rules.mlp=fsdp"], "mesh.rules sends both `embed` and `mlp` to `fsdp`"),
  (["--config.mesh.tensor=3"], "does not multiply up to 2 device(s)."),
  (["--variant=sfft"], "the config has no variant `sfft`; did you mean `sft`?"),
  (["--devices=0"], "have to be positive"),
])  # fmt: skip
def test_what_cannot_be_planned_is_one_line(arguments, said):
  done = plan(f"--model-config={LLAMA}", "--devices=2", "--config.lora.targets=('q',)", *arguments)
  line = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and line.startswith("jaxbias: ") and said in line, done.stderr[-2000:]


PROGRAM = """HloModule step
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g = bf16[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}
%unrolled (p: s32[]) -> s32[] {
  %r = f32[16]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
%limit (p: s32[]) -> pred[] {
  %c = s32[] constant(5)
  ROOT %lt = pred[] compare(%p, %c), direction=LT
}
%unknown (p: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%p, %q), direction=LT
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (s32[], bf16[8,4]) while(%t), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = s32[] while(%t), condition=%limit, body=%unrolled
  %u = s32[] while(%t), condition=%unknown, body=%unrolled
  %s = f32[2]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %k = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
}
"""


def test_collectives_are_counted_as_rings_move_them():
  received, unknown = collective_bytes(PROGRAM, 8)
  assert received == {
    "all-gather": 3 * 64 * 3 / 4,  # the loop turns three times, groups of four
    "all-reduce": (5 + 1) * 64 * 2 * 1 / 2,  # five times by its condition, once where nothing is known; pairs
    "reduce-scatter": 8 * 3,
    "collective-permute": 8,
  }
  assert unknown == 1
