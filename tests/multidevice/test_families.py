"""Every family on eight devices: hidden states, logits, loss and gradients of the oracle models on several meshes are
those of one device; and parameters are born on the devices that keep them.

  python -m tests.multidevice.test_families OUT HALF      # what the tests run, with XLA_FLAGS set
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "oracles" / "models"
EVERY = sorted(folder.name for folder in MODELS.iterdir() if (folder / "config.json").exists())
ALL = bool(os.environ.get("ALL_MESHES"))  # every family on every mesh; else those that differ in kind, on one
FAMILIES = EVERY if ALL else ["albert", "bert", "gemma3", "gpt2", "gpt_neox", "opt", "phi3", "qwen3"]
EVEN = "llama, even"  # random weights of a shape that divides everywhere, as the oracles' 199 tokens never do
ONE = (1, 1, 1)
EVERYWHERE = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2))  # data, fsdp, tensor
RANK = 2


def meshes(name: str) -> tuple[tuple[int, int, int], ...]:
  """All five with ALL_MESHES=1 in the environment; else one of two or three axes, and three for one model."""
  if ALL:
    return EVERYWHERE
  return EVERYWHERE[1:4] if name == EVEN else (((2, 2, 2), (1, 4, 2))[FAMILIES.index(name) % 2],)


CASES = [(name, shape) for name in (*FAMILIES, EVEN) for shape in meshes(name)]


# In the subprocesses


def worker(out: Path, half: int) -> None:
  import jax

  assert jax.device_count() == 8
  found = {}
  for name in (*FAMILIES, EVEN)[half::2]:
    for shape in (ONE, *meshes(name)):
      said = []
      handler = logging.Handler()
      handler.emit = lambda record, said=said: said.append(record.getMessage())
      logging.getLogger("jaxbias").handlers = [handler]
      arrays, shards = everything(name, shape)
      np.savez(out / f"{label(name, shape)}.npz", **arrays)
      found[label(name, shape)] = {"shards": shards, "log": [line for line in said if "replicated" in line]}
  (out / f"found{half}.json").write_text(json.dumps(found))


def label(name: str, shape: tuple[int, int, int]) -> str:
  return f"{name} {'x'.join(map(str, shape))}"


def everything(name: str, shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], dict[str, tuple]]:
  """Outputs and gradients of one model on one mesh, and the shape of the first device's part of every parameter."""
  import dataclasses

  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  from flax.traverse_util import flatten_dict

  from jaxbias.losses.logprobs import logits, token_logprobs
  from jaxbias.mesh import AXES, batch_sharding, make_mesh
  from jaxbias.models.checkpoints import load_params, read_config
  from jaxbias.models.families import model_config
  from jaxbias.models.language_model import layout_for
  from jaxbias.models.lora import LoraConfig, init_lora, lora_axes, lora_scale
  from jaxbias.models.transformer import Transformer, abstract_variables, head

  folder = MODELS / ("llama" if name == EVEN else name)
  config = model_config(read_config(folder))
  if name == EVEN:
    config = dataclasses.replace(config, vocab_size=208, num_heads=8, num_kv_heads=8)
  mesh = make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[: np.prod(shape)])
  layout, module = layout_for(config, mesh), Transformer(config, mesh=mesh)
  boxed = abstract_variables(module)
  abstract, logical = nn.unbox(boxed), nn.get_partition_spec(boxed)
  layout.report(abstract, logical)
  shardings = layout.shardings(abstract, logical)
  one = jnp.zeros((1, 1), jnp.int32)
  if name == EVEN:
    init = lambda key: nn.unbox(module.init(key, one, one, one)["params"])
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(1))
  else:
    params = load_params(folder, config, abstract, shardings, "float32")
  lora_config = LoraConfig(RANK, 4.0, ("q", "k", "o", "down"))
  lora = init_lora(jax.random.key(0), abstract, lora_config)
  lora = jax.tree.map(lambda x: x + 0.05, lora)  # away from the start, where half of the factors have no gradient
  lora = jax.device_put(lora, layout.shardings(lora, lora_axes(boxed, lora_config)))

  with np.load(folder / "io.npz") as io:
    rows = np.arange(8) % len(io["input_ids"])
    tokens, mask = (io[key][rows].astype(np.int32) for key in ("input_ids", "mask"))
  tokens = (tokens + np.arange(8)[:, None] * mask) % 199  # no two rows alike
  position = (np.cumsum(mask, axis=1) - 1).clip(0).astype(np.int32)
  batch = jax.device_put((tokens, mask, position, np.roll(tokens, -1, axis=1)), batch_sharding(mesh))

  def loss(trained, tokens, segment, position, target):
    variables = {**trained, "lora_scale": lora_scale(lora_config, config.num_layers)}
    hidden, captures = module.apply(variables, tokens, segment, position, capture=("residual_out",))
    out = head(trained["params"], config, mesh)
    total = -jnp.where(segment > 0, token_logprobs(hidden, out, target), 0).sum() / (segment > 0).sum()
    return total, {"hidden": hidden, "logits": logits(hidden, out), "layers": captures["residual_out"]}

  compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (total, outputs), grads = compute({"params": params, "lora": lora}, *batch)
  flat = lambda tree, what: {f"{what}/{'/'.join(path)}": leaf for path, leaf in flatten_dict(tree).items()}
  arrays = {"loss": total, **outputs, **flat(grads, "gradient")}
  parts = flat(params, "params") | flat(lora, "lora")
  shards = {path: [leaf.shape, leaf.addressable_shards[0].data.shape] for path, leaf in parts.items()}
  return {path: np.asarray(leaf) for path, leaf in arrays.items()}, shards


