"""Neural-collapse alignment of chosen words: do class means of states point where the words' output weights do?

A class is a word, its feature the state that predicts it, its weight the row of the head (the mean of its rows where a
word has several pieces). The word list comes with the statistics, as data: {"ids", "group", "counts", "sums", "step"}
of TrainState.aux. C classes, M pieces of the longest word.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.data.tokens import Tokenizer
from jaxbias.data.wordlists import PIECES, classes, groups_of_classes, read_groups, read_words
from jaxbias.errors import UserError
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import ANY, Found, register_loss
from jaxbias.models.config import ModelConfig
from jaxbias.types import Metric

EPS = 1.1920929e-7  # as published: added to norms and counts

# (U)NC3 as it was published, lambda aside: 10 with MABEL, 100 with BEC and ASE, 5 with ADEPT.
PUBLISHED = {"form": "std", "site": "stack_out", "shift": "1", "gradient": "weights", "totals": "cumulative",
             "pieces": "first"}  # fmt: skip


def init_statistics(config: ModelConfig, tokenizer: Tokenizer | None, options: Mapping[str, str]) -> dict:
  """Empty statistics of the list that the options name. Without a tokenizer: of their sizes, one piece a word."""
  words, D = read_words(options["words"]), config.table_size
  ids, group = np.zeros((len(words), 1), np.int32), np.zeros(len(words), np.int32)
  if tokenizer:
    ids = classes(words, tokenizer, options["pieces"])
    group = groups_of_classes(ids, read_groups(options["words"]), tokenizer, options["pieces"])
  if options["site"] == "stack_out" and D != config.hidden_size:
    raise UserError(f"stack_out is {config.hidden_size} wide and the head reads {D}; use site = head_input.")
  return {"ids": jnp.asarray(ids), "group": jnp.asarray(group), **no_sums(len(ids), D)}


def no_sums(C: int, D: int) -> dict:
  """Statistics of no occurrence yet."""
  return {"counts": jnp.zeros(C, jnp.int32), "sums": jnp.zeros((C, D)), "step": jnp.int32(0)}


# Statistics


def ahead(x_BT: jax.Array, n: int) -> jax.Array:
  """x[b, t + n], 0 beyond the ends."""
  T, pad = x_BT.shape[1], [(0, 0), (max(-n, 0), max(n, 0))] + [(0, 0)] * (x_BT.ndim - 2)
  return jax.lax.slice_in_dim(jnp.pad(x_BT, pad), max(n, 0), max(n, 0) + T, axis=1)


def occurrences(tokens_BT: jax.Array, segment_BT: jax.Array, keep_BT: jax.Array, ids_CM: jax.Array, shift: int):
  """bool [B, T, C]: at t a word begins whose pieces, and the states `shift` before them, lie in one kept segment."""
  found = keep_BT & (segment_BT > 0) & (ahead(segment_BT, -shift) == segment_BT)
  hits_BTC = jnp.broadcast_to(found[..., None], (*found.shape, len(ids_CM)))
  for m in range(ids_CM.shape[1]):
    same = (ahead(tokens_BT, m)[..., None] == ids_CM[:, m]) & (ahead(segment_BT, m) == segment_BT)[..., None]
    hits_BTC &= same | (ids_CM[:, m] < 0)
  return hits_BTC


def class_sums(hits_BTC: jax.Array, x_BTD: jax.Array, ids_CM: jax.Array, shift: int) -> tuple[jax.Array, jax.Array]:
  """How often each class occurs, int32 [C], and the sum of its features, float32 [C, D]; a sum over all devices."""
  total, x_BTD, length_C = 0.0, x_BTD.astype(jnp.float32), (ids_CM >= 0).sum(-1)
  for m in range(ids_CM.shape[1]):
    weight_BTC = hits_BTC * ((ids_CM[:, m] >= 0) / length_C)
    total += jnp.einsum("btc,btd->cd", weight_BTC, ahead(x_BTD, m - shift), precision=jax.lax.Precision.HIGHEST)
  return hits_BTC.sum((0, 1), dtype=jnp.int32), total


def updated(statistics: Mapping, counts_C: jax.Array, sums_CD: jax.Array, totals: str, decay, reset_every) -> dict:
  """Statistics with a batch's counts and sums added.

  cumulative: of the whole run; epoch: forgotten every `reset_every` steps; batch: of this step alone; ema: a class
  that occurs moves its mean to decay * mean + (1 - decay) * (this batch's mean).
  """
  old, step = dict(statistics), statistics["step"]
  if totals in ("epoch", "batch"):
    again = (step % jnp.maximum(reset_every, 1.0) == 0) if totals == "epoch" else True
    old |= {name: jnp.where(again, jnp.zeros_like(old[name]), old[name]) for name in ("counts", "sums")}
  counts, sums = old["counts"] + counts_C, old["sums"] + sums_CD
  if totals == "ema":
    mean = lambda total, count: total / jnp.maximum(count, 1)[:, None]
    moved = decay * mean(old["sums"], old["counts"]) + (1 - decay) * mean(sums_CD, counts_C)
    both = ((old["counts"] > 0) & (counts_C > 0))[:, None]
    settled = jnp.where((counts_C > 0)[:, None], sums, old["sums"])
    sums = jnp.where(both, moved * counts[:, None], settled)
  return {**old, "counts": counts, "sums": sums, "step": step + 1}


# The alignment and what is asked of it


def unit(x: jax.Array) -> jax.Array:
  """x / (|x| + EPS), with a gradient of 0 at 0."""
  square = (x * x).sum(-1, keepdims=True)
  some = square > 0
  return x / (jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0) + EPS)


def alignment(counts_C: jax.Array, sums_CD: jax.Array, w_CD: jax.Array, present_C: jax.Array) -> jax.Array:
  """s_c = cos(mu_c - mu_G, w_c), [C]; mu_G is the plain mean of the present classes' means."""
  present = present_C[:, None]
  mean_CD = sums_CD / (counts_C[:, None] + EPS)
  center_D = jnp.where(present, mean_CD, 0.0).sum(0) / jnp.maximum(present.sum(), 1)
  return (unit(mean_CD - center_D) * unit(w_CD.astype(jnp.float32))).sum(-1)


def spread(s_C: jax.Array, present_C: jax.Array) -> jax.Array:
  """Sample standard deviation over present classes; 0 with a gradient of 0 for one class, or where all s are equal."""
  n, mean = present_C.sum(), Metric.over(s_C, present_C).value()
  square = jnp.where(present_C, (s_C - mean) ** 2, 0.0).sum()
  ok = (n > 1) & (square > 0)
  return jnp.where(ok, jnp.sqrt(jnp.where(ok, square / jnp.maximum(n - 1, 1), 1.0)), 0.0)


def group_gap(s_C: jax.Array, present_C: jax.Array, group_C: jax.Array) -> Metric:
  """Mean s of the list's first group less that of its second; weight 0 where either has no present class."""
  first, second = (Metric.over(s_C, present_C & (group_C == number)) for number in (0, 1))
  both = (first.weight > 0) & (second.weight > 0)
  return Metric(jnp.where(both, first.value() - second.value(), 0.0), both.astype(jnp.float32))


def penalty(s_C: jax.Array, present_C: jax.Array, form: str) -> jax.Array:
  mean = Metric.over(s_C, present_C).value()
  return {
    "mse_to_one": lambda: Metric.over((1 - s_C) ** 2, present_C).value(),
    "one_minus_mean": lambda: 1 - mean,
    "std": lambda: spread(s_C, present_C),
    "cov": lambda: spread(s_C, present_C) / jnp.maximum(jnp.abs(mean), EPS),
  }[form]()


@register_loss(
  "nc3",
  on="retain",
  needs=("hidden", "stack_out", "no_targets"),
  coefficients={"decay": 0.9, "reset_every": 0.0, "min_count": 1.0},
  options={
    "form": ("mse_to_one", "one_minus_mean", "std", "cov"),
    "site": ("head_input", "stack_out"),
    "shift": ("auto", "0", "1"),
    "gradient": ("both", "weights", "features"),
    "totals": ("ema", "cumulative", "epoch", "batch"),
    "pieces": PIECES,
    "words": ("gender", ANY),
  },
  init_aux=init_statistics,
)
def nc3(
  ctx: LossContext, on: str, decay: jax.Array, reset_every: jax.Array, min_count: jax.Array, form: str, site: str,
  shift: str, gradient: str, totals: str, pieces: str, words: str, aux: Mapping[str, jax.Array],
) -> Found:  # fmt: skip
  """Alignment of class means with class weights (NC3; the regulariser of "Fairness-NC", ICLR 2025).

  s_c = cos(mu_c - mu_G, w_c) over the list's classes seen at least `min_count` times. std: the published (U)NC3, which
  makes all s alike, high or low; mse_to_one: mean (1 - s)^2, which raises their mean as well. mu holds states at
  `site`, `shift` positions before the word (auto: 1 in a causal model, 0 in a masked one). 0 below two classes.
  """
  del pieces, words  # the statistics hold the ids
  by = {"auto": int(ctx.causal), "0": 0, "1": 1}[shift]
  held = lambda x, trained: x if gradient in ("both", trained) else jax.lax.stop_gradient(x)
  x_BTD = held(ctx.hidden_BTD if site == "head_input" else ctx.captures["stack_out"], "features")
  ids, batch = aux["ids"], ctx.batch
  hits = occurrences(batch.tokens, batch.segment, ctx.within(on, batch.segment), ids, by)
  new = updated(aux, *class_sums(hits, x_BTD, ids, by), totals, decay, reset_every)
  pieces_CM1 = (ids >= 0)[..., None]
  w_CD = held((ctx.head.matrix[jnp.maximum(ids, 0)] * pieces_CM1).sum(1) / pieces_CM1.sum(1), "weights")
  present = new["counts"] >= jnp.maximum(min_count, 1)
  s_C, enough = alignment(new["counts"], new["sums"], w_CD, present), present.sum() > 1
  one = jnp.float32(1.0)
  notes = {"classes": Metric(present.sum().astype(jnp.float32), one), "similarity": Metric.over(s_C, present),
           "spread": Metric(spread(s_C, present), one), "gap": group_gap(s_C, present, aux["group"])}  # fmt: skip
  loss = Metric(jnp.where(enough, penalty(s_C, present, form), 0.0), enough.astype(jnp.float32))
  return Found(loss, *jax.lax.stop_gradient((new, notes)))
