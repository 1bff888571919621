"""The published codes' own numbers: every case of the oracle files that concerns a loss, a schedule, how texts are made
or an evaluator; values, and gradients where the files have them.

  python -m pytest tests/losses/test_oracles.py -k table -s        # prints each case with its error

The files were made by running the reference implementations of BiasUnlearn, of the Residual Alignment Model and of
Fairness-NC. Float64 entries are met to 1e-9 (in float64), float32 entries to 1e-5, their gradients to 1e-6 (1e-5 in
Fairness-NC, as that file asks).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbias.errors import UserError
from jaxbias.losses.logprobs import cross_entropy, forward_kl
from jaxbias.losses.registry import LOSSES
from jaxbias.models.transformer import Head
from tests.losses.oracles.biasunlearn import BIASUNLEARN, biasunlearn
from tests.losses.oracles.case import logits_context, slope
from tests.losses.oracles.collapse import collapse, debiasers
from tests.losses.oracles.evaluators import evaluators
from tests.losses.oracles.ram import RAM, kept_whole, ram, segment

CASES = [*biasunlearn(), *ram(), *collapse(), *debiasers(), *evaluators()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_published_number(case):
  assert case.error() <= case.tolerance


@pytest.mark.parametrize("number,side,message", [
  (1, "rejected", "text rejected takes 12 positions with its start token, the model has 11"),
  (2, "chosen", "text chosen takes 18 positions with its start token, the model has 9"),
  (3, "chosen", "text chosen: no token ends after its source of 3 characters"),
])  # fmt: skip
def test_what_rams_code_cuts_is_refused_here(number, side, message):
  """It keeps a long prompt's end and cuts answers, whose end is then not learned; an empty answer is its end alone."""
  case = RAM["tokenize"]["cases"][number]
  assert not kept_whole(case)
  with pytest.raises(UserError, match=message):
    segment(case, side)


def test_an_answer_of_no_tokens_is_nan_there_and_left_out_here():
  given, missing = BIASUNLEARN["lm_and_npo"]["inputs"], BIASUNLEARN["lm_loss_all_masked_row"]
  assert missing["result"] == "nan"
  theta = np.array(given["logits_theta"], np.float32)
  ctx = logits_context(theta, given["labels"], ["forget"] * 3, missing["start_locs"])
  found = LOSSES["sft"].function(ctx, "forget")
  assert found.weight == 2 and np.isfinite(found.value()) and np.isfinite(slope("sft", ctx, "forget")).all()


def test_the_published_anchor_differs_from_the_divergence_by_a_constant():
  given = BIASUNLEARN["kl"]["inputs"]
  theta, ref = (jnp.asarray(given[f"logits_{which}"]) for which in ("theta", "ref"))
  head = Head(jnp.eye(theta.shape[-1]))
  gap = [cross_entropy(x, head, ref, head) - forward_kl(x, head, ref, head) for x in (theta, 2 * theta)]
  np.testing.assert_allclose(*gap, rtol=1e-5)


def test_table():
  """The oracle table: what was compared, its largest error, what it may be."""
  rows = [(case.name, case.error(), case.tolerance, "relative" if case.relative else "absolute") for case in CASES]
  width = max(len(name) for name, *_ in rows)
  print(f"\n{'case':<{width}}  {'largest error':>13}  {'tolerance':>9}")
  for name, error, tolerance, kind in rows:
    print(f"{name:<{width}}  {error:13.1e}  {tolerance:9.0e}  {kind}{'' if error <= tolerance else '   TOO LARGE'}")
  assert all(error <= tolerance for _, error, tolerance, _ in rows)