# In the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """Where the subprocesses left their findings: two at once, as each mostly compiles on one core."""
  out = tmp_path_factory.mktemp("families")
  environment = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }  # fmt: skip
  command = [sys.executable, "-m", "tests.multidevice.test_families", str(out)]
  start = lambda half: subprocess.Popen([*command, str(half)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, text=True)  # fmt: skip
  running = [start(half) for half in range(2)]
  for half, process in enumerate(running):
    said = process.communicate(timeout=1800)[1]
    assert (out / f"found{half}.json").exists(), said[-3000:]
  return out


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
  return {k: v for half in range(2) for k, v in json.loads((folder / f"found{half}.json").read_text()).items()}


def arrays(folder: Path, name: str, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
  with np.load(folder / f"{label(name, shape)}.npz") as stored:
    return dict(stored)


@pytest.mark.parametrize("name, shape", CASES, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)))
def test_eight_devices_compute_what_one_does(folder, name, shape):
  ours, alone = arrays(folder, name, shape), arrays(folder, name, ONE)
  assert ours.keys() == alone.keys() and {"loss", "logits", "hidden", "layers"} < ours.keys()
  moved = 0
  size = lambda path: np.linalg.norm(alone[path])
  gradients = [path for path in alone if path.startswith("gradient/")]
  whole = np.sqrt(sum(size(path) ** 2 for path in gradients))
  for path, expected in alone.items():
    assert np.isfinite(expected).all(), path
    # a gradient that is 0 but for rounding (a key's bias, a padding row) is measured against the whole gradient
    scale = max(size(path), 1e-3 * whole) if path in gradients else size(path)
    off = np.linalg.norm(ours[path] - expected) / scale
    assert off < 2e-5, f"{path} is off by {off:.1e} of its norm"
    moved += path in gradients and size(path) > 1e-3 * whole
  assert moved > len(gradients) / 2


@pytest.mark.parametrize("name, shape", CASES, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)))
def test_parameters_lie_in_parts(found, name, shape):
  data, fsdp, tensor = shape
  shards = found[label(name, shape)]["shards"]
  layers = "layers/shared" if name == "albert" else "layers"
  cut = lambda path: [whole // part for whole, part in zip(*shards[path], strict=True)]
  heads, kv_heads = (8, 8) if name == EVEN else (4, heads_of(name))
  by_heads = tensor if heads % tensor == 0 else 1
  by_kv_heads = tensor if kv_heads % tensor == 0 else 1
  assert cut(f"params/{layers}/attention/q/kernel") == [1, fsdp, by_heads]
  assert cut(f"params/{layers}/attention/k/kernel") == [1, fsdp, by_kv_heads]
  assert cut(f"params/{layers}/attention/o/kernel") == [1, by_heads, fsdp]
  assert cut(f"params/{layers}/mlp/up/kernel") == [1, fsdp, tensor]
  assert cut("params/embedding") == [tensor if name == EVEN else 1, fsdp]
  assert cut(f"lora/{layers}/attention/q/a") == [1, fsdp, 1] and cut(f"lora/{layers}/attention/q/b") == [1, 1, by_heads]
  assert cut(f"lora/{layers}/mlp/down/a") == [1, tensor, 1] and cut(f"lora/{layers}/mlp/down/b") == [1, 1, fsdp]


@pytest.mark.parametrize("name, shape", CASES, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)))
def test_what_is_replicated_is_said_in_one_line(found, name, shape):
  said, tensor = found[label(name, shape)]["log"], shape[2]
  if tensor == 1 or name == EVEN:
    assert said == []
    return
  assert len(said) == 1 and f"vocab (199 over tensor={tensor}) of embedding" in said[0]
  assert (f"; heads (4 over tensor={tensor}) of " in said[0]) == (tensor == 8), "heads are cut whole, whatever D is"
  assert (f"; kv_heads ({heads_of(name)} over tensor={tensor}) of " in said[0]) == (heads_of(name) % tensor > 0)


def heads_of(name: str) -> int:
  """Key-value heads of an oracle model."""
  return json.loads((MODELS / name / "config.json").read_text()).get("num_key_value_heads") or 4


if __name__ == "__main__":
  worker(Path(sys.argv[1]), int(sys.argv[2]))
