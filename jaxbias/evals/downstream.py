"""Downstream classification: texts as a model reads them, what a trained head says of them, and how often it is right.

The other axis of a diagnosis of forgetting: what a debiased model can still be taught. `jaxbias/finetune.py` trains.

Axis letters: M trained models (one a seed), E examples, C classes, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.markup import escape
from rich.table import Table

from jaxbias.data.glue import Example, Task
from jaxbias.data.pipeline import Segment
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError
from jaxbias.evals import passes, show, stats
from jaxbias.evals.metrics import Benchmark, Estimate, Higher, Neutral
from jaxbias.losses.classification import class_logits
from jaxbias.models.language_model import LanguageModel

BETWEEN = "\n"  # what a causal model reads between a premise and its hypothesis
METRICS = {"accuracy": Higher("%"), "majority": Neutral("%"), "gain": Higher("%")}


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One segment an example, and how many of them had to be cut."""

  segments: tuple[Segment, ...]
  truncated: int


def benchmark(task: Task) -> Benchmark:
  return Benchmark(task.name, METRICS, task.source, cluster="example")


def encode(examples: Sequence[Example], tokenizer: Tokenizer, causal: bool, max_length: int) -> Encoded:
  """Texts of at most `max_length` tokens, special ones included: what is too long loses tokens on its right, of a pair
  the longer text first.

  Causal: start token, text, and of a pair a line break before the second. Masked: [CLS] a [SEP], or [CLS] a [SEP] b
  [SEP], all of one token type. Raises UserError for a text of no tokens, or a length that leaves no room for one.
  """
  pair = len(examples[0].texts) == 2
  if causal:
    start, between, end = [tokenizer.start_id], tokenizer.encode(BETWEEN) if pair else [], []
  else:
    separator = [tokenizer.special("sep")]
    start, between, end = [tokenizer.special("cls")], separator if pair else [], separator
  room = max_length - len(start + between + end)
  if room < len(examples[0].texts):
    raise UserError(f"--max-length={max_length} leaves no room for a word beside the special tokens; raise it.")
  columns = [tokenizer.encode_batch([e.texts[i] for e in examples]) for i in range(1 + pair)]
  segments, truncated = [], 0
  for example, ids in zip(examples, zip(*columns, strict=True), strict=True):
    if not all(ids):
      raise UserError(f"example {example.id}: a text has no tokens.")
    kept = _cut([len(text) for text in ids], room)
    truncated += sum(kept) < sum(map(len, ids))
    first, *second = (text[:n] for text, n in zip(ids, kept, strict=True))
    segments.append(_segment([*start, *first, *between, *(second[0] if pair else []), *end]))
  return Encoded(tuple(segments), truncated)


def _cut(lengths: Sequence[int], room: int) -> list[int]:
  """How many tokens each text keeps; the longer one gives first, and then both in turn."""
  if len(lengths) == 1:
    return [min(lengths[0], room)]
  a, b = lengths
  if a + b <= room:
    return [a, b]
  short = min(a, b, room // 2)
  return [room - short, short] if a > b else [short, room - short]


def _segment(tokens: Sequence[int]) -> Segment:
  at, none = np.arange(len(tokens), dtype=np.int32), np.zeros(0, np.int32)
  return Segment(np.asarray(tokens, np.int32), at, np.zeros_like(at), none, none, none)


def predict(
  model: LanguageModel,
  segments: Sequence[Segment],
  head: Mapping,
  adapters: Mapping | None = None,
  advance: Callable[[int], None] = lambda texts: None,
) -> np.ndarray:
  """Logits of every text, float32 [E, C]. `head` as in `losses.classification`; adapters: collections beside `params`,
  or in their place."""
  pooling = "last" if model.config.causal else "first"
  (vector_ED,), _ = passes.read(model, segments, pooling, adapters, advance)
  return np.asarray(class_logits(head, vector_ED))


def majority_class(train: Sequence[Example]) -> int:
  """The most frequent class of the training examples; the smaller number of equals.

  Raises UserError where there is only one, as nothing can be learnt from that.
  """
  count_C = np.bincount([example.label for example in train])
  if np.count_nonzero(count_C) < 2:
    raise UserError(f"all {len(train)} training examples have the label {count_C.argmax()}; raise --train-limit.")
  return int(count_C.argmax())


def reduce(label_E: np.ndarray, predicted_ME: np.ndarray, majority: int, **how) -> dict[str, Estimate]:
  """Accuracy in %: of the mean over seeds with each seed's own, of guessing the training set's `majority` class, and
  how far the one is above the other on the same examples.

  Intervals are bootstrapped over examples with the trained models held fixed; `spread` says how far these differ.
  """
  hit_ME, guess_E = np.asarray(predicted_ME) == label_E, np.asarray(label_E) == majority
  items = {"accuracy": hit_ME, "majority": guess_E, "gain": hit_ME.astype(float) - guess_E}
  return {name: stats.mean_over_clusters(100.0 * value, **how) for name, value in items.items()}


def spread(estimate: Estimate) -> float | None:
  """Standard deviation between seeds (of a sample: over M - 1); None with one seed."""
  return float(np.std(estimate.per_seed, ddof=1)) if len(estimate.per_seed) > 1 else None


def table(title: str, task: Task, estimates: Mapping[str, Estimate]) -> Table:
  """One line: each metric with its interval, each seed's accuracy, and their spread."""
  caption = "in brackets: 95 % bootstrap over examples; guessing: the class that most training examples have"
  found = Table(title=escape(title), title_justify="left", caption=caption)
  accuracy = estimates["accuracy"]
  deviation = spread(accuracy)
  cells = {
    "task": task.name, **{show.label(name, METRICS[name]): show.number(estimates[name], "%") for name in METRICS},
    "by seed": "  ".join(f"{value:.2f}" for value in accuracy.per_seed),
    "sd of seeds": "one seed" if deviation is None else f"{deviation:.2f}",
  }  # fmt: skip
  for column in cells:
    found.add_column(column.replace("majority", "guessing"), justify="left" if column == "task" else "right")
  found.add_row(*map(escape, cells.values()))
  return found
