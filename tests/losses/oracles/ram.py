"""The Residual Alignment Model: its objectives, its schedule and its texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxbias.data.pipeline import Segment
from jaxbias.data.rows import Group, Member
from jaxbias.data.tokens import Tokenizer
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import parse
from jaxbias.methods.recipes import grouped
from jaxbias.train.batches import tokenise
from jaxbias.train.optim import schedule
from jaxbias.types import Batch
from tests.losses.oracles.case import SLOPE, VALUE, WIDTHS, Case, logits_context, oracle, slope, value

RAM = oracle("ram")


@functools.cache
def ram_pairs(width: str = "float64", one: int | None = None) -> LossContext:
  """Rows 0-2 chosen (retain), 3-5 rejected (forget), as given: left padding and all; or the pair `one` alone."""
  given = RAM["losses"]["inputs"]
  def both(what, fill):
    sides = [np.array(given[what.format(side)]) for side in ("chosen", "rejected")]
    longest = max(x.shape[1] for x in sides)
    pad = lambda x: np.pad(x, [(0, 0), (0, longest - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return np.concatenate([pad(x) for x in sides])

  policy, ref = (both(f"{which}_{{}}_logits", 0.0).astype(WIDTHS[width]) for which in ("policy", "ref"))
  labels, twins = both("{}_labels", -100), np.array([3, 4, 5, 0, 1, 2])
  chosen = list(range(6)) if one is None else [one, one + 3]
  twins = twins if one is None else [1, 0]
  return logits_context(policy[chosen], labels[chosen], ["retain" if i < 3 else "forget" for i in chosen],
                        ref=ref[chosen], pair=twins)  # fmt: skip


def ram() -> Iterator[Case]:
  expected, wide = RAM["losses"]["outputs"], dict(relative=VALUE["float64"], wide=True)
  narrow, steep = dict(relative=VALUE["float32"]), dict(absolute=SLOPE["float32"])
  sums, means = expected["seq_logps_sum"], expected["seq_logps_mean"]
  for which, of in (("policy", "logprob_BS"), ("ref", "ref_logprob_BS")):
    yield Case(f"ram float64: sums of log p, {which}", lambda of=of: getattr(ram_pairs(), of)[:, 0],
               sums[f"{which}_chosen"] + sums[f"{which}_rejected"], **wide)  # fmt: skip
  yield Case("ram float64: means of log p", lambda: (ram_pairs().logprob_BS / ram_pairs().tokens_BS)[:, 0],
             means["policy_chosen"] + means["policy_rejected"], **wide)  # fmt: skip
  each = lambda name, width="float64", **how: jnp.stack(
    [value(name, ram_pairs(width, one), "retain", **how) for one in range(3)]
  )
  losses = {"sft": ("sft", {"reduction": "seq_sum"})}
  losses |= {key: ("ram", {"alpha": float(key.split("=")[1])}) for key in expected if key.startswith("ours_sft")}
  for key, (name, how) in losses.items():
    found = expected[key]
    yield Case(f"ram float32: {key}", lambda n=name, how=how: value(n, ram_pairs("float32"), "retain", **how),
               found["loss_mean_fp32"], **narrow)  # fmt: skip
    yield Case(f"ram float32: {key}, each pair", lambda n=name, how=how: each(n, "float32", **how),
               found["per_example"], **narrow)  # fmt: skip
    if "loss_mean_f64" in found:
      yield Case(f"ram float64: {key}", lambda n=name, how=how: value(n, ram_pairs(), "retain", **how),
                 found["loss_mean_f64"], **wide)  # fmt: skip
    for side, rows, tokens in (("chosen", slice(0, 3), 6), ("rejected", slice(3, 6), 5)):
      if found[f"grad_{side}_logits"] is not None:
        find = lambda n=name, how=how, at=(rows, slice(tokens)): slope(n, ram_pairs("float32"), "retain", **how)[at]
        yield Case(f"ram float32: {key}, slope of {side}", find, found[f"grad_{side}_logits"], **steep)
  forms = {
    "dpo_beta0.5": {"beta": 0.5}, "dpo_beta0.1_ls0.1": {"beta": 0.1, "smoothing": 0.1},
    "ipo_beta0.5": {"beta": 0.5, "form": "ipo"},
    "ours_dpo_as_called(ref logps are python 0)": {"beta": 1.0, "reference": "none"},
    "ours_dpo_beta1.0(reference_free)": {"beta": 1.0, "reference": "none"},
  }  # fmt: skip
  assert forms.keys() == expected["preference_loss_f64"].keys()
  for key, how in forms.items():
    found = expected["preference_loss_f64"][key]
    yield Case(f"ram float64: {key}", lambda how=how: each("dpo", **how), found["losses"], **wide)
    free = "as_called" in key  # the reward of the published code is then log Q itself
    what = "logprob_BS" if free else "log_ratio_BS"
    reward = lambda how=how, what=what: how["beta"] * getattr(ram_pairs(), what)[:, 0]
    yield Case(f"ram float64: {key}, rewards", reward, found["chosen_rewards"] + found["rejected_rewards"], **wide)
  yield from toy_tree()
  yield from schedules()
  yield from texts()


# The toy tree: texts of two tokens out of three, all nine of them


def probabilities(uniform: bool = False) -> tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array]]:
  """The target S and the proposal P of every text, [9], and the logits of Q's two steps."""
  tree, toy = RAM["sequence_vs_token_normalisation"], RAM["jensen_surrogate"]
  P = np.array(tree["P1"])[:, None] * np.array(tree["P2"])
  logits = tuple(jnp.asarray(toy[f"q{i}_logits"]) * (not uniform) for i in (1, 2))
  return np.array(toy["S"]).ravel(), P.ravel(), logits


