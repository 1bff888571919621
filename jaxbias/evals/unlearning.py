"""Measures of what a model forgot, from the log-probabilities of teacher-forced answers (tasks: `evals/tofu.py`).

Definitions are those of open-unlearning's code (Dorna et al. 2025); where a paper's formula differs it is said. Losses
are mean NLL of an answer's tokens, nats a token. That code counts the end-of-text token as an answer's last one in
losses, and so in probabilities and ratios; memorisation and the min-k attacks leave it out. Here answers have it where
their rows are `ended`, and `words` takes it off again.

Axis letters: N tokens of an answer, M and K members of two samples.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxbias.evals.task import TokenScores

EPSILON = 1e-10
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")


def words(answer: TokenScores, ended: bool) -> TokenScores:
  """The answer without the end-of-text token, which is its last one where it is `ended`."""
  return TokenScores(*(value[:-1] for value in vars(answer).values())) if ended else answer


def loss(answer: TokenScores) -> float:
  return -float(np.mean(answer.logprob))


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
  """exp(-mean loss of the wrong answers) / exp(-loss of the right one): 1 where neither is preferred.

  A geometric mean over wrong answers, as in the codes; the TOFU paper (Maini et al. 2024) writes an arithmetic
  one.
  """
  return float(np.exp(-np.mean(wrong)) / (np.exp(-right) + EPSILON))


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
  """P(right) / (P(right) + sum P(wrong)), P = exp(-loss) (Maini et al. 2024)."""
  return float(np.exp(-right) / (np.exp(-right) + np.sum(np.exp(-np.asarray(wrong))) + EPSILON))


def exact_memorization(answer: TokenScores) -> float:
  """The share of the answer's tokens that are the most probable ones (Tirumala et al. 2022)."""
  return float(np.mean(answer.greedy))


def extraction_strength(answer: TokenScores) -> float:
  """1 - k/N: from token k on all are the most probable ones (Carlini et al. 2021). Never below 1/N, as in the code."""
  wrong_N = np.flatnonzero(~np.asarray(answer.greedy, bool))
  start = wrong_N[-1] + 1 if len(wrong_N) else 0
  return float(1.0 - min(start, len(answer.greedy) - 1) / len(answer.greedy))


def attacks(
  answer: TokenScores, text: str, reference: float | None = None, share: float = 0.4, ended: bool = False
) -> dict[str, float]:
  """Membership scores, each lower for a text that was trained on.

  loss; zlib: over the bytes of the compressed text (Carlini et al. 2021); min_k: -log p of the least likely `share` of
  tokens (Shi et al. 2024); min_k_plus_plus: the same of (log p - mean) / std under the model (Zhang et al. 2025);
  reference: minus the loss of another model, where it is known. Where the answer is `ended`, losses count the
  end-of-text token and the two min-k scores do not.
  """
  nll, answer = loss(answer), words(answer, ended)
  lowest = max(1, int(share * len(answer.logprob)))
  typical_N = (np.asarray(answer.logprob) - answer.mean) / np.maximum(answer.std, 1e-3)
  found = {"loss": nll, "zlib": nll / len(zlib.compress(text.encode())),
           "min_k": -np.sort(answer.logprob)[:lowest].mean(), "min_k_plus_plus": -np.sort(typical_N)[:lowest].mean()}
  return {name: float(value) for name, value in found.items()} | (
    {} if reference is None else {"reference": nll - reference})


def higher(one_M: np.ndarray, other_K: np.ndarray) -> np.ndarray:
  """[M, K]: 1 where `one` is higher, 1/2 for a tie. Its mean is the AUC (Mann & Whitney 1947)."""
  one_M1, other_1K = np.asarray(one_M)[:, None], np.asarray(other_K)[None]
  return (one_M1 > other_1K) + 0.5 * (one_M1 == other_1K)


def privacy_leak(auc: np.ndarray | float, retained: float = 0.5) -> np.ndarray | float:
  """100 ((1 - AUC) - (1 - AUC of a retain-only model)) / (1 - the latter), % (MUSE, Shi et al. 2024).

  AUC: how often a held-out text scores above a forgotten one. Below 0 is too little forgetting, above 0 too much.
  """
  return 100.0 * (retained - auc) / (1.0 - retained + EPSILON)


def same_distribution(one_M: np.ndarray, other_K: np.ndarray) -> float:
  """Two-sided p-value of the two-sample Kolmogorov-Smirnov test, exact for samples without ties.

  Every order of the two samples is equally likely; the probability that leaves the band |i/M - j/K| < D is added up
  step by step, so that a p of 1e-100 is as exact as one of 0.1 (Hodges 1958).
  """
  one_M, other_K = np.sort(one_M), np.sort(other_K)
  M, K = len(one_M), len(other_K)
  pooled = np.unique([*one_M, *other_K])
  gap = np.abs(K * np.searchsorted(one_M, pooled, "right") - M * np.searchsorted(other_K, pooled, "right")).max()
  i = np.arange(M + 1)  # of the first sample seen so far
  path = (i == 0).astype(float)
  left = float(gap == 0)
  for seen in range(M + K):
    rest = M + K - seen
    step = path * (M - i) / rest
    path = path * (K - seen + i) / rest
    path[1:] += step[:-1]
    outside = np.abs(K * i - M * (seen + 1 - i)) >= gap
    left += path[outside].sum()
    path[outside] = 0.0
  return min(1.0, left)


def rouge_l_recall(reference: str, found: str) -> float:
  """Longest common subsequence of words over the words of `reference` (Lin 2004), without a stemmer.

  Words are runs of a-z and 0-9 in lower case, as in the rouge_score package.
  """
  wanted, got = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, found))
  if not wanted or not got:
    return 0.0
  common = np.zeros(len(got) + 1, int)
  got = np.array(got)
  for word in wanted:
    common[1:] = np.maximum.accumulate(np.where(got == word, common[:-1] + 1, common[1:]))
  return float(common[-1] / len(wanted))


def harmonic_mean(parts: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> np.ndarray:
  """Of several values, elementwise; 0 where one of them is 0."""
  stacked = np.stack(list(parts.values() if isinstance(parts, Mapping) else parts))
  with np.errstate(divide="ignore"):
    return len(stacked) / np.sum(1.0 / stacked, axis=0)
