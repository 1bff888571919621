"""What the debiasers train that a collapse regulariser was published beside: MABEL, ADEPT, ASE.

MABEL compares sentences, ADEPT and ASE the states of words. Their attributes (male, female) are the groups of one word
list, the neutral words another; both come with the running means of the attributes, as data in TrainState.aux.

N = B * S, the segments of a batch; A attributes, G pairs of attributes, W words, X what a word's state is made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.data.tokens import Tokenizer
from jaxbias.data.wordlists import classes, groups_of_classes, read_groups, read_words
from jaxbias.errors import UserError
from jaxbias.losses.collapse import no_sums, updated
from jaxbias.losses.context import LossContext
from jaxbias.losses.contrastive import cosines, log_share, unit
from jaxbias.losses.registry import ANY, Found, register_loss
from jaxbias.losses.sentence_pairs import POOLS, sentences
from jaxbias.models.config import ModelConfig
from jaxbias.types import Metric

# MABEL


def premises_and_hypotheses(ctx: LossContext, on: str) -> tuple[jax.Array, jax.Array]:
  """Both bool [N], of the role `on`: the first and the last text of each group that have a twin, by `batch.row`."""
  b = ctx.batch
  group_N, order_N = b.group.reshape(-1), b.row.reshape(-1)
  here_N = (ctx.rows(on) & (b.pair >= 0) & (b.group >= 0)).reshape(-1)
  same_NN = here_N[:, None] & here_N & (group_N[:, None] == group_N)
  first_N = jnp.where(same_NN, order_N, jnp.iinfo(jnp.int32).max).min(-1)
  last_N = jnp.where(same_NN, order_N, -1).max(-1)
  return here_N & (order_N == first_N), here_N & (order_N == last_N)


SENTENCES = {"needs": ("hidden", "pairs", "groups", "no_targets"), "coefficients": {"temperature": 0.05},
             "couples": True}  # fmt: skip


@register_loss("mabel_contrast", on="retain", **SENTENCES, options={"pool": POOLS})
def mabel_contrast(ctx: LossContext, on: str, temperature: jax.Array, pool: str) -> Metric:
  """Each premise finds its hypothesis among all of the batch, originals and counterfactuals (MABEL, He et al. 2022).

  A pair is a text of role `on` and its counterfactual, a group a premise (its first text), its hypothesis (its last)
  and their counterfactuals. L = -log softmax_j(cos(premise_i, hypothesis_j) / temperature) at i's own; a group of one
  pair has no hypothesis, and no part, not even as what others are compared with.
  """
  group_N, role_N = ctx.batch.group.reshape(-1), ctx.batch.role.reshape(-1)
  twin_N = jnp.maximum(ctx.batch.pair.reshape(-1), 0)
  counterfactual_N = (ctx.batch.pair.reshape(-1) >= 0) & (role_N != role_N[twin_N])
  premise_N, hypothesis_N = premises_and_hypotheses(ctx, on)
  hypothesis_N &= ~premise_N
  premise_N, hypothesis_N = (x | counterfactual_N & x[twin_N] for x in (premise_N, hypothesis_N))
  log_p_NN = log_share(cosines(sentences(ctx, pool)) / temperature, premise_N[:, None] & hypothesis_N)
  own_NN = (group_N[:, None] == group_N) & (role_N[:, None] == role_N) & premise_N[:, None] & hypothesis_N
  return Metric.over(-jnp.where(own_NN, log_p_NN, 0.0).sum(-1), own_NN.any(-1))


@register_loss("mabel_alignment", on="retain", **SENTENCES,
               options={"pool": POOLS, "over": ("pairs", "rows")})  # fmt: skip
def mabel_alignment(ctx: LossContext, on: str, temperature: jax.Array, pool: str, over: str) -> Metric:
  """Premises are as near to hypotheses as their counterfactuals are to theirs (MABEL, He et al. 2022).

  L = mean_ij ((cos(p_i, h_j) - cos(p'_i, h'_j)) / temperature)^2, i over premises, j over hypotheses of the batch, in
  groups as of `mabel_contrast`; a group of one pair is a premise and a hypothesis at once. Published is the sum over j
  (`rows`, the variant a1 of the code), which grows with the batch.
  """
  premise_N, hypothesis_N = premises_and_hypotheses(ctx, on)
  twin_N = jnp.maximum(ctx.batch.pair.reshape(-1), 0)
  cos_NN = cosines(sentences(ctx, pool)) / temperature
  mean = Metric.over((cos_NN - cos_NN[twin_N][:, twin_N]) ** 2, premise_N[:, None] & hypothesis_N)
  return mean if over == "pairs" else Metric(mean.sum, premise_N.sum(dtype=jnp.float32))


# Attributes and neutral words


def init_attributes(width: Callable[[ModelConfig, Mapping[str, str]], int]) -> Callable:
  """`init_aux` of a loss on word lists; width(config, options) is the size X of a word's state.

  Raises UserError for a list of one attribute, and where an attribute or the neutral words have no token of their own.
  """

  def init(config: ModelConfig, tokenizer: Tokenizer | None, options: Mapping[str, str]) -> dict:
    groups, neutral, pieces = read_groups(options["attributes"]), read_words(options["neutral"]), options["pieces"]
    if len(groups) < 2:
      raise UserError(f"the list `{options['attributes']}` is one group of words, attributes are at least two; "
                      'give a .json such as {"male": ["he"], "female": ["she"]}.')  # fmt: skip
    attribute_W, of_W = np.zeros(sum(map(len, groups.values())), np.int32), np.zeros(1, np.int32)
    neutral_W = np.zeros(len(neutral), np.int32)
    if tokenizer:
      ids = classes([word for words in groups.values() for word in words], tokenizer, pieces)
      of_W, attribute_W = groups_of_classes(ids, groups, tokenizer, pieces), ids[:, 0]
      neutral_W = np.setdiff1d(classes(neutral, tokenizer, pieces)[:, 0], attribute_W)
    of_AW = np.arange(len(groups))[:, None] == of_W
    if tokenizer:
      left = dict(zip(groups, of_AW.sum(1), strict=True)) | {"neutral": len(neutral_W)}
      if empty := [name for name, count in left.items() if not count]:
        raise UserError(f"no word of `{empty[0]}` has a token of its own in this model; use pieces = `first`, or give "
                        "other words.")  # fmt: skip
    return {"attribute": jnp.asarray(np.where(of_AW, attribute_W, -1)), "neutral": jnp.asarray(neutral_W),
            **no_sums(len(groups), width(config, options))}  # fmt: skip

  return init


def attribute_means(
  aux: Mapping, ctx: LossContext, on: str, x_BTX: jax.Array, totals: str, decay: jax.Array, reset_every: jax.Array
) -> tuple[dict, jax.Array, jax.Array]:
  """The new running statistics, each attribute's mean state [A, X] without a gradient, and where a neutral word of
  role `on` stands, bool [B, T]."""
  b, x_BTX = ctx.batch, jax.lax.stop_gradient(x_BTX)
  keep_BT = ctx.within(on, b.segment)
  is_BTA = keep_BT[..., None] & (b.tokens[..., None, None] == aux["attribute"]).any(-1)
  sums_AX = jnp.einsum("bta,btx->ax", is_BTA.astype(jnp.float32), x_BTX, precision=jax.lax.Precision.HIGHEST)
  new = updated(aux, is_BTA.sum((0, 1), dtype=jnp.int32), sums_AX, totals, decay, reset_every)
  means_AX = new["sums"] / jnp.maximum(new["counts"], 1)[:, None]
  return new, means_AX, keep_BT & (b.tokens[..., None] == aux["neutral"]).any(-1)


def attribute_pairs(counts_A: jax.Array) -> tuple[np.ndarray, np.ndarray, jax.Array]:
  """Every two attributes, [G] each, and whether both have occurred."""
  one_G, other_G = np.array(list(itertools.combinations(range(len(counts_A)), 2))).T
  return one_G, other_G, (counts_A[one_G] > 0) & (counts_A[other_G] > 0)


def only(keep_BT: jax.Array, x_BTX: jax.Array) -> jax.Array:
  """float32; 0 where nothing is kept, so that padding that is not a number stays out of gradients, too."""
  return jnp.where(keep_BT[..., None], x_BTX.astype(jnp.float32), 0.0)


WORDS = {
  "attributes": ("gender", ANY),
  "neutral": ("occupations", ANY),
  "pieces": ("single", "first"),
  "totals": ("ema", "cumulative", "epoch", "batch"),
}
RUNNING = {"decay": 0.9, "reset_every": 0.0}


# ADEPT


def relative_distance(x_BTX: jax.Array, means_AX: jax.Array, keep_BT: jax.Array, rho: jax.Array) -> jax.Array:
  """log p_a(n), [A, B * T]: softmax over the kept positions n of -|e_a - x_n|^2 / (2 rho^2)."""
  square_ABT = ((x_BTX - means_AX[:, None, None]) ** 2).sum(-1)
  return jax.nn.log_softmax(jnp.where(keep_BT, -square_ABT / (2 * rho**2), -1e30).reshape(len(means_AX), -1))


@register_loss("adept", on="retain", needs=("residual_out", "no_targets"), coefficients={"rho": 15.0, **RUNNING},
               options={"unit": ("nats", "bits"), **WORDS},
               init_aux=init_attributes(lambda config, options: config.num_layers * config.hidden_size))  # fmt: skip
def adept(
  ctx: LossContext, on: str, rho: jax.Array, decay: jax.Array, reset_every: jax.Array, unit: str, attributes: str,
  neutral: str, pieces: str, totals: str, aux: Mapping[str, jax.Array],
) -> Found:  # fmt: skip
  """Neutral words are as far from each attribute as from the other (ADEPT, Yang et al. 2023, neutral term).

  L = mean over attributes a < b of JS(p_a, p_b), p_a(n) proportional to exp(-|e_a - x_n|^2 / (2 rho^2)) over the
  batch's neutral words n; x: the states behind every block, side by side; e_a: their running mean over the
  attribute's words, without a gradient. Depends on what shares a batch, by definition.
  """
  del attributes, neutral, pieces  # the statistics hold the ids
  x_BTX = jnp.moveaxis(ctx.captures["residual_out"], 0, 2).reshape(*ctx.batch.tokens.shape, -1)
  x_BTX = only(ctx.batch.segment > 0, x_BTX)
  new, means_AX, neutral_BT = attribute_means(aux, ctx, on, x_BTX, totals, decay, reset_every)
  log_p_AN = relative_distance(x_BTX, means_AX, neutral_BT, rho)
  one_G, other_G, both_G = attribute_pairs(new["counts"])
  log_p_GN, log_q_GN = log_p_AN[one_G], log_p_AN[other_G]
  log_m_GN = jnp.logaddexp(log_p_GN, log_q_GN) - jnp.log(2.0)
  divergence = lambda log_p, log_q: (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  js_G = (divergence(log_p_GN, log_m_GN) + divergence(log_q_GN, log_m_GN)) / 2
  words = neutral_BT.sum(dtype=jnp.float32)
  mean = Metric.over(js_G / (jnp.log(2.0) if unit == "bits" else 1.0), both_G & (words > 1))
  entropy_A = -(jnp.exp(log_p_AN) * log_p_AN).sum(-1)
  notes = {"neutral_words": Metric(words, jnp.float32(1.0)),
           "perplexity": Metric.over(jnp.exp(entropy_A), (new["counts"] > 0) & (words > 0))}  # fmt: skip
  return Found(Metric(mean.value(), (mean.weight > 0).astype(jnp.float32)), *jax.lax.stop_gradient((new, notes)))


@register_loss("adept_anchor", on="retain", needs=("residual_out", "base_residual_out", "no_targets"))
def adept_anchor(ctx: LossContext, on: str) -> Metric:
  """mean_d (h_d - h_ref,d)^2 over the states behind all blocks at all tokens of role `on` (ADEPT, Yang et al. 2023)."""
  h_LBTD, ref_LBTD = (captures["residual_out"] for captures in (ctx.captures, ctx.base_captures))
  keep_BT = ctx.within(on, ctx.batch.segment)
  return Metric.over(jnp.square(only(keep_BT, h_LBTD) - only(keep_BT, ref_LBTD)).mean((0, -1)), keep_BT)


# ASE


def _site_width(config: ModelConfig, options: Mapping[str, str]) -> int:
  return config.table_size if options["site"] == "head_input" else config.hidden_size


@register_loss("ase_orthogonal", on="retain", needs=("hidden", "stack_out", "no_targets"), coefficients=RUNNING,
               options={"form": ("abs", "square"), "over": ("words", "sum"), "site": ("head_input", "stack_out"),
                        **WORDS},
               init_aux=init_attributes(_site_width))  # fmt: skip
def ase_orthogonal(
  ctx: LossContext, on: str, decay: jax.Array, reset_every: jax.Array, form: str, over: str, site: str,
  attributes: str, neutral: str, pieces: str, totals: str, aux: Mapping[str, jax.Array],
) -> Found:  # fmt: skip
  """Neutral words have no part along the direction from one attribute to another (ASE, Park et al. 2023).

  L = mean over neutral words n, and attributes a < b, of |h_n . g| (or its square), g = unit(e_a - e_b) from the
  attributes' running means, without a gradient; h at `site`. Published is the sum over the batch's words.
  """
  del attributes, neutral, pieces  # the statistics hold the ids
  h_BTD = ctx.hidden_BTD if site == "head_input" else ctx.captures["stack_out"]
  h_BTD = only(ctx.batch.segment > 0, h_BTD)
  new, means_AD, neutral_BT = attribute_means(aux, ctx, on, h_BTD, totals, decay, reset_every)
  one_G, other_G, both_G = attribute_pairs(new["counts"])
  g_GD = unit(means_AD[one_G] - means_AD[other_G])
  along_BTG = jnp.einsum("btd,gd->btg", h_BTD, g_GD, precision=jax.lax.Precision.HIGHEST)
  each_BTG = jnp.abs(along_BTG) if form == "abs" else along_BTG**2
  mean = Metric.over(each_BTG, neutral_BT[..., None] & both_G)
  if over == "sum":
    mean = Metric(mean.sum, jnp.minimum(mean.weight, 1.0))
  notes = {"neutral_words": Metric(neutral_BT.sum(dtype=jnp.float32), jnp.float32(1.0))}
  return Found(mean, *jax.lax.stop_gradient((new, notes)))
