"""One handle for people: `model = jaxbias.load("smollm2-135m-instruct")`, in a script or a notebook.

Every method is a few lines over pure functions, which are there for those who want more: `model.module.apply`,
`evals.scoring.score`, `evals.generate.generate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbias.data.rows import Choice
from jaxbias.errors import UserError
from jaxbias.evals import scoring
from jaxbias.evals.generate import generate
from jaxbias.evals.sampling import Sampling
from jaxbias.losses.logprobs import logits
from jaxbias.models import language_model
from jaxbias.models.transformer import Transformer, head


class LanguageModel(language_model.LanguageModel):
  """A loaded model: `.config .module .params .tokenizer`, and what people ask of it."""

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), int32 [B, T]: texts as this model reads them (start token first; [CLS] and [SEP] around a masked
    model's), padded on the right."""
    ids = [encoding.ids for encoding in self.tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)]
    if self.config.causal:
      ids = [[self.tokenizer.start_id, *text] for text in ids]
    else:
      ids = [encoding.ids for encoding in self.tokenizer.backend.encode_batch(list(texts))]
    mask = np.zeros((len(ids), max(map(len, ids))), np.int32)
    tokens = np.full_like(mask, self.tokenizer.pad_id)
    for b, text in enumerate(ids):
      tokens[b, : len(text)], mask[b, : len(text)] = text, 1
    return tokens, mask

  def logits(self, tokens: Any, mask: Any = None) -> jax.Array:
    """Of every position, float32 [B, T, V]. tokens, mask: [B, T], 1 where a token is real; other rows mean nothing."""
    return _program(self.module)["logits"](self.params, *self._inputs(tokens, mask))

  def hidden_states(self, tokens: Any, mask: Any = None) -> tuple[jax.Array, ...]:
    """The embedding's output and every layer's, [B, T, D] each, as Hugging Face orders them: a decoder's last one is
    behind its final norm."""
    return _program(self.module)["hidden_states"](self.params, *self._inputs(tokens, mask))

  def score(self, rows: Sequence[Choice | Mapping]) -> scoring.Scores:
    """{id: [(summed log-probability in nats, tokens) of each option]} of rows {id, context, options}."""
    made = [row if isinstance(row, Choice) else Choice(str(row["id"]), row["context"], tuple(row["options"]))
            for row in rows]  # fmt: skip
    return scoring.score(self, made)

  def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]:
    """What follows each prompt. sampling: fields of `evals.sampling.Sampling`, such as max_tokens and temperature."""
    ids = [[self.tokenizer.start_id, *text] for text in self.tokenizer.encode_batch(prompts)]
    return [continuation.text for continuation in generate(self, ids, Sampling(**sampling))]

  def _inputs(self, tokens: Any, mask: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.ones_like(tokens) if mask is None else jnp.asarray(mask, jnp.int32)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
      raise UserError(f"tokens have shape {tokens.shape} and the mask {mask.shape}; both have to be [texts, tokens].")
    if tokens.shape[1] > self.config.max_positions:
      raise UserError(f"{tokens.shape[1]} tokens; {self.name} has {self.config.max_positions} positions.")
    return tokens, mask, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


@functools.lru_cache(maxsize=8)
def _program(module: Transformer) -> dict[str, Callable]:
  c = module.config

  @jax.jit
  def all_logits(params, tokens, mask, position):
    hidden, _ = module.apply({"params": params}, tokens, mask, position)
    return logits(hidden, head(params, c, module.mesh))

  @jax.jit
  def hidden_states(params, tokens, mask, position):
    sites = ("residual_in", "residual_out")
    hidden, captures = module.apply({"params": params}, tokens, mask, position, capture=sites)
    states = (captures["residual_in"][0], *captures["residual_out"])
    return (*states[:-1], hidden) if c.causal else states

  return {"logits": all_logits, "hidden_states": hidden_states}


def load(
  source: str, dtype: str | None = None, mesh: Mesh | None = None, factor: float | None = None
) -> LanguageModel:
  """A model by name, folder, .gguf file or hf:org/name[@revision], with its tokenizer.

  dtype: float32 on CPU and bfloat16 on accelerators by default. mesh: all devices, each with a copy, by default.
  factor: for a run's folder, theta_0 + factor * (theta - theta_0) instead of what the run was evaluated as.
  Raises UserError for what cannot be found, read or honoured.
  """
  return LanguageModel(**vars(language_model.load(source, dtype, mesh, factor=factor)))
