"""A loaded model as what the generators of contrast groups ask for: fillings of masks, rewrites, unsure texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxbias.data.rows import MASK, Choice
from jaxbias.errors import UserError
from jaxbias.evals.generate import generate
from jaxbias.evals.sampling import Sampling
from jaxbias.evals.scoring import score
from jaxbias.losses.logprobs import logits
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import head

LENGTHS = 32  # texts are padded to a multiple of this many tokens, so that few shapes are compiled
REWRITE = "{source}\nComplete and correct this sentence: {masked}\n"


def filler(model: LanguageModel, top: int = 5, seed: int = 0) -> Callable[[Sequence[str]], list[list[str]]]:
  """fill(texts) -> the fillings of each text's MASKs, drawn alike from the `top` likeliest.

  A masked model gives one token a MASK, all from one forward pass; a causal one writes a word at a time and sees only
  what stands before it. Raises UserError for a text without MASK.
  """
  rng = np.random.default_rng(seed)

  def fill(texts: Sequence[str]) -> list[list[str]]:
    for text in texts:
      if MASK not in text:
        raise UserError(f"there is no {MASK} in {text!r}; nothing to fill.")
    if model.config.causal:
      return _written(model, texts, top, rng)
    return [_unmasked(model, text, top, rng) for text in texts]

  return fill


def rewriter(
  model: LanguageModel, sampling: Sampling | None = None, template: str = REWRITE
) -> Callable[[Sequence[tuple[str, str]]], list[str]]:
  """rewrite([(source, masked text), ...]) -> the first line of what a causal model writes for each."""
  sampling = sampling or Sampling(max_tokens=48, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.2)

  def rewrite(pairs: Sequence[tuple[str, str]]) -> list[str]:
    prompts = [template.format(source=source, masked=masked) for source, masked in pairs]
    return [text.strip().split("\n")[0] for text in _continue(model, prompts, [sampling] * len(prompts))]

  return rewrite


def unsure(model: LanguageModel, samples: int = 8, max_tokens: int = 32, seed: int = 0):
  """sample(sources) -> of each [(continuation, mean probability of its tokens)], by a causal model at temperature 1."""

  def sample(sources: Sequence[str]) -> list[list[tuple[str, float]]]:
    every = [source for source in sources for _ in range(samples)]
    written = _continue(model, every, [Sampling(max_tokens, temperature=1.0, seed=seed)] * len(every))
    texts = [sorted({text for text in written[i : i + samples] if text.strip()}) for i in range(0, len(every), samples)]
    rows = [Choice(str(i), source, tuple(of)) for i, (source, of) in enumerate(zip(sources, texts, strict=True)) if of]
    scored = score(model, rows) if rows else {}
    mean = lambda pair: float(np.exp(pair[0] / pair[1]))
    return [list(zip(of, map(mean, scored[str(i)]), strict=True)) if of else [] for i, of in enumerate(texts)]

  return sample


def _continue(model: LanguageModel, prompts: Sequence[str], sampling: Sequence[Sampling]) -> list[str]:
  ids = [[model.tokenizer.start_id, *text] for text in model.tokenizer.encode_batch(prompts)]
  return [continuation.text for continuation in generate(model, ids, sampling, truncate=True)]


def _written(model: LanguageModel, texts: Sequence[str], top: int, rng: np.random.Generator) -> list[list[str]]:
  """A word for the first MASK of every text, then for the second, ..., each behind what was written before it."""
  parts = [text.split(MASK) for text in texts]
  before, fillings = [part[0] for part in parts], [[] for _ in texts]
  for n in range(1, max(map(len, parts), default=1)):
    open_ = [i for i, part in enumerate(parts) if n < len(part)]
    sampling = [Sampling(max_tokens=6, temperature=1.0, top_k=top, seed=int(rng.integers(2**32))) for _ in open_]
    for i, text in zip(open_, _continue(model, [before[i].rstrip() for i in open_], sampling), strict=True):
      word = re.search(r"[\w'-]+", text)
      fillings[i].append(word[0] if word else "")
      before[i] += fillings[i][-1] + parts[i][n]
  return fillings


def _unmasked(model: LanguageModel, text: str, top: int, rng: np.random.Generator) -> list[str]:
  tokenizer = model.tokenizer
  cls, mask, sep = map(tokenizer.special, ("cls", "mask", "sep"))
  ids = [cls, *tokenizer.encode(text.replace(MASK, tokenizer.decode([mask]))), sep]
  tokens = np.full((1, -(-len(ids) // LENGTHS) * LENGTHS), tokenizer.pad_id, np.int32)
  tokens[0, : len(ids)] = ids
  real = (np.arange(tokens.shape[1]) < len(ids)).astype(np.int32)[None]
  likeliest = np.asarray(_forward(model.module, top)(model.params, tokens, real))[0]
  return [tokenizer.decode([int(rng.choice(likeliest[t]))]).strip() for t in np.flatnonzero(np.array(ids) == mask)]


@functools.lru_cache(maxsize=4)
def _forward(module, top: int) -> Callable:
  @jax.jit
  def run(params, tokens_1T, real_1T):
    """The ids of the `top` likeliest tokens, [1, T, top]. A text is short: its logits fit."""
    hidden, _ = module.apply({"params": params}, tokens_1T, real_1T, np.arange(tokens_1T.shape[1])[None] * real_1T)
    return jax.lax.top_k(logits(hidden, head(params, module.config, module.mesh)), top)[1]

  return run
