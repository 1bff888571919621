"""Peak memory of loading a random 1B model, written as sharded safetensors, onto eight fake devices.

  python benchmarks/load_1b.py [--dtype float32] [--mesh fsdp=8] [--layers 16]

Writes the folder into a temporary directory (2.5 GB of bfloat16, 4.9 GB of float32), loads it in a subprocess, and
prints the subprocess's peak resident memory (VmHWM, file pages included) over the bytes of the weights. What Python
and JAX take without a model is printed too, and is not subtracted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {  # Llama 3.2 1B's
  "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
  "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
  "max_position_embeddings": 2048, "rope_theta": 500_000.0, "tie_word_embeddings": True,
}  # fmt: skip
FILES = 4  # safetensors files of the folder


def write(folder: Path, hf: dict, dtype: str) -> None:
  """Random weights under Hugging Face's names, several layers a file."""
  import ml_dtypes
  import numpy as np
  from safetensors.numpy import save_file

  from jaxbias.models.checkpoints import tensor_shapes
  from jaxbias.models.families import family_of, model_config

  config, (abstract, _, _) = model_config(hf), model_parts(hf)
  family = family_of(hf)
  shapes = sorted(tensor_shapes(abstract, family.layout(config)).items())
  kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
  rng, weight_map = np.random.default_rng(0), {}
  for part in range(FILES):
    file = f"model-{part + 1:05d}-of-{FILES:05d}.safetensors"
    random = lambda shape: (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)
    tensors = {name: random(shape) for name, shape in shapes[part::FILES]}
    save_file(tensors, folder / file)
    weight_map |= dict.fromkeys(tensors, file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  (folder / "config.json").write_text(json.dumps(hf))


def model_parts(hf: dict, sizes: dict | None = None, dtype: str = "float32"):
  """({path: abstract leaf}, abstract tree, shardings) of the model; shardings only where mesh sizes are given."""
  import flax.linen as nn
  from flax.traverse_util import flatten_dict

  from jaxbias.mesh import make_mesh
  from jaxbias.models.families import model_config
  from jaxbias.models.language_model import layout_for
  from jaxbias.models.transformer import Transformer, abstract_variables

  config = model_config(hf).with_dtype(dtype)
  boxed = abstract_variables(Transformer(config))
  abstract = nn.unbox(boxed)
  flat = {"/".join(path): leaf for path, leaf in flatten_dict(abstract).items()}
  layout = layout_for(config, make_mesh(sizes)) if sizes else None
  return flat, abstract, layout and layout.shardings(abstract, nn.get_partition_spec(boxed))


def peak() -> int:
  """The most that was resident so far, in bytes. Not ru_maxrss, which begins with the parent's."""
  status = Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def load(folder: Path, sizes: dict, dtype: str) -> None:
  """In the subprocess: load, and print what it took as JSON."""
  import jax

  from jaxbias.models.checkpoints import load_params, read_config
  from jaxbias.models.families import model_config

  _, abstract, shardings = model_parts(read_config(folder), sizes, dtype)
  config = model_config(read_config(folder)).with_dtype(dtype)
  before, began = peak(), time.perf_counter()
  params = load_params(folder, config, abstract, shardings, dtype)
  jax.block_until_ready(params)
  held = {str(device): 0 for device in jax.devices()}
  for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
      held[str(shard.device)] += shard.data.nbytes
  print(json.dumps({"before": before, "peak": peak(), "seconds": time.perf_counter() - began,
                    "size": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "most": max(held.values())}))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
  parser.add_argument("--mesh", default="fsdp=8", help="such as fsdp=4,tensor=2")
  parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  options = parser.parse_args()
  sizes = {axis: int(size) for axis, size in (part.split("=") for part in options.mesh.split(","))}
  if options.folder:
    load(options.folder, sizes, options.dtype)
    return
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder), SHAPE | {"num_hidden_layers": options.layers}, options.dtype)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--folder", folder], env=environment, check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
  found = json.loads(done.stdout)
  gib = lambda key: f"{found[key] / 2**30:.2f} GiB"
  print(f"{options.dtype} on {options.mesh}: weights {gib('size')}, {gib('most')} on the fullest device; peak "
        f"{gib('peak')} ({gib('before')} before loading) = {found['peak'] / found['size']:.2f} x the weights, "
        f"{found['seconds']:.0f} s")  # fmt: skip


if __name__ == "__main__":
  main()
