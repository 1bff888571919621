"""jaxbias: debiasing and unlearning in language models with JAX. `python -m jaxbias --help` lists the verbs.

  import jaxbias
  model = jaxbias.load("smollm2-135m-instruct")
  model.generate(["The nurse said that"], max_tokens=12)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from jaxbias.handle import LanguageModel

__all__ = ["load"]


def load(
  source: str, dtype: str | None = None, mesh: Mesh | None = None, factor: float | None = None
) -> LanguageModel:
  """A model with its config, module, params and tokenizer, that can be asked for logits, hidden_states, a score and to
  generate. See `handle.LanguageModel`, and docs/models.md."""
  from jaxbias import handle  # jax is imported when it is needed, so that `python -m jaxbias --help` answers at once

  return handle.load(source, dtype, mesh, factor)
