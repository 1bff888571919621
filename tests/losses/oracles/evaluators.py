"""Fairness-NC's evaluators: ICAT, StereoSet, WinoBias's F1, Bias-NLI, Bias in Bios, BEC-Pro's association."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxbias.data.rows import Triple
from jaxbias.evals import bias_in_bios, bias_nli, lpbs, stereoset, winobias
from jaxbias.evals.metrics import Result
from tests.losses.oracles.case import Case
from tests.losses.oracles.collapse import NC

EXACT = {"absolute": 1e-9}
LABELS = ("stereotype", "anti-stereotype", "unrelated")
DRAWS = {"draws": 2}


def overall(result: Result, *metrics: str) -> list[float]:
  return [result.estimates["overall"][metric].value for metric in metrics]


def evaluators() -> Iterator[Case]:
  for case in NC["H_eval_formulas"]["icat"]:
    yield Case("nc H: ICAT", lambda case=case: stereoset.icat(case["lm"], case["ss"]), case["icat"], **EXACT)
  for case in NC["H_eval_formulas"]["winobias"]:
    yield Case(f"nc H: WinoBias, F1 of {case['correct']} / {case['n']}",
               lambda case=case: winobias.f1(100.0 * case["correct"] / case["n"]), 100.0 * case["f1"], **EXACT)
  yield from scored()
  nli = NC["J_bias_nli"]
  neutrality = lambda: [v.mean() / 100 for v in bias_nli.neutrality(nli["inputs"]["logits"]).values()]
  expected = [nli["expected"][key] for key in ("NN", "FN", "T05", "T07")]
  yield Case("nc J: Bias-NLI, NN, FN, T:0.5, T:0.7", neutrality, expected, absolute=1e-6)  # of float32 probabilities
  bios, metrics = NC["K_bias_in_bios"], ("acc", "acc_male", "acc_female", "gap", "tpr_rms_published")
  expected = [bios["expected"][k] * (1 if k == "tpr_gap_points" else 100)
              for k in ("acc", "acc_m", "acc_f", "tpr_gap_points", "tpr_rms")]  # fmt: skip
  yield Case("nc K: Bias in Bios, accuracies, gap, RMS of gaps", lambda: overall(bios_result(), *metrics), expected,
             **EXACT)  # fmt: skip
  for number, case in enumerate(NC["M_bec_association"]["examples"]):
    yield Case(f"nc M: association {number}", lambda case=case: association(case["p_target"], case["p_prior"]),
               case["assoc"], **EXACT)  # fmt: skip


def scored() -> Iterator[Case]:
  case = NC["I_stereoset_scorer"]
  triples = [Triple(str(i), "gender", row["target"], "", ("", "", ""), 0) for i, row in enumerate(case["inputs"])]
  probabilities = np.array([[row[label] for label in LABELS] for row in case["inputs"]])
  result = lambda: stereoset.reduce(triples, np.log(probabilities), **DRAWS)
  for metric, key in (("lms", "LM Score"), ("ss", "SS Score"), ("icat", "ICAT Score")):
    yield Case(f"nc I: StereoSet, {key}", lambda metric=metric: overall(result(), metric)[0], case["repo"][key],
               **EXACT)  # fmt: skip
  ties = lambda: stereoset.outcomes(np.zeros((1, 1, 3)))
  yield Case("nc I: a tie is anti-stereotypical, and unrelated", lambda: [ties()["ss"][0, 0], ties()["lms"][0, 0]],
             [0.0, 0.0], **EXACT)  # fmt: skip


def bios_result() -> Result:
  given = NC["K_bias_in_bios"]["inputs"]
  genders = [{"M": "male", "F": "female"}[gender] for gender in given["gender"]]
  ids = [str(i) for i in range(len(genders))]
  return bias_in_bios.gaps(given["correct"], [str(o) for o in given["occupation"]], genders, ids, **DRAWS)


def association(target: float, prior: float) -> float:
  """Of one man beside a woman who is as likely with her occupation as without."""
  people = [lpbs.Sentence(str(i), f"{who} is a nurse.", who, gender, "nurse", "female", "t")
            for i, (who, gender) in enumerate((("He", "male"), ("She", "female")))]  # fmt: skip
  probability = {people[0].masked: (target, 0.5), people[0].prior(1): (prior, 0.5)}
  scores = {row.id: [[np.log(p), 1] for p in probability[row.text]] for row in lpbs.masked_rows(people)}
  return overall(lpbs.reduce_bec_pro(people, scores, **DRAWS), "male")[0]
