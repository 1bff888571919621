"""Log-likelihood of options for those who score the same rows again and again: tokenised once, read with any adapters.

`evals/answers.py` answers everything else, and sets rows apart that cannot be asked instead of raising.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxbias.data.rows import Choice
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError
from jaxbias.evals import passes
from jaxbias.evals.questions import Asked, Reading, ask
from jaxbias.models.language_model import LanguageModel

Encoded = Asked
Scores = dict[str, list[tuple[float, int]]]  # id -> [(summed log-probability in nats, tokens)] per option


def encode(rows: Sequence[Choice], tokenizer: Tokenizer, max_positions: int) -> Encoded:
  """Rows for a causal model: context and options tokenised apart (the oracles' rule), the start token first.

  Raises UserError for an option of no tokens and for a text past the model's window, naming the row.
  """
  asked = ask(rows, Reading(tokenizer, True, max_positions))
  for identity, why in asked.failed.items():
    raise UserError(f"row {identity}: {why}")
  return asked


def score(
  model: LanguageModel,
  rows: Sequence[Choice] | Encoded,
  adapters: Mapping | None = None,
  advance: Callable[[int], None] = lambda rows: None,
) -> Scores:
  """Summed log-probability (nats, float32) and token count of every option of every row, in input order.

  adapters: collections beside `params` ({"lora": ..., "lora_scale": ...}). `advance(n)` is called after n more rows.
  """
  encoded = rows if isinstance(rows, Asked) else encode(rows, model.tokenizer, model.config.max_positions)
  told = passes.in_rows(len(encoded.wanted), len(encoded.segments), advance)
  values, _ = passes.read(model, encoded.segments, adapters=adapters, advance=told)
  return sums(encoded, values)


def sums(asked: Asked, values: Sequence[np.ndarray]) -> Scores:
  """From the log-probabilities of all targets: their sum, or the log of the mean probability where that is asked."""
  return {identity: [_sum(logprob_N.astype(np.float64), identity in asked.averaged) for (logprob_N,) in options]
          for identity, options in asked.of_options(values).items()}


def _sum(logprob_N: np.ndarray, averaged: bool) -> tuple[float, int]:
  N = len(logprob_N)
  return float(np.logaddexp.reduce(logprob_N) - np.log(N) if averaged else logprob_N.sum()), N


def padding_share(encoded: Encoded, shards: int = 1) -> float:
  """The share of token positions in the packed rows that hold padding."""
  return passes.padding(encoded.segments, [shape for *_, shape in passes.planned(encoded.segments, shards)])
