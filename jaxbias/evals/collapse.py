"""Neural collapse of a language model: do the states of a class meet, apart from other classes, at its output weight?

  found = neural_collapse([model], collapse.read_texts("wiki.txt"), classes="gender", sites=("head_input",))
  found[0].result.estimates["overall"]["similarity"]

The head is a linear classifier over token ids; a class's samples are the states that predict its token. How a sample is
found: `evals/class_labels.py`; how it is summed: `class_statistics.py`; formulas: `class_geometry.py`; means and
intervals: `class_estimates.py`. Conventions and traps: docs/collapse.md.

Axis letters: C classes, D features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbias.data.pipeline import PASS_LENGTH, PASS_TOKENS, pack
from jaxbias.data.wordlists import PIECES
from jaxbias.errors import UserError
from jaxbias.evals import class_labels
from jaxbias.evals.class_estimates import BENCHMARK, reduce
from jaxbias.evals.class_labels import Classes, Text, read_texts
from jaxbias.evals.class_statistics import HEAD, Statistics, collect, sites_of
from jaxbias.evals.metrics import Result
from jaxbias.evals.passes import ON_ACCELERATORS
from jaxbias.mesh import batch_shards, replicated
from jaxbias.models.config import ModelConfig
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import head

__all__ = ["BENCHMARK", "Collapse", "Plan", "measure", "neural_collapse", "prepare", "read_texts", "reduce"]

WINDOW = 512  # tokens that are read together, at most
PAIRING = {  # (causal, shift)
  (True, 1): "a token with the state before it, from which a causal model predicts it",
  (True, 0): "a token with its own state, from which a causal model predicts the next one",
  (False, 0): "a token with its own state, from which a masked model predicts it; the text is not masked",
  (False, 1): "a token with the state before it, as published; a masked model predicts it from its own",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be read, for any number of models with one tokenizer: all batches have one shape."""

  classes: Classes  # those that are seen often enough
  fit: list[dict[str, np.ndarray]]
  held: list[dict[str, np.ndarray]]
  pieces: int  # of the longest pooled word
  tokenizer: str  # its fingerprint
  causal: bool
  about: dict  # what was asked, what was found


@dataclasses.dataclass(frozen=True)
class Collapse:
  """One model at one site. `missing`: {metric or group: why it has no value}; the result's items are by `classes`."""

  model: str
  site: str
  result: Result
  missing: dict[str, str]
  classes: tuple[str, ...]
  about: dict

  def rows(self) -> list[dict]:
    """Tidy: one row a group and metric."""
    where = {"model": self.model, "site": self.site, "classes": self.about["classes"]}
    return [where | {"group": group, "metric": metric, "value": found.value, "low": found.low, "high": found.high}
            for group, estimates in self.result.estimates.items() for metric, found in estimates.items()]


def neural_collapse(models: Sequence[LanguageModel], texts: Sequence[Text | str], *, sites: Sequence[str] = (HEAD,),
                    passes: int = 1, compat: bool = False, **asked) -> list[Collapse]:  # fmt: skip
  """Statistics of every model at every site, model by model; models with one tokenizer, such as checkpoints of a run.

  sites: `head_input`, `stack_out`, `layer_0` (embeddings) to `layer_L`, or `all`, which cost one forward pass together.
  passes: 1, or 2 for variances around final means, as published. compat: also `dual_dists`, the published misnomer.
  asked: arguments of `prepare`. Raises UserError for what cannot be asked; a statistic that cannot be had is `missing`.
  """
  plan = prepare(models[0], texts, **asked)
  return [found for model in models for found in measure(model, plan, sites=sites, passes=passes, compat=compat)]


# Planning


