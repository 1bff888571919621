"""What every checkpoint of a run is asked, and what it answers: one forward pass over held-out text and triples.

A causal model reads a text from its start token on, and every token is scored. A masked model reads a general text in
`draws` copies, in each of which a share of the tokens is masked and scored; the masks are drawn once, from the seed and
the text alone, so that they are the same for every checkpoint and every subset of the texts. Triples are read by a
masked model with one token masked at a time (pseudo-log-likelihood), which leaves nothing to draw.

Axis letters: N scored tokens, D model; E triples, T general texts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbias.data.fields import json_lines, string, unique
from jaxbias.data.pipeline import Segment, text_segment
from jaxbias.data.rows import Text, Triple
from jaxbias.data.sources import triple_choices
from jaxbias.distributed import everywhere, first, on_host, to_devices
from jaxbias.errors import UserError
from jaxbias.evals import passes, scoring, stereoset
from jaxbias.evals.forgetting import Losses
from jaxbias.evals.lexicon import gender_words
from jaxbias.evals.questions import Asked, Reading, ask
from jaxbias.files import replace
from jaxbias.losses.logprobs import CHUNK, forward_kl
from jaxbias.mesh import batch_sharding, batch_shards
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import Transformer, head

GENDERED = ("gendered", "not gendered")


@dataclasses.dataclass(frozen=True)
class Masks:
  """How a masked model's general text is masked."""

  draws: int = 4
  share: float = 0.15
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class General:
  """General texts; the document of each, whose texts an interval draws together; {grouping: the group of each}."""

  texts: tuple[Text, ...]
  documents: tuple[str, ...]
  groupings: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Probe:
  """`segments`: what is read; of its targets those of `sentences` come first. `spans[e][label]`: the tokens in which a
  sentence differs from its two siblings. `begin`: where each general text's targets begin, and where they end, [T+1].
  """

  triples: tuple[Triple, ...]
  general: General
  sentences: Asked
  spans: tuple[tuple[slice, ...], ...]
  segments: tuple[Segment, ...]
  begin: np.ndarray

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of the tokens that are read and of those that are scored: a sha256."""
    identity = hashlib.sha256()
    for segment in self.segments:
      for part in (segment.tokens, segment.score_at, segment.target):
        identity.update(np.asarray(part, np.int32).tobytes() + b"|")
    return identity.hexdigest()


@dataclasses.dataclass(frozen=True)
class Start:
  """What the start model answered: log-probabilities of all targets, nats [N]; what its head read at those of general
  text, [N', D], from which its whole distribution there follows; and the losses that these come to."""

  logprob_N: np.ndarray
  hidden_ND: np.ndarray
  losses: Losses


def gender_halves(texts: Sequence[Text]) -> tuple[str, ...]:
  """Whether each text names a person's gender, by the word lists of `evals/lexicon.py`."""
  return tuple(GENDERED[not any(gender_words(text.text))] for text in texts)


def general(texts: Sequence[Text]) -> General:
  """The general texts of a split: each its own document, in gendered and other ones."""
  return General(tuple(texts), tuple(text.id for text in texts), {"gender": gender_halves(texts)})


def read_general(path: str, group: str = "") -> General:
  """JSON lines {"id", "text", "document" where several texts are of one, and a string under `group` if that is given}.

  Raises UserError for a row without one of them, naming file, line and field, for a file of no rows, and for a field
  that is called as the grouping that every file has, `gender`.
  """
  if group == "gender":
    raise UserError(f"{path}: `gender` is the grouping by gendered words; call the field of your own groups otherwise.")

  def row(record: Mapping, where: str) -> _Row:
    text = Text(string(record, "id", where), string(record, "text", where))
    document = string(record, "document", where) if "document" in record else text.id
    return _Row(text.id, text, document, string(record, group, where) if group else "")

  rows = unique(json_lines(path), row)
  if not rows:
    raise UserError(f"{path} holds no rows.")
  texts = tuple(row.text for row in rows)
  groupings = {"gender": gender_halves(texts)} | ({group: tuple(row.group for row in rows)} if group else {})
  return General(texts, tuple(row.document for row in rows), groupings)


class _Row(NamedTuple):
  id: str
  text: Text
  document: str
  group: str


def make(model: LanguageModel, triples: Sequence[Triple], general: General, masks: Masks | None = None) -> Probe:
  """Raises UserError for a text of no tokens or past the model's window, naming it."""
  reading = Reading(model.tokenizer, model.config.causal, model.config.max_positions)
  choices = triple_choices(triples)
  sentences = ask(choices, reading)
  for identity, why in sentences.failed.items():
    raise UserError(f"row {identity}: {why}")
  encode = model.tokenizer.encode_batch
  spans = tuple(differing(encode(choice.options)) for choice in choices)
  found, count = [], []
  for text, tokens in zip(general.texts, encode([text.text for text in general.texts]), strict=True):
    read = _read_whole(text, tokens, reading) if reading.causal else _masked(text, tokens, reading, masks or Masks())
    found += read
    count.append(sum(len(segment.target) for segment in read))
  before = sum(len(segment.target) for segment in sentences.segments)
  begin = before + np.cumsum([0, *count])
  return Probe(tuple(triples), general, sentences, spans, (*sentences.segments, *found), begin)


def differing(ids: Sequence[Sequence[int]]) -> tuple[slice, ...]:
  """Of several token lists the part of each behind what all begin with and before what all end with, one token at
  least."""
  shortest = min(map(len, ids))
  alike = lambda at: len({tokens[at] for tokens in ids}) == 1
  begin = next((at for at in range(shortest) if not alike(at)), shortest)
  begin = min(begin, shortest - 1)
  end = next((n for n in range(shortest - begin - 1) if not alike(-1 - n)), shortest - begin - 1)
  return tuple(slice(begin, len(tokens) - end) for tokens in ids)


def _check_length(text: Text, tokens: int, positions: int, most: int) -> None:
  if not tokens:
    raise UserError(f"text {text.id} has no tokens; there is nothing to score.")
  if positions > most:
    raise UserError(f"text {text.id} takes {positions} positions, the model has {most}; shorten the text.")


def _read_whole(text: Text, tokens: Sequence[int], reading: Reading) -> list[Segment]:
  _check_length(text, len(tokens), len(tokens), reading.max_positions)  # the last token conditions nothing
  return [text_segment([*reading.enclosing()[0], *tokens], 1)]


def _masked(text: Text, tokens: Sequence[int], reading: Reading, masks: Masks) -> list[Segment]:
  start, end = reading.enclosing()
  _check_length(text, len(tokens), len(tokens) + len(start + end), reading.max_positions)
  whole, segments = np.array([*start, *tokens, *end], np.int32), []
  for drawn in mask_positions(text.text, len(tokens), masks):
    at = (drawn + len(start)).astype(np.int32)
    inputs = whole.copy()
    inputs[at] = reading.tokenizer.mask_id
    none = at[:0]
    segments.append(Segment(inputs, np.arange(len(inputs), dtype=np.int32), np.zeros_like(inputs), at, whole[at], none))
  return segments


def mask_positions(text: str, tokens: int, masks: Masks) -> list[np.ndarray]:
  """Which of a text's tokens each draw masks, in their order: a share of them, rounded, and one at least."""
  key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
  rng = np.random.default_rng((masks.seed, key))
  count = max(1, round(masks.share * tokens))
  return [np.sort(rng.choice(tokens, count, replace=False)) for _ in range(masks.draws)]


def start(model: LanguageModel, probe: Probe, adapters: Mapping, path: Path, scored: str,
          advance: Callable[[int], None] = lambda segments: None) -> Start:
  """What the model answers with `adapters` that do nothing yet; from `path` where it is there, and else written to it.

  The file also holds what is scored in each segment, which are a masked model's masks. Raises UserError for a file that
  another model, tokenizer or set of texts made.
  """
  mine = {"model": model.fingerprint, "tokenizer": model.tokenizer.fingerprint, "dtype": model.config.dtype,
          "set of texts and masks": probe.fingerprint}  # fmt: skip
  if everywhere(path.exists()):
    with np.load(path) as stored:
      for what, value in mine.items():
        if str(stored[what]) != value:
          raise UserError(f"{path} was made with another {what}; measure this in a new folder, forgetting is of one "
                          "start model and one tokenizer.")  # fmt: skip
      logprob_N, hidden_ND = stored["logprob"], stored["hidden"]
    advance(len(probe.segments))
  else:
    logprob_N, hidden_ND = _answers(model, probe, adapters, advance)
    out, score_at = io.BytesIO(), [segment.score_at for segment in probe.segments]
    np.savez(out, logprob=logprob_N, hidden=hidden_ND, score_at=np.concatenate(score_at),
             scored=np.array(list(map(len, score_at))), **mine)  # fmt: skip
    if first():
      replace(path, out.getvalue())
  return Start(logprob_N, hidden_ND, _losses(probe, logprob_N, np.zeros(len(hidden_ND)), scored))


def look(model: LanguageModel, probe: Probe, start: Start, adapters: Mapping, scored: str) -> Losses:
  """The losses of the model with `adapters` (collections beside or instead of `params`), and its KL from the start.

  scored: "sum" or "token_mean", by which SS and LMS order sentences.
  """
  logprob_N, hidden_ND = _answers(model, probe, adapters)
  return _losses(probe, logprob_N, divergence(model, start.hidden_ND, hidden_ND, adapters), scored)


def _answers(model: LanguageModel, probe: Probe, adapters: Mapping, advance=lambda segments: None):
  """Log-probabilities of all targets [N], and the head's input at those of general text [N', D]."""
  (logprob_N, hidden_ND), _ = passes.read(model, probe.segments, passes.STATES, adapters, advance)
  return logprob_N, hidden_ND[probe.begin[0] :]


def divergence(model: LanguageModel, start_ND: np.ndarray, hidden_ND: np.ndarray, adapters: Mapping) -> np.ndarray:
  """KL(start || trained) over the whole vocabulary at each position, from what the two heads read, nats [N]."""
  N, D = hidden_ND.shape
  rows = batch_shards(model.mesh)
  chunk = min(CHUNK, -(-N // rows))
  each = -(-N // (rows * chunk)) * chunk
  shaped = lambda x_ND: np.concatenate([x_ND, np.zeros((rows * each - N, D), x_ND.dtype)]).reshape(rows, each, D)
  variables = {"params": model.params, **adapters}
  kl = _program(model.module, model.mesh)(variables["params"], model.params, shaped(hidden_ND), shaped(start_ND))
  return kl.ravel()[:N]


@functools.lru_cache(maxsize=4)
def _program(module: Transformer, mesh: Mesh) -> Callable:
  @jax.jit
  def run(params, start_params, hidden_BND, start_BND):
    heads = (head(each, module.config, mesh) for each in (params, start_params))
    return forward_kl(hidden_BND, next(heads), start_BND, next(heads))

  sharding = batch_sharding(mesh)
  return lambda params, start_params, *hidden: on_host([run(params, start_params, *to_devices(hidden, sharding))])[0]


def _losses(probe: Probe, logprob_N: np.ndarray, kl_N: np.ndarray, scored: str) -> Losses:
  logprob_N = logprob_N.astype(np.float64)
  begin, count_T = probe.begin, np.diff(probe.begin)
  mean_T = lambda value_N: np.add.reduceat(value_N.astype(np.float64), begin[:-1] - begin[0]) / count_T
  options = {identity: [one for (one,) in found] for identity, found in probe.sentences.of_options([logprob_N]).items()}
  whole = np.array([[-one.mean() for one in options[triple.id]] for triple in probe.triples])
  span = np.array([[-one[part].mean() for one, part in zip(options[triple.id], parts, strict=True)]
                   for triple, parts in zip(probe.triples, probe.spans, strict=True)])  # fmt: skip
  score_E3 = stereoset.sentence_scores(probe.triples, scoring.sums(probe.sentences, [logprob_N]), scored)
  return Losses(mean_T(-logprob_N[begin[0] :]), whole, span, mean_T(kl_N), score_E3)
