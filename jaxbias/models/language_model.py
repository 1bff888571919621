"""LanguageModel: a loaded model with everything that its users need beside the weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxbias.config import SHARDING_RULES
from jaxbias.data.tokens import Tokenizer, check_vocabulary, load_tokenizer
from jaxbias.mesh import Layout, make_mesh
from jaxbias.models import adapted as adapted_sources
from jaxbias.models.checkpoints import load_params, read_config
from jaxbias.models.config import ModelConfig
from jaxbias.models.families import model_config
from jaxbias.models.lora import along, merge
from jaxbias.models.sources import resolve
from jaxbias.models.transformer import Transformer, abstract_variables


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """`module.apply({"params": params}, ...)` is the model; `fingerprint` identifies its weights."""

  name: str
  config: ModelConfig
  module: Transformer
  params: Any
  tokenizer: Tokenizer
  fingerprint: str
  layout: Layout

  @property
  def mesh(self) -> Mesh:
    return self.layout.mesh

  @property
  def num_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def layout_for(config: ModelConfig, mesh: Mesh, rules: Mapping[str, str] = SHARDING_RULES) -> Layout:
  """How a model lies on a mesh: heads are cut whole, although a kernel's axis is heads times channels."""
  return Layout(mesh, rules, {"heads": config.num_heads, "kv_heads": config.num_kv_heads})


def load(
  source: str,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  remat: bool = False,
  rules: Mapping[str, str] = SHARDING_RULES,
  factor: float | None = None,
) -> LanguageModel:
  """Resolve `source` (a name, a folder, a .gguf file, hf:org/name), and place its weights on the mesh.

  The folder of a training run or of a PEFT adapter is a source too: its base, with the adapters merged in float32.

  dtype: of the computation and of the frozen weights; default float32 on CPU, bfloat16 on accelerators.
  rules: logical axis -> mesh axis. What does not divide is replicated, and logged in one line.
  factor: of what a run or an adapter changed: 0 is its base, 1 what was trained, between them their interpolation
  (fusion), -1 the negated task vector; by default what the run was evaluated with.
  """
  dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  mesh = mesh or make_mesh({"data": -1})
  if adapted := adapted_sources.find(source, factor):
    return _adapt(load(adapted.base, dtype, mesh, remat, rules), adapted)
  found = resolve(source)
  hf = read_config(found.path)
  config = model_config(hf).with_dtype(dtype)
  tokenizer = load_tokenizer(found.path)
  check_vocabulary(tokenizer, config.vocab_size)
  module = Transformer(config, remat=remat, mesh=mesh)
  boxed = abstract_variables(module)
  abstract = nn.unbox(boxed)
  layout, logical = layout_for(config, mesh, rules), nn.get_partition_spec(boxed)
  layout.report(abstract, logical)
  params = load_params(found.path, config, abstract, layout.shardings(abstract, logical), dtype)
  return LanguageModel(found.name, config, module, params, tokenizer, found.fingerprint, layout)


def _adapt(model: LanguageModel, adapted: adapted_sources.Adapted) -> LanguageModel:
  """The model with adapters merged and trained leaves exchanged; its weights keep their dtype and their places."""
  found = adapted.read(model.config)
  identity = hashlib.sha256(model.fingerprint.encode())
  for leaf in jax.tree.leaves(found):
    identity.update(np.asarray(leaf).tobytes())
  if adapted.factor != 1:
    identity.update(repr(adapted.factor).encode())
  params = exchange(model.params, found.get("params", {}), adapted.factor)
  if "lora" in found:

    def merged(params, lora):
      return jax.tree.map(lambda new, old: new.astype(old.dtype), merge(params, lora, found["lora_scale"]), params)

    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    params = jax.jit(merged, out_shardings=places, donate_argnums=0)(params, jax.tree.map(np.asarray, found["lora"]))
  name = f"{model.name} + {adapted.folder.resolve().name}"
  return dataclasses.replace(model, name=name, params=params, fingerprint=identity.hexdigest())


def exchange(params: Mapping, leaves: Mapping, factor: float = 1.0) -> dict:
  """The parameters with some leaves exchanged, in the dtype and the place of those before; with a factor, so far along
  from these to the others."""
  flat = flatten_dict(dict(params))

  def put(leaf, old):
    leaf = np.asarray(leaf) if factor == 1 else along(np.asarray(old), np.asarray(leaf), factor)
    return jax.device_put(leaf.astype(old.dtype), old.sharding)

  return unflatten_dict(flat | {path: put(leaf, flat[path]) for path, leaf in flatten_dict(dict(leaves)).items()})
