"""SEAT and WEAT: do two sets of targets lie nearer to different attributes? (May et al. 2019; Caliskan et al. 2017)

s(w) = mean_a cos(w, a) - mean_b cos(w, b). The effect size is d = (mean_X s - mean_Y s) / std(s), ddof 1 over X and Y.
p: the share of equal partitions of the targets whose sum over X is at least the observed one; all of them where there
are at most 100,000, else 99,999 random ones and the observed one (May et al. 2019).

d is free of scale: vectors that have all collapsed into one direction may have any d, so the mean cosine of targets
with attributes stands beside it. How a text becomes a vector is the scorer's business; bias-bench takes the mean of the
last hidden states. The authors' tests are for non-commercial use only (CC BY-NC 4.0).

Axis letters: X, Y targets; A, B attributes; N both targets; D embedding; P partitions; T tests.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxbias.data.fields import a_row, field, json_file, strings
from jaxbias.data.rows import Text
from jaxbias.errors import UserError
from jaxbias.evals.metrics import Benchmark, Estimate, Ideal, Neutral, Result
from jaxbias.evals.tabulate import groups_of, tabulate
from jaxbias.evals.task import EITHER, EMBEDDINGS, Task

BENCHMARK = Benchmark(
  name="seat",
  metrics={"abs_d": Ideal(0.0), "d": Ideal(0.0), "p": Neutral(), "cosine": Neutral()},
  source="May et al. 2019, W4ngatang/sent-bias weat.py; Meade et al. 2022 (bias-bench)", cluster="test")

SETS = ("targ1", "targ2", "attr1", "attr2")
DOMAINS = {  # the tests that bias-bench averages
  "gender": ("sent-weat6", "sent-weat6b", "sent-weat7", "sent-weat7b", "sent-weat8", "sent-weat8b"),
  "race": ("sent-angry_black_woman_stereotype", "sent-angry_black_woman_stereotype_b", "sent-weat3", "sent-weat3b",
           "sent-weat4", "sent-weat5", "sent-weat5b"),
  "religion": ("sent-religion1", "sent-religion1b", "sent-religion2", "sent-religion2b"),
}
EXACT, SAMPLED = 100_000, 99_999  # partitions


@dataclasses.dataclass(frozen=True)
class Association:
  name: str
  sets: tuple[tuple[str, ...], ...]  # texts, in the order of SETS

  @property
  def domain(self) -> str:
    return next((domain for domain, names in DOMAINS.items() if self.name in names), "other")


def load(path: str, pattern: str = "*") -> list[Association]:
  """A folder of SEAT's .jsonl files, or one of them.

  Of a folder the files whose names match; each is one JSON object.
  """
  path = Path(path).expanduser()
  files = sorted(path.glob(f"{pattern}.jsonl")) if path.is_dir() else [path]
  if not files:
    raise UserError(f"{path} holds no {pattern}.jsonl of SEAT.")
  tests = []
  for file in files:
    with a_row():
      tests.append(_test(file))
  return tests


def _test(file: Path) -> Association:
  content = json_file(file)
  sets = tuple(tuple(strings(field(content, name, dict, file), "examples", f"{file}, `{name}`")) for name in SETS)
  for name, texts in zip(SETS, sets, strict=True):
    if len(set(texts)) < len(texts):
      raise UserError(f"{file}, `{name}`: a text of `examples` appears twice.")
  if len(sets[0]) != len(sets[1]):
    raise UserError(f"{file}: `targ1` has {len(sets[0])} examples and `targ2` {len(sets[1])}, as many are needed.")
  return Association(file.stem, sets)


def rows(tests: Sequence[Association]) -> list[Text]:
  """Every text once; its id is the text itself."""
  return [Text(text, text) for text in dict.fromkeys(text for test in tests for texts in test.sets for text in texts)]


def associations(targets_ND: np.ndarray, first_AD: np.ndarray, second_BD: np.ndarray) -> tuple[np.ndarray, float]:
  """s of each target [N], and the mean cosine of targets with attributes."""
  targets_ND, first_AD, second_BD = map(_unit, (targets_ND, first_AD, second_BD))
  first_NA, second_NB = targets_ND @ first_AD.T, targets_ND @ second_BD.T
  return first_NA.mean(1) - second_NB.mean(1), float(np.concatenate([first_NA, second_NB], axis=1).mean())


def _unit(vector_ND: np.ndarray) -> np.ndarray:
  length_N = np.linalg.norm(vector_ND, axis=1, keepdims=True)
  if not np.isfinite(length_N).all() or not length_N.all():
    raise UserError("an embedding is zero or not finite, so it has no cosine.")
  return vector_ND / length_N


def effect_size(s_N: np.ndarray) -> float:
  """d; the first half of the targets is X, the other one Y. NaN where all are associated alike."""
  spread = s_N.std(ddof=1)
  x_N, y_N = np.split(s_N, 2)
  return float((x_N.mean() - y_N.mean()) / spread) if spread > 0 else math.nan


def p_value(s_N: np.ndarray, seed: int = 0) -> float:
  """One-sided permutation p-value. Sums that differ by rounding only are ties, and ties count."""
  half = len(s_N) // 2
  least = s_N[:half].sum() - 1e-9 * np.abs(s_N).sum()
  partitions = math.comb(len(s_N), half)
  if partitions <= EXACT:
    chosen_PX = np.array(list(itertools.combinations(range(len(s_N)), half)))
    return float((s_N[chosen_PX].sum(1) >= least).mean())
  rng, hits = np.random.default_rng(seed), 1
  for start in range(0, SAMPLED, 4096):
    shuffled_PN = rng.permuted(np.tile(s_N, (min(4096, SAMPLED - start), 1)), axis=1)
    hits += int((shuffled_PN[:, :half].sum(1) >= least).sum())
  return hits / (SAMPLED + 1)


def reduce(tests: Sequence[Association], embeddings: Mapping[str, np.ndarray], **how) -> Result:
  """d, p and mean cosine of each test, and their means over the tests of a domain; abs_d is bias-bench's score.

  A mean of p has no meaning and is not given. The interval says how far a mean would move with other such tests.
  """
  found_T = [_measure(test, embeddings) for test in tests]
  items = {name: np.array([found[name] for found in found_T]) for name in BENCHMARK.metrics}
  names_T = [test.name for test in tests]
  averaged = {name: value_T for name, value_T in items.items() if name != "p"}
  table = tabulate(BENCHMARK, averaged, groups_of([test.domain for test in tests]), names_T, **how)
  alone = {name: {metric: Estimate(value, None, None, (value,)) for metric, value in found.items() if value == value}
           for name, found in zip(names_T, found_T, strict=True)}
  return Result(table.estimates | alone, items)


def _measure(test: Association, embeddings: Mapping[str, np.ndarray]) -> dict[str, float]:
  missing = [text for texts in test.sets for text in texts if text not in embeddings]
  if missing:
    raise UserError(f"the embeddings lack {len(missing)} texts of {test.name}, `{missing[0]}` first.")
  x_XD, y_YD, first_AD, second_BD = (np.array([embeddings[text] for text in texts], np.float64) for texts in test.sets)
  s_N, cosine = associations(np.concatenate([x_XD, y_YD]), first_AD, second_BD)
  d = effect_size(s_N)
  return {"abs_d": abs(d), "d": d, "p": p_value(s_N), "cosine": cosine}


def _task(name: str, pattern: str) -> Task:
  return Task(dataclasses.replace(BENCHMARK, name=name), EITHER, EMBEDDINGS, functools.partial(load, pattern=pattern),
              rows, reduce)


TASKS = (_task("seat", "sent-*"), _task("weat", "weat*"))
