"""LanguageModel: a loaded model with everything that its users need beside the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from jaxbias.data.tokens import Tokenizer, check_vocabulary, load_tokenizer
from jaxbias.mesh import make_mesh, param_shardings
from jaxbias.models.checkpoints import load_params, read_config
from jaxbias.models.config import ModelConfig
from jaxbias.models.families import model_config
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
  mesh: Mesh

  @property
  def num_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def load(source: str, dtype: str | None = None, mesh: Mesh | None = None, remat: bool = False) -> LanguageModel:
  """Resolve `source` (a name, a folder, a .gguf file, hf:org/name), and place its weights on the mesh.

  dtype: of the computation and of the frozen weights; default float32 on CPU, bfloat16 on accelerators.
  """
  dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  mesh = mesh or make_mesh({"data": -1})
  found = resolve(source)
  hf = read_config(found.path)
  config = model_config(hf).with_dtype(dtype)
  tokenizer = load_tokenizer(found.path)
  check_vocabulary(tokenizer, config.vocab_size)
  module = Transformer(config, remat=remat)
  boxed = abstract_variables(module)
  abstract = nn.unbox(boxed)
  shardings = param_shardings(abstract, nn.get_partition_spec(boxed), mesh)
  params = load_params(found.path, config, abstract, shardings, dtype)
  return LanguageModel(found.name, config, module, params, tokenizer, found.fingerprint, mesh)
