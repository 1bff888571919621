"""What a benchmark's file offers: named variants, each of which says what to ask a model and what the answers mean.

A benchmark's file defines `TASKS`, a tuple of `Task`; `evals/registry.py` finds them by name. Pure functions and NumPy:
the model is asked elsewhere, by `evals/run.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbias.evals.metrics import Benchmark, Result

SCORES = "scores"  # rows: Choice, Cloze or Running -> [(summed log-probability in nats, tokens)] per option
TOKENS = "tokens"  # rows: Choice -> [TokenScores] per option
EMBEDDINGS = "embeddings"  # rows: Text -> a vector [D]
CONTINUATIONS = "continuations"  # rows: Prompt -> the continuations, a list of str
TOKENS_AND_CONTINUATIONS = "tokens and continuations"  # rows: Choice and Prompt, each with its own kind of answer

CAUSAL, MASKED, EITHER = "causal", "masked", "causal or masked"


@dataclasses.dataclass(frozen=True)
class TokenScores:
  """Every scored token of one option, teacher-forced; all [N]. `mean` and `std` are those of log p under p itself."""

  logprob: np.ndarray  # nats
  greedy: np.ndarray  # bool: the token is the most probable one
  mean: np.ndarray  # sum_v p_v log p_v
  std: np.ndarray  # sqrt(sum_v p_v (log p_v)^2 - mean^2)


@dataclasses.dataclass(frozen=True)
class Task:
  """One variant of a benchmark.

  load(path) -> examples, reading a local file or folder; UserError names file, line and field of what is malformed.
  rows(examples) -> what to ask, with ids that are unique; reduce(examples, {row id: answer}) -> Result.
  """

  benchmark: Benchmark
  models: str  # CAUSAL, MASKED or EITHER
  ask: str  # SCORES, TOKENS, EMBEDDINGS, CONTINUATIONS or TOKENS_AND_CONTINUATIONS
  load: Callable[[str], Sequence[Any]]
  rows: Callable[[Sequence[Any]], list]
  reduce: Callable[[Sequence[Any], Mapping[str, Any]], Result]
  bos: str = "prefixed_bos"  # or split_bos: the first token given the start token alone, the others without it

  @property
  def name(self) -> str:
    return self.benchmark.name