def log_q(logits: tuple[jax.Array, jax.Array]) -> jax.Array:
  first, second = (jax.nn.log_softmax(x, -1) for x in logits)
  return (first[:, None] + second).ravel()


def surrogate(logits: tuple[jax.Array, jax.Array]) -> jax.Array:
  """sum over y, y' of S(y) P(y') of RAM's loss of the pair: the objective in expectation, less that of P alone."""
  S, P, _ = probabilities()
  n, log_Q = len(S), log_q(logits)
  first, second = np.repeat(np.arange(n), n), np.tile(np.arange(n), n)
  weights = jnp.asarray(S[first] * P[second])  # the mean over pairs is linear in the weights of what it averages
  ones = jnp.ones((n * n, 2), jnp.int32)
  batch = Batch(
    tokens=None, segment=None, position=None, score_at=None, target=None, ref_logprob=None,
    score_segment=jnp.asarray([[1, 2]] * (n * n)), role=ones.at[:, 1].set(0),
    pair=jnp.arange(2 * n * n).reshape(-1, 2) + jnp.array([1, -1]),
  )  # fmt: skip
  scaled = jnp.stack([log_Q[first] * weights, log_Q[second] * weights], 1)
  return n * n * value("ram", LossContext(batch, scaled), "retain", alpha=1.0) - (S * np.log(P)).sum()


def exact(logits: tuple[jax.Array, jax.Array]) -> jax.Array:
  """-E_S log P_theta, P_theta = P Q / Z."""
  S, P, _ = probabilities()
  log_composed = np.log(P) + log_q(logits)
  return jax.nn.logsumexp(log_composed) - (S * log_composed).sum()


def toy_tree() -> Iterator[Case]:
  toy, about = RAM["jensen_surrogate"], dict(relative=1e-6, wide=True)  # its P was normalised in float32
  of = lambda loss, uniform=False: loss(probabilities(uniform)[2])
  for what, find, expected in (
    ("surrogate, alpha 1", lambda: of(surrogate), toy["surrogate_alpha1(lower bound)"]),
    ("exact", lambda: of(exact), toy["exact_loss"]),
    ("what the surrogate is below", lambda: of(exact) - of(surrogate), toy["gap"]),
    ("surrogate, uniform Q", lambda: of(surrogate, True), toy["uniform_Q"]["surrogate"]),
    ("exact, uniform Q", lambda: of(exact, True), toy["uniform_Q"]["exact"]),
  ):
    yield Case(f"ram float64: toy tree, {what}", find, expected, **about)
  off = lambda: jax.tree.map(jnp.subtract, *(jax.grad(loss)(probabilities(True)[2]) for loss in (surrogate, exact)))
  yield Case("ram float64: toy tree, slopes are equal at uniform Q", lambda: np.concatenate([x.ravel() for x in off()]),
             np.zeros(12), absolute=1e-6, wide=True)  # fmt: skip


# Schedules and texts


def schedules() -> Iterator[Case]:
  found = RAM["lr_schedule"]
  for name, case in {**found["examples"], "proposal": found["proposal_warmup_sft"]}.items():
    steps, warmup = case["steps"], case["warmup_steps"]
    expected = [min(1.0, (step + 1) / (warmup + 1)) for step in range(steps)]
    rate = lambda steps=steps, warmup=warmup: jax.vmap(schedule("constant", steps, warmup))(jnp.arange(steps))
    yield Case(f"ram float32: learning rate, {name}", rate, expected, relative=1e-6)


def texts() -> Iterator[Case]:
  """What is predicted from what. Ours puts a start token ahead; `tests/losses/test_oracles.py` has what it cuts."""
  for number, case in enumerate(RAM["tokenize"]["cases"]):
    if kept_whole(case):
      for side in ("chosen", "rejected"):
        ids, labels = (case["out"][f"{side}_{what}"] for what in ("input_ids", "labels"))
        expected = [[t, label] for t, label in enumerate(labels) if label != -100]
        yield Case(f"ram: tokens of text {number}, {side}", lambda c=case, s=side: segment(c, s).tokens[1:], ids[:-1],
                   absolute=0.5)  # fmt: skip
        predicted = lambda c=case, s=side: np.stack([segment(c, s).score_at, segment(c, s).target], 1)
        yield Case(f"ram: targets of text {number}, {side}", predicted, expected, absolute=0.5)


def kept_whole(case: dict) -> bool:
  """Nothing is cut, and both answers have a token of their own."""
  sides = [len(case[side].split()) for side in ("chosen", "rejected")]
  return len(case["prompt"].split()) + max(sides) + 1 <= case["max_length"] and all(sides)


def segment(case: dict, side: str) -> Segment:
  """One answer of a case as a member of a group, which is taught to its end, in a model of `max_length` positions."""
  member = Member(side, " " + case[side] if case[side] else "", "original")
  recipe = grouped([Group("g", case["prompt"], (member,), (dataclasses.replace(member, id="other"),))])
  objective, _ = parse({"sft": {"on": "retain"}})
  return tokenise(recipe, objective, whole_numbers(), case["max_length"] + 1).segments["retain"][0]


@functools.cache
def whole_numbers() -> Tokenizer:
  """The oracle's: words between spaces are numbers, and number n is token 10 + n; end 2, padding 0."""
  words = {"end": 2, "start": 1, "pad": 0} | {str(n): 10 + n for n in range(20)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="pad"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return Tokenizer(backend, 1, 2, 0, 30, "whole numbers")
