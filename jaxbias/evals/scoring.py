"""Log-likelihood of options: packed, prefix-shared, logits at scored positions only.

Rows `{id, context, options}` become one segment each: BOS + context, what all options share, then the options as
branches that see the shared part and themselves. Segments are packed into a few static shapes; the compiled program
returns one log-probability per scored token, and the host adds them up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxbias.data.pipeline import Segment, choice_segment, pack, packed_batches
from jaxbias.data.rows import Choice
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError
from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.mesh import batch_sharding, batch_shards
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import Transformer, head

Scores = dict[str, list[tuple[float, int]]]  # id -> [(summed log-probability in nats, tokens)] per option


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Rows ready to be scored: segments, and which scored positions of a segment make up each option."""

  ids: tuple[str, ...]
  segments: tuple[Segment, ...]
  parts: tuple[tuple[np.ndarray, ...], ...]

  @property
  def tokens(self) -> int:
    """Inputs that the model reads, padding apart."""
    return sum(len(segment.tokens) for segment in self.segments)


def encode(rows: Sequence[Choice], tokenizer: Tokenizer, max_positions: int) -> Encoded:
  """Tokenise context and options apart (the oracles' rule) and put the start token first.

  Raises UserError for an option of no tokens and for a text past the model's window, naming the row.
  """
  texts = [text for row in rows for text in (row.context, *row.options)]
  tokens = iter(tokenizer.encode_batch(texts))
  segments, parts = [], []
  for row in rows:
    context = [tokenizer.start_id, *next(tokens)]
    options = [next(tokens) for _ in row.options]
    for number, option in enumerate(options, start=1):
      if not option:
        raise UserError(f"row {row.id}: option {number} has no tokens; there is nothing to score.")
      if len(context) + len(option) - 1 > max_positions:
        raise UserError(f"row {row.id}: option {number} and its context take {len(context) + len(option) - 1} "
                        f"positions, the model has {max_positions}; shorten the text.")
    segment, part = choice_segment(context, options)
    segments.append(segment)
    parts.append(tuple(part))
  return Encoded(tuple(row.id for row in rows), tuple(segments), tuple(parts))


@functools.lru_cache(maxsize=8)
def scorer(module: Transformer, mesh) -> Callable:
  """Compiled once per module and shape: (variables, arrays) -> log-probability of every scored token [B, P]."""

  @jax.jit
  def run(variables, arrays):
    hidden, _ = module.apply(variables, *(arrays[n] for n in ("tokens", "segment", "position", "branch")))
    hidden_BPD = gather_positions(hidden, arrays["score_at"])
    return token_logprobs(hidden_BPD, head(variables["params"], module.config), arrays["target"])

  sharding = batch_sharding(mesh)
  return lambda variables, arrays: run(variables, jax.device_put(arrays, sharding))


def score(
  model: LanguageModel,
  rows: Sequence[Choice] | Encoded,
  adapters: Mapping | None = None,
  advance: Callable[[int], None] = lambda rows: None,
) -> Scores:
  """Summed log-probability (nats, float32) and token count of every option of every row, in input order.

  adapters: collections beside `params` ({"lora": ..., "lora_scale": ...}). `advance(n)` is called after n more rows.
  """
  encoded = rows if isinstance(rows, Encoded) else encode(rows, model.tokenizer, model.config.max_positions)
  variables = {"params": model.params, **(adapters or {})}
  run = scorer(model.module, model.mesh)
  per_token: list[np.ndarray | None] = [None] * len(encoded.segments)
  pending = []  # one batch is packed while the device works on the one before

  def collect(indices, places, logprobs):
    values = np.asarray(logprobs)
    for i, at in zip(indices, places, strict=True):
      per_token[i] = values[at.b, at.p : at.p + len(encoded.segments[i].target)]
    advance(len(indices))

  for indices, places, shape in packed_batches(encoded.segments, batch_shards(model.mesh)):
    arrays = pack([encoded.segments[i] for i in indices], places, shape)
    pending.append((indices, places, run(variables, arrays)))
    if len(pending) > 1:
      collect(*pending.pop(0))
  for batch in pending:
    collect(*batch)
  add = lambda values, part: (float(values[part].sum(dtype=np.float64)), len(part))
  return {
    row: [add(values, part) for part in parts]
    for row, values, parts in zip(encoded.ids, per_token, encoded.parts, strict=True)
  }


def padding_share(encoded: Encoded, shards: int = 1) -> float:
  """The share of token positions in the packed rows that hold padding."""
  planned = packed_batches(encoded.segments, shards)
  return 1.0 - encoded.tokens / sum(shape.B * shape.T for *_, shape in planned)
