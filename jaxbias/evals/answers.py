"""One door to what a model says about rows of any kind, for the benchmarks and for adapters of other harnesses.

  found = answer(model, rows, ask=SCORES)
  found.by_id["row 7"]        # what `evals/task.py` documents for SCORES
  found.failed                # {id: why} of rows that could not be asked; the others are answered

The answers do not depend on the other rows, their order, or the devices: see `evals/passes.py` for how they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbias.data.pipeline import Shape
from jaxbias.data.rows import Choice, Cloze, Prompt, Running, Text
from jaxbias.errors import UserError
from jaxbias.evals import questions
from jaxbias.evals.passes import LOGPROB, POOLINGS, STATISTICS, in_rows, padding, read
from jaxbias.evals.questions import Asked, Reading
from jaxbias.evals.scoring import sums
from jaxbias.evals.task import (
  CAUSAL,
  CONTINUATIONS,
  EITHER,
  EMBEDDINGS,
  MASKED,
  SCORES,
  TOKENS,
  TOKENS_AND_CONTINUATIONS,
  TokenScores,
)
from jaxbias.models.language_model import LanguageModel

Row = Choice | Cloze | Running | Text | Prompt
ASKED_OF = {  # what can be asked of rows of which types, and the models that such a row needs
  SCORES: {Choice: EITHER, Cloze: MASKED, Running: CAUSAL},
  TOKENS: {Choice: CAUSAL},
  EMBEDDINGS: {Text: EITHER},
  CONTINUATIONS: {Prompt: CAUSAL},
  TOKENS_AND_CONTINUATIONS: {Choice: CAUSAL, Prompt: CAUSAL},
}


@dataclasses.dataclass(frozen=True)
class Answers:
  """`by_id` in the order of the rows. A row is in it or in `failed` ({id: why}). `truncated`: rows that lost tokens.

  `shapes`: the packed batches' distinct static shapes, each compiled once; `padding`: the share of token positions
  that held nothing; both of everything but continuations.
  """

  by_id: dict[str, Any]
  failed: dict[str, str]
  truncated: int
  shapes: tuple[Shape, ...]
  padding: float


def answer(
  model: LanguageModel,
  rows: Sequence[Row],
  ask: str = SCORES,
  *,
  bos: str = "prefixed_bos",
  truncate: str | None = None,
  pooling: str = "mean",
  adapters: Mapping | None = None,
  seed: int = 0,
  advance: Callable[[int], None] = lambda rows: None,
) -> Answers:
  """What `evals/task.py` documents for `ask`, of every row.

  bos: "prefixed_bos" reads the start token before every text; "split_bos" gives a text's first token given the start
  token alone and the others without it (StereoSet's GPT-2 and bias-bench; Nadeem et al. 2021). A masked model always
  reads [CLS] text [SEP]. Sums are over tokens, in nats, with the number of tokens beside them: the length rule (sum,
  mean over tokens or bytes) is the benchmark's. A span that is empty has (0.0, 0).
  truncate: None, or "left": a text past the model's window loses tokens on the left of its context, all options of a
  row alike.
  pooling: of EMBEDDINGS: the "mean" of the last hidden states over all positions (bias-bench), the "first" or the
  "last"; an encoder's with [CLS] and [SEP], a decoder's without a start token.
  adapters: collections beside `params` ({"lora": ..., "lora_scale": ...}). seed: of sampled continuations.
  `advance(n)` is called after n more rows.
  Raises UserError where the model is of the wrong kind for a row, and for ids that are not unique.
  """
  _check(model, rows, ask, bos, pooling)
  prompts = [row for row in rows if isinstance(row, Prompt)]
  config, others = model.config, [row for row in rows if not isinstance(row, Prompt)]
  switch = next((rope.original_positions for rope in config.ropes if rope.long_inverse is not None), None)
  reading = Reading(model.tokenizer, config.causal, config.max_positions, bos, truncate, switch)
  asked = questions.ask(others, reading)
  advance(len(asked.failed))
  what = {SCORES: LOGPROB, EMBEDDINGS: pooling}.get(ask, STATISTICS)
  told = in_rows(len(asked.wanted), len(asked.segments), advance)
  values, shapes = read(model, asked.segments, what, adapters, told)
  found = _answered(asked, what, values)
  failed, truncated = dict(asked.failed), asked.truncated
  if prompts:
    continued, refused, cut = _continuations(model, prompts, adapters, seed, truncate, advance)
    found, failed, truncated = found | continued, failed | refused, truncated + cut
  for identity, values in list(found.items()):
    if not _finite(values):
      failed[identity] = "what the model says is not finite; its weights or its precision are at fault."
      del found[identity]
  in_order = lambda table: {row.id: table[row.id] for row in rows if row.id in table}
  return Answers(in_order(found), in_order(failed), truncated, tuple(dict.fromkeys(shapes)),
                 padding(asked.segments, shapes))


def _check(model: LanguageModel, rows: Sequence[Row], ask: str, bos: str, pooling: str) -> None:
  kind = CAUSAL if model.config.causal else MASKED
  if ask not in ASKED_OF or pooling not in POOLINGS:
    raise UserError(f"`ask` is one of {', '.join(ASKED_OF)} and `pooling` of {', '.join(POOLINGS)}; they are {ask}, "
                    f"{pooling}.")
  if bos == questions.SPLIT and kind == MASKED:
    raise UserError(f"{questions.SPLIT} is for causal language models; {model.name} is a masked one.")
  if len({row.id for row in rows}) < len(rows):
    ids = [row.id for row in rows]
    raise UserError(f"two rows have the id {next(i for i in ids if ids.count(i) > 1)}; ids have to be unique.")
  for row in rows:
    needs = ASKED_OF[ask].get(type(row))
    name = type(row).__name__
    if needs is None:
      raise UserError(f"row {row.id} is a {name}, of which {ask} cannot be asked.")
    if needs not in (kind, EITHER):
      raise UserError(f"row {row.id} is a {name}; {ask} of it need a {needs} language model, and {model.name} is a "
                      f"{kind} one.")


def _answered(asked: Asked, what: str, values: Sequence[np.ndarray]) -> dict[str, Any]:
  if what in POOLINGS:
    return {identity: values[0][number] for identity, number in asked.text.items()}
  if what == LOGPROB:
    return sums(asked, values)
  return {identity: [TokenScores(*option) for option in options]
          for identity, options in asked.of_options(values).items()}


def _finite(values: Any) -> bool:
  if isinstance(values, np.ndarray):
    return bool(np.isfinite(values).all())
  return all(np.isfinite(v.logprob).all() if isinstance(v, TokenScores) else isinstance(v, str) or np.isfinite(v[0])
             for v in values)


def _continuations(model, prompts: Sequence[Prompt], adapters, seed: int, truncate: str | None, advance):
  """(texts by id, why by id of prompts that leave no room, how many were cut)."""
  from jaxbias.evals import generate  # most tasks ask for no text

  most, failed, cut = model.config.max_positions, {}, 0
  for row, ids in zip(prompts, model.tokenizer.encode_batch([row.text for row in prompts]), strict=True):
    over = len(ids) + row.max_tokens - most  # the start token comes first, the last new token is not read
    if over > 0 and (truncate is None or over > len(ids)):
      failed[row.id] = (f"the prompt has {len(ids) + 1} tokens and is to get {row.max_tokens} more; the model has "
                        f"{most} positions. Shorten it, or lower max_tokens.")
    cut += over > 0 and row.id not in failed
  asked = [row for row in prompts if row.id not in failed]
  advance(len(failed))
  told = in_rows(len(asked), sum(row.samples for row in asked), advance)
  return generate.answers(model, asked, adapters, seed, truncate is not None, told), failed, cut
