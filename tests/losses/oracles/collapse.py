"""Fairness-NC's collapse statistics and regulariser, and the debiasers' own losses beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from jaxbias.losses.collapse import PUBLISHED, class_sums, occurrences
from jaxbias.losses.debiasers import relative_distance
from tests.losses import collapsed, debiased
from tests.losses.collapsed import MLM
from tests.losses.oracles.case import Case, oracle

NC = oracle("nc")
FULL = ("A_three_classes_full", "A2_four_classes_full_even_triu", "A3_five_classes_full_odd_triu")
CLOSE = {"absolute": 1e-5}  # everything here was computed in float32


def collapse() -> Iterator[Case]:
  for name in FULL:
    yield from classes(name)
  yield from streaming()
  yield from shifted()
  yield from simplex()
  yield from numerics()


def classes(name: str) -> Iterator[Case]:
  inputs, repo = NC[name]["inputs"], NC[name]["repo"]
  given = lambda: (collapsed.context(inputs["Y"], inputs["X"], inputs["W"]),
                   collapsed.empty(range(inputs["C"]), inputs["D"]))  # fmt: skip
  out = functools.cache(lambda: collapsed.found(*given(), **PUBLISHED | MLM))
  slope = functools.cache(lambda: collapsed.of_weights(*given(), **PUBLISHED | MLM)[1])
  squares = (np.array(inputs["W"]) ** 2).sum(-1)
  s, n = np.array(repo["similarity"]), inputs["C"]
  norm = np.sqrt(((s - s.mean()) ** 2 * (1 - s**2) / squares).sum()) / ((n - 1) * repo["unc3_loss"])
  cases: list[tuple[str, Callable, object]] = [
    ("counts", lambda: out().aux["counts"], repo["counts"]),
    ("sums", lambda: out().aux["sums"], repo["totals"]),
    ("(U)NC3", lambda: out().metric.value(), repo["unc3_loss"]),
    ("mean similarity", lambda: out().notes["similarity"].value(), repo["similarity_mean_NC3"]),
    ("spread", lambda: out().notes["spread"].value(), repo["similarity_std_UNC3_loss"]),
    ("spread / mean", lambda: collapsed.found(*given(), **PUBLISHED | MLM | {"form": "cov"}).metric.value(),
     repo["similarity_cov_std_over_mean"]),
    ("(U)NC3, slope of W", slope, repo["unc3_grad_wrt_W"]),
    ("(U)NC3, slope keeps the norms", lambda: (slope() * given()[0].head.matrix).sum(-1), np.zeros(n)),
    ("(U)NC3, norm of the slope", lambda: jnp.linalg.norm(slope()), norm),
  ]  # fmt: skip
  for what, find, expected in cases:
    yield Case(f"nc {name.split('_')[0]}: {what}", find, expected, **CLOSE)
  if name == FULL[0]:
    yield Case("nc A: (U)NC3, norm of the slope as printed", lambda: jnp.linalg.norm(slope()), 0.161350, **CLOSE)


def streaming() -> Iterator[Case]:
  """A class unseen until the third step; totals of the whole run, features without gradient, plain SGD."""
  case = NC["B_streaming_regulariser"]
  inputs, steps = case["inputs"], case["steps"]

  @functools.cache
  def run() -> dict[str, list]:
    w, aux = jnp.asarray(inputs["W0"], jnp.float32), collapsed.empty(inputs["S"], inputs["D"])
    out = {name: [] for name in ("before", "loss", "slope", "counts", "after")}
    for step in steps:
      ctx = collapsed.context(step["Y"], step["X"], w)
      loss, slope = collapsed.of_weights(ctx, aux, **PUBLISHED | MLM)
      aux = collapsed.found(ctx, aux, **PUBLISHED | MLM).aux
      after = w - inputs["lr"] * inputs["lambda_"] * slope
      for name, value in zip(out, (w, loss, inputs["lambda_"] * slope, aux["counts"], after), strict=True):
        out[name].append(value)
      w = after
    return out

  keys = {"before": "W_before", "loss": "loss_nc3", "slope": "grad_W", "after": "W_after_sgd"}
  for name, key in keys.items():
    yield Case(f"nc B: three steps, {name}", lambda name=name: run()[name], [step[key] for step in steps], **CLOSE)
  counts = [np.array(step["counts"])[inputs["S"]] for step in steps]
  yield Case("nc B: three steps, counts", lambda: run()["counts"], counts, **CLOSE)
  yield Case("nc B: three steps, losses as printed", lambda: run()["loss"], [0.1101313, 0.3377869, 0.2205317],
             absolute=1e-6)  # fmt: skip


def shifted() -> Iterator[Case]:
  case = NC["C_shift_by_one_alignment"]
  ids, mask, x = (np.array(case["inputs"][key]) for key in ("ids", "mask", "embeds"))
  labels, features = np.array(case["repo"]["Y"]), np.array(case["repo"]["X"])
  names = np.unique(labels)

  @functools.cache
  def sums():
    ctx, pieces = collapsed.context(ids, x, np.eye(2), segment=mask), jnp.asarray(names, jnp.int32)[:, None]
    keep = ctx.within("retain", ctx.batch.segment)
    hits = occurrences(ctx.batch.tokens, ctx.batch.segment, keep, pieces, shift=1)
    return class_sums(hits, ctx.hidden_BTD, pieces, shift=1)

  yield Case("nc C: states before a word, counts", lambda: sums()[0], [(labels == c).sum() for c in names], **CLOSE)
  yield Case("nc C: states before a word, sums", lambda: sums()[1], [features[labels == c].sum(0) for c in names],
             **CLOSE)  # fmt: skip


def simplex() -> Iterator[Case]:
  inputs = NC["D_simplex_etf"]["inputs"]
  of = lambda **how: collapsed.found(collapsed.context(inputs["Y"], inputs["X"], inputs["W"]),
                                     collapsed.empty(range(4), inputs["D"]), **MLM | how)  # fmt: skip
  yield Case("nc D: a simplex, mean similarity", lambda: of().notes["similarity"].value(), 1.0, **CLOSE)
  for form in ("std", "mse_to_one", "one_minus_mean", "cov"):
    yield Case(f"nc D: a simplex, {form}", lambda form=form: of(form=form).metric.value(), 0.0, **CLOSE)


def numerics() -> Iterator[Case]:
  case = NC["E_numerics"]
  many = case["int8_overflow"]["true_count"]
  ones = lambda: collapsed.context(np.zeros(many, int), np.ones((many, 2)), np.ones((3, 2)))
  yield Case("nc E: counts past 127", lambda: collapsed.found(ones(), collapsed.empty(range(3), 2), **MLM)
             .aux["counts"][0], many, **CLOSE)  # fmt: skip
  alone = lambda: collapsed.found(collapsed.context([0], [[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]),
                                  collapsed.empty(range(2), 2), **PUBLISHED | MLM)  # fmt: skip
  yield Case("nc E: similarity of a single class", lambda: alone().notes["similarity"].value(),
             case["similarity_single_class"][0], **CLOSE)  # fmt: skip
  yield Case("nc E: a single class, NaN there and 0 here", lambda: alone().metric.value(), 0.0, **CLOSE)
  opposite = lambda: collapsed.of_weights(collapsed.context([0, 1], [[1.0, 0], [-1, 0]], [[0, 1.0], [0, 1]]),
                                          collapsed.empty([0, 1], 2), **PUBLISHED | MLM)  # fmt: skip
  yield Case("nc E: no spread", lambda: opposite()[0], case["zero_std"]["loss"], **CLOSE)
  yield Case("nc E: no spread, slope", lambda: opposite()[1], case["zero_std"]["grad"], **CLOSE)
  affine = case["affine_invariance_of_loss"]
  x, w, y = (np.array(affine[key]) for key in ("X", "W", "Y"))
  rng = np.random.default_rng(0)
  turn, sizes = np.linalg.qr(rng.normal(size=(x.shape[1],) * 2))[0], rng.uniform(0.5, 2, (len(w), 1))
  of = lambda x, w: collapsed.found(collapsed.context(y, x, w), collapsed.empty(range(len(w)), x.shape[1]),
                                    **PUBLISHED | MLM).metric.value()  # fmt: skip
  for what, key, changed in (("as given", "base", (x, w)), ("features shifted", "X_shifted", (x + 3.0, w)),
                             ("features scaled", "X_scaled", (2.5 * x, w)),
                             ("rows of W scaled", "W_rowscaled", (x, w * sizes)),
                             ("both turned", "X_and_W_rotated", (x @ turn, w @ turn))):  # fmt: skip
    yield Case(f"nc E: (U)NC3, {what}", lambda changed=changed: of(*changed), affine[key], **CLOSE)
  x, minima = np.array([[1.0, 0, 0], [-1, 0, 0]]), case["degenerate_minima"]
  for name, weights in (("aligned", x), ("orthogonal", x[:, [1, 0, 2]]), ("anti", -x)):
    of_name = lambda weights=weights: collapsed.found(collapsed.context([0, 1], x, weights),
                                                      collapsed.empty([0, 1], 3), **PUBLISHED | MLM)  # fmt: skip
    yield Case(f"nc E: (U)NC3 of {name} classes", lambda of=of_name: of().metric.value(), 0.0, **CLOSE)
    yield Case(f"nc E: similarity of {name} classes", lambda of=of_name: of().notes["similarity"].value(),
               np.mean(minima[name]), **CLOSE)  # fmt: skip


def debiasers() -> Iterator[Case]:
  yield from mabel()
  yield from adept()
  yield from ase()


def mabel() -> Iterator[Case]:
  case = NC["F_mabel_losses"]
  inputs, repo = case["inputs"], case["repo"]
  states = np.array([inputs[key] for key in ("orig_premise", "orig_hyp", "aug_premise", "aug_hyp")])
  of = lambda name, ctx=None, **how: debiased.value(
    f"mabel_{name}", debiased.entailments(states) if ctx is None else ctx, temperature=inputs["softmax_temp"], **how)
  scattered = lambda: debiased.entailments(states, np.random.default_rng(0).permutation(12), rows=3)
  yield Case("nc F: MABEL's contrast", lambda: of("contrast"), repo["cl_loss"], relative=1e-5)
  yield Case("nc F: MABEL's contrast, packed rows", lambda: of("contrast", scattered()), repo["cl_loss"], relative=1e-5)
  yield Case("nc F: MABEL's contrast, by infonce", lambda: debiased.value(
    "infonce", debiased.entailed(states), temperature=inputs["softmax_temp"]), repo["cl_loss"],
    relative=1e-5)  # fmt: skip
  yield Case("nc F: MABEL's alignment", lambda: of("alignment", over="rows"), repo["a1_loss"], relative=1e-5)
  yield Case("nc F: MABEL's alignment, packed rows", lambda: of("alignment", scattered(), over="rows"),
             repo["a1_loss"], relative=1e-5)  # fmt: skip
  yield Case("nc F: MABEL without its language modelling",
             lambda: of("contrast") + inputs["align_temp"] * of("alignment", over="rows"), repo["total_without_mlm"],
             relative=1e-5)  # fmt: skip


def adept() -> Iterator[Case]:
  case = NC["G_adept_losses"]
  neutral, attributes, hidden, start = (np.array(case["inputs"][key])
                                        for key in ("neutral", "attributes", "hidden", "hidden_orig"))  # fmt: skip
  by_layer = lambda x: np.moveaxis(x, 2, 0)  # [B, T, L, D] -> [L, B, T, D]
  means_AX = attributes.reshape(len(attributes), -1)
  for rho, repo in case["repo"]["by_rho"].items():
    x_BTX = jnp.asarray(neutral.reshape(len(neutral), 1, -1), jnp.float32)
    shares = lambda rho=rho, x=x_BTX: jnp.exp(relative_distance(
      x, jnp.asarray(means_AX, jnp.float32), jnp.ones(x.shape[:2], bool), float(rho)))  # fmt: skip
    yield Case(f"nc G: ADEPT's shares, rho {rho}", shares, repo["P"], absolute=1e-6)
    js = lambda rho=rho: debiased.value("adept", debiased.worded([[debiased.NEUTRAL]] * 4, by_layer(neutral)),
                                        debiased.statistics(means_AX), rho=float(rho), unit="bits")  # fmt: skip
    yield Case(f"nc G: ADEPT's divergence, rho {rho}", js, repo["js"], absolute=1e-7)
  anchored = lambda: debiased.value("adept_anchor", debiased.worded(np.zeros((2, 3)), by_layer(hidden),
                                                                    by_layer(start)))  # fmt: skip
  yield Case("nc G: ADEPT's anchor", anchored, case["repo"]["representation_mse"], relative=1e-5)


def ase() -> Iterator[Case]:
  case = NC["L_ase_terms"]
  hidden, mask, direction = (np.array(case["inputs"][key]) for key in ("hidden", "neutral_mask", "gender_vector"))
  ctx = lambda: debiased.worded(np.where(mask, debiased.NEUTRAL, debiased.OTHER), hidden[None])
  for form in ("abs", "square"):
    of = lambda form=form: debiased.value("ase_orthogonal", ctx(), debiased.statistics([direction, 0 * direction]),
                                          form=form, over="sum", site="stack_out")  # fmt: skip
    yield Case(f"nc L: ASE's orthogonality, {form}", of, case["repo_formula"][f"orth_{form}"], relative=1e-5)
