"""What a look is held against: a model's logits all at once, and what has to be 0 where nothing changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.losses.logprobs import logits
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import head

UNCHANGED = {"f_all", "kl", "f_st", "f_anti", "f_unrel", "f_sel", "preference_shift", "rho", "lms_change"}


def whole_logits(model: LanguageModel):
  """(variables, ids [T]) -> log-probabilities of the whole vocabulary at every position, [T, V]."""

  @jax.jit
  def run(variables, ids_1T):
    hidden, _ = model.module.apply(variables, ids_1T, jnp.ones_like(ids_1T), jnp.arange(ids_1T.shape[1])[None])
    return jax.nn.log_softmax(logits(hidden, head(variables["params"], model.config)))

  return lambda variables, ids: np.asarray(run(variables, ids[None]))[0]