def prepare(model: LanguageModel, texts: Sequence[Text | str], classes: str = "gender", *, pieces: str = "single",
            shift: str = "auto", min_count: int = 2, held_out: float = 0.2, window: int = WINDOW,
            seed: int = 0) -> Plan:  # fmt: skip
  """Texts as batches of states with labels, the share `held_out` of them kept for NC4.

  classes: a word list (`gender`, `occupations`, a file), `vocabulary`, `random:N` (the first N of a random order of all
  ids, seeded, that are seen often enough) or `labels` (the texts' own spans). pieces: of a word of several, `single`
  (it is left out), its `first`, or `pooled`, the mean over them. shift: `0`, `1`, or `auto`, which is 1 for a causal
  model. A class seen fewer than `min_count` times in the texts that are not held out is left out.
  Raises UserError for an argument that has no meaning.
  """
  texts = [text if isinstance(text, Text) else Text(text) for text in texts]
  c = model.config
  _check(pieces, shift, min_count, held_out, window, c.max_positions)
  by = {"auto": int(c.causal), "0": 0, "1": 1}[shift]
  listed, most = _classes(model, texts, classes, pieces, seed)
  samples = class_labels.sampled(texts, listed, model.tokenizer, c.causal, min(window, c.max_positions), by, pieces)
  order = np.random.default_rng(seed).permutation(len(texts))
  held_texts = set(order[: int(held_out * len(texts))].tolist())
  fit, held = ([s for s in samples if (s.text in held_texts) == later] for later in (False, True))
  count = class_labels.counts(fit, len(listed))
  chosen = np.flatnonzero(count >= min_count)[:most]
  kept = listed.only(np.sort(chosen))
  fit, held = (class_labels.renumbered(part, np.sort(chosen), len(listed)) for part in (fit, held))
  longest = max((len(s.segment.tokens) for s in samples), default=1)
  shards, length = batch_shards(model.mesh), max(PASS_LENGTH, -(-longest // 16) * 16)
  tokens = PASS_TOKENS * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
  rows = max(1, tokens // length) * shards
  about = {
    "classes": classes, "pieces": pieces, "shift": by, "pairing": PAIRING[c.causal, by], "min_count": min_count,
    "held_out": len(held_texts), "texts": len(texts), "seed": seed, "seen": len(kept), "of": len(listed),
    "samples": int(class_labels.counts(fit, len(kept)).sum()),
    "held_samples": int(class_labels.counts(held, len(kept)).sum()),
    "one_sample": int((count == 1).sum()), "unseen": int((count == 0).sum()),
  }  # fmt: skip
  longest_word = max((int(s.span.max()) for s in (*fit, *held)), default=1) if pieces == "pooled" else 1
  return Plan(kept, _packed(fit, length, rows), _packed(held, length, rows), longest_word, model.tokenizer.fingerprint,
              c.causal, about)  # fmt: skip


def _check(pieces: str, shift: str, min_count: int, held_out: float, window: int, most: int) -> None:
  for name, value, known in (("pieces", pieces, PIECES), ("shift", shift, ("auto", "0", "1"))):
    if value not in known:
      raise UserError(f"{name} = `{value}`; it is one of {', '.join(known)}.")
  if min_count < 1:
    raise UserError(f"min_count = {min_count}; a class needs at least one sample.")
  if not 0 <= held_out < 1:
    raise UserError(f"held_out = {held_out}; it is a share of the texts, from 0 to below 1.")
  if window < 4:
    raise UserError(f"window = {window} tokens; it has to be 4 or more (the model has {most} positions).")


def _classes(model: LanguageModel, texts: Sequence[Text], classes: str, pieces: str,
             seed: int) -> tuple[Classes, int | None]:  # fmt: skip
  """The classes, in the order in which they are to be taken, and how many at most."""
  size, tokenizer = model.config.vocab_size, model.tokenizer
  if classes == "labels":
    return class_labels.of_spans(texts), None
  if classes == "vocabulary":
    return class_labels.of_vocabulary(size, tokenizer), None
  if classes.startswith("random:"):
    number = classes.removeprefix("random:")
    if not number.isdigit() or int(number) < 2:
      raise UserError(f"classes = `{classes}`; write random:N, with N of at least 2.")
    return class_labels.of_vocabulary(size, tokenizer, np.random.default_rng(seed).permutation(size)), int(number)
  return class_labels.of_words(classes, tokenizer, pieces), None


def _packed(samples: Sequence[class_labels.Sampled], length: int, rows: int) -> list[dict[str, np.ndarray]]:
  out = []
  for indices, places, shape in class_labels.batches(samples, length, rows):
    members = [samples[i] for i in indices]
    arrays = pack([s.segment for s in members], places, shape)
    out.append({name: arrays[name] for name in ("tokens", "segment", "position")}
               | class_labels.packed_labels(members, places, shape))  # fmt: skip
  return out


# Measuring


def measure(model: LanguageModel, plan: Plan, *, sites: Sequence[str] = (HEAD,), passes: int = 1,
            adapters: Mapping | None = None, name: str | None = None, compat: bool = False,
            advance: Callable[[int], None] = lambda batches: None, **how) -> list[Collapse]:  # fmt: skip
  """What `plan` asks, of one model, site by site; nothing is compiled again for another model of the same shape.

  adapters: collections beside `params`. name: of the model in the result. how: `stats.bootstrap_interval`'s arguments.
  Raises UserError for a model with another tokenizer, and for a site that there is not.
  """
  if (plan.tokenizer, plan.causal) != (model.tokenizer.fingerprint, model.config.causal):
    raise UserError(f"{model.name} has another tokenizer, or is of another kind, than the model that the texts were "
                    "prepared for; compare checkpoints of one model, or prepare for each.")  # fmt: skip
  variables = {"params": model.params, **(adapters or {})}  # a run that trained the head brings its own
  sites, weight_CD = sites_of(model.config, sites), weights(model, plan.classes, variables["params"])
  if len(plan.classes):
    found = collect(model.module, model.mesh, variables, plan.fit, plan.held, len(plan.classes), weight_CD,
                    sites=sites, pieces=plan.pieces, passes=passes, advance=advance)  # fmt: skip
  else:
    empty = Statistics(np.zeros(0, np.int64), np.zeros((0, 1)), np.zeros(0), None)
    found = dict.fromkeys(sites, empty)
  on_host = None if weight_CD is None else np.asarray(weight_CD, np.float64)
  out = []
  for site in sites:
    result, missing = reduce(found[site], on_host, plan.classes, compat=compat, **how)
    if not len(plan.classes):
      missing = dict.fromkeys(missing, _nothing(plan.about))
    out.append(Collapse(name or model.name, site, result, missing, plan.classes.names, plan.about))
  return out


def _nothing(about: Mapping) -> str:
  return (f"none of the {about['of']} classes is seen {about['min_count']} times in the {about['texts']} texts "
          f"({about['one_sample']} are seen once)")  # fmt: skip


def weights(model: LanguageModel, classes: Classes, params: Mapping) -> jax.Array | None:
  """The head's row of each class, float32 [C, D]: the mean of its pieces'. None for classes without tokens."""
  if classes.ids is None or not len(classes):
    return None
  return _weights(model.config, model.mesh)(params, classes.ids)


@functools.lru_cache(maxsize=16)
def _weights(config: ModelConfig, mesh: Mesh) -> Callable:
  @functools.partial(jax.jit, out_shardings=replicated(mesh))
  def rows(params, ids_CM):
    there_CM1 = (ids_CM >= 0)[..., None]
    row_CMD = head(params, config, mesh).matrix[jnp.maximum(ids_CM, 0)].astype(jnp.float32)
    return (row_CMD * there_CM1).sum(1) / there_CM1.sum(1)

  return rows
