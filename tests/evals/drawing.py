"""What tests hand to `evals.sampling`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxbias.evals.sampling import Rules


def rules(samplings, numbers) -> Rules:
  of = lambda name, dtype: jnp.asarray([getattr(s, name) for s in samplings], dtype)
  return Rules(of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32),
               of("repetition_penalty", np.float32), of("max_tokens", np.int32), of("seed", np.uint32),
               jnp.asarray(numbers, np.uint32))  # fmt: skip
