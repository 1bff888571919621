"""TOFU (Maini et al. 2024) and any files of its layout: was it forgotten, is the rest still there, does it leak?

A folder holds JSON lines of {"question", "answer", "paraphrased_answer", "perturbed_answer": [...]}:
forget*_perturbed.json, retain_perturbed.json, real_authors_perturbed.json and world_facts_perturbed.json; the last two
may lack the paraphrase. Beside them there may be holdout*.json ({"question", "answer"}, never trained on: membership
inference) and retain_model.json, what `as_retain_model` makes of a model trained on the retain set only (forget
quality, the reference attack, the leak against it). Metrics for which files are missing are left out.

Twenty questions in a row are about one author in the forget, retain and holdout sets; the bootstrap draws authors there
and questions elsewhere, each set apart. The `_eos` variants count the end-of-text token as an answer token, as the
published codes do: in losses and what is made of them (probabilities, ratios, three of the attacks). ROUGE is
unstemmed, so it and the utility that holds it are a little below those of the rouge_score package with its stemmer.

Axis letters: E questions, C clusters, K clusters of the holdout, R resamples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbias.data.fields import a_row, field, json_file, json_lines, string, strings
from jaxbias.data.rows import Choice, Prompt
from jaxbias.errors import UserError
from jaxbias.evals import stats, unlearning
from jaxbias.evals.metrics import Benchmark, Estimate, Higher, Ideal, Lower, Result
from jaxbias.evals.task import CAUSAL, TOKENS, TOKENS_AND_CONTINUATIONS, Task, TokenScores

KEPT = ("retain", "real_authors", "world_facts")  # what model utility is about
FILES = {"forget": "forget*_perturbed.json"} | {name: f"{name}_perturbed.json" for name in KEPT}
HOLDOUT, RETAIN_MODEL = "holdout*.json", "retain_model.json"
AN_AUTHOR = 20  # questions
ROUGE = "rouge_l_recall_unstemmed"


@dataclasses.dataclass(frozen=True)
class Question:
  """`right` is what the truth ratio holds against the `wrong` answers: the paraphrase, or the answer itself.

  `retained` are a retain-only model's values for this question, where they are known: truth_ratio, loss, leak_auc.
  """

  id: str
  set: str  # forget, retain, real_authors, world_facts, holdout
  cluster: str
  text: str
  answer: str
  right: str
  wrong: tuple[str, ...]
  retained: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def options(self) -> tuple[str, ...]:
    return (self.answer, *((self.right,) if self.right != self.answer else ()), *self.wrong)


def load(path: str, ended: bool = False) -> list[Question]:
  """TOFU's folder, or its forget file with the others beside it."""
  folder = Path(path) if Path(path).is_dir() else Path(path).parent
  files = {name: _only(folder, pattern) for name, pattern in FILES.items()}
  if Path(path).is_file():
    files["forget"] = Path(path)
  holdout = sorted(folder.glob(HOLDOUT))
  if holdout:
    files["holdout"] = _only(folder, HOLDOUT)
  retained = _retain_model(folder / RETAIN_MODEL, ended)
  questions = [question for name, file in files.items() for question in _read(name, file, retained)]
  known = [q for q in questions if q.set in ("forget", "holdout")]
  for key in ("truth_ratio", "loss"):
    lacking = [q.id for q in known if (key == "loss" or q.wrong) and key not in q.retained]
    if retained and lacking:
      raise UserError(f"{folder / RETAIN_MODEL}: `{key}` lacks {len(lacking)} ids, `{lacking[0]}` first.")
  return questions


def _only(folder: Path, pattern: str) -> Path:
  found = sorted(folder.glob(pattern))
  if len(found) != 1:
    names = ", ".join(path.name for path in found)
    raise UserError(f"{folder} holds {f'{len(found)} files' if found else 'no file'} {pattern}, one is needed"
                    + (f": name one of {names}." if found else "."))
  return found[0]


def _retain_model(file: Path, ended: bool) -> dict[str, dict[str, float]]:
  if not file.exists():
    return {}
  record = json_file(file)
  if record.get("ended", False) != ended:
    raise UserError(f"{file} was made {'without' if ended else 'with'} the end-of-text token in its losses; make it "
                    f"anew with the answers to `{'tofu_eos' if ended else 'tofu'}`, or evaluate the other variant.")
  values = {key: field(record, key, dict, file) for key in ("truth_ratio", "loss")}
  for key, of_id in values.items():
    wrong = [identity for identity, value in of_id.items() if not isinstance(value, int | float)]
    if wrong:
      raise UserError(f"{file}: `{key}` of `{wrong[0]}` has to be a number.")
  auc = record.get("leak_auc", 0.5)
  if not isinstance(auc, int | float) or not 0 <= auc < 1:
    raise UserError(f"{file}: `leak_auc` has to be a number from 0 to below 1.")
  return values | {"leak_auc": dict.fromkeys(values["loss"], auc)}


def _read(name: str, file: Path, retained: Mapping[str, Mapping[str, float]]) -> list[Question]:
  records = list(json_lines(file))
  if not records:
    raise UserError(f"{file} holds no questions.")
  by_author = name in ("forget", "retain", "holdout") and len(records) % AN_AUTHOR == 0
  found = []
  for number, (where, record) in enumerate(records):
    with a_row():
      identity, answer = f"{name}/{number + 1}", string(record, "answer", where)
      perturbed = () if name == "holdout" else tuple(strings(record, "perturbed_answer", where))
      paraphrase = "paraphrased_answer" in record or name in ("forget", "retain")
      right = string(record, "paraphrased_answer", where) if perturbed and paraphrase else answer
      found.append(Question(
        identity, name, f"{name}/{number // AN_AUTHOR if by_author else number}", string(record, "question", where),
        answer, right, perturbed,
        {key: of_id[identity] for key, of_id in retained.items() if identity in of_id}))  # fmt: skip
  return found


def rows(questions: Sequence[Question], generate: bool, ended: bool = False) -> list[Choice | Prompt]:
  """Every answer after its question; with `generate` the greedy continuations that ROUGE reads, but for the holdout.

  ended: the end-of-text token is every answer's last one.
  """
  context = {q.id: f"Question: {q.text}\nAnswer:" for q in questions}
  asked = [Choice(q.id, context[q.id], tuple(" " + option for option in q.options), ended=ended)
           for q in questions]
  return asked + [Prompt(f"{q.id}/greedy", context[q.id], max_tokens=200, stop=("\n",))
                  for q in questions if generate and q.set != "holdout"]


def items(questions: Sequence[Question], answers: Mapping[str, Any], ended: bool = False) -> list[dict[str, float]]:
  """Each question's measures, by name. `ratio` is the raw truth ratio, `truth_ratio` what is averaged of it."""
  missing = [q.id for q in questions if q.id not in answers]
  if missing:
    raise UserError(f"the answers lack {len(missing)} of {len(questions)} ids, `{missing[0]}` first.")
  return [_measures(q, answers[q.id], answers.get(f"{q.id}/greedy"), ended) for q in questions]


def _measures(
  q: Question, tokens: Sequence[TokenScores], greedy: Sequence[str] | None, ended: bool
) -> dict[str, float]:
  losses = [unlearning.loss(option) for option in tokens]
  first_wrong = len(q.options) - len(q.wrong)
  right, wrong = losses[first_wrong - 1], losses[first_wrong:]
  found = unlearning.attacks(tokens[0], q.answer, q.retained.get("loss"), ended=ended)
  if q.wrong:
    ratio = unlearning.truth_ratio(right, wrong)
    found["ratio"] = ratio
    found["truth_ratio"] = min(ratio, 1 / (ratio + unlearning.EPSILON)) if q.set == "forget" else max(0.0, 1 - ratio)
  plain = q.set in ("forget", "retain", "holdout")
  found["probability"] = float(np.exp(-losses[0])) if plain else unlearning.normalised_probability(right, wrong)
  answer = unlearning.words(tokens[0], ended)
  found["exact_memorization"] = unlearning.exact_memorization(answer)
  found["extraction_strength"] = unlearning.extraction_strength(answer)
  if greedy is not None:
    found[ROUGE] = unlearning.rouge_l_recall(q.answer, greedy[0])
  return found


def reduce(questions: Sequence[Question], answers: Mapping[str, Any], ended: bool = False, **how) -> Result:
  """All that the files allow, in one group; `items` are `<set>_<measure>`. `how` goes to `stats.bootstrap_interval`."""
  measured = items(questions, answers, ended)
  of_set = {name: [e for e, q in enumerate(questions) if q.set == name] for name in (*FILES, "holdout")}
  value_E = {f"{name}_{measure}": np.array([measured[e][measure] for e in places])
             for name, places in of_set.items() if places for measure in measured[places[0]]}
  cluster = {name: [questions[e].cluster for e in places] for name, places in of_set.items()}
  found = {f"{name}_{measure}": stats.mean_over_examples(value_E[f"{name}_{measure}"], cluster[name], **how)
           for name in FILES for measure in ("probability", "truth_ratio", ROUGE) if f"{name}_{measure}" in value_E}
  for measure in ("exact_memorization", "extraction_strength"):
    found[measure] = stats.mean_over_examples(value_E[f"forget_{measure}"], cluster["forget"], **how)
  if all(f"{name}_{ROUGE}" in value_E for name in KEPT):
    found["model_utility_unstemmed"] = _utility(value_E, cluster, how)
  retained = questions[of_set["forget"][0]].retained
  if retained:
    p = unlearning.same_distribution(value_E["forget_ratio"],
                                     [questions[e].retained["truth_ratio"] for e in of_set["forget"]])
    found["forget_quality"], found["log10_forget_quality"] = (
      Estimate(value, None, None, (value,)) for value in (p, float(np.log10(max(p, np.finfo(float).tiny)))))
  if of_set["holdout"]:
    leak = functools.partial(unlearning.privacy_leak, retained=retained.get("leak_auc", 0.5))
    attacks = [name for name in unlearning.ATTACKS if f"holdout_{name}" in value_E]
    found |= {f"auc_{name}": _auc(name, value_E, cluster, how) for name in attacks}
    found["privacy_leak"] = _auc("min_k", value_E, cluster, how, leak)
  return Result({"overall": found}, value_E)


def _utility(value_E: Mapping[str, np.ndarray], cluster: Mapping[str, Sequence[str]], how: dict) -> Estimate:
  """Model utility: the harmonic mean of probability, truth ratio and ROUGE on the three kept sets (Maini et al.)."""
  sums = {(name, measure): stats.by_cluster(value_E[f"{name}_{measure}"][None], cluster[name])
          for name in KEPT for measure in ("probability", "truth_ratio", ROUGE)}

  def statistic(*count_RC: np.ndarray) -> np.ndarray:
    count_of = dict(zip(KEPT, count_RC, strict=True))
    return unlearning.harmonic_mean([stats.cluster_ratio(count_of[name], *sums[name, measure])
                                     for name, measure in sums])

  return stats.bootstrap_interval(statistic, [len(set(cluster[name])) for name in KEPT], **how)


def _auc(attack: str, value_E: Mapping[str, np.ndarray], cluster: Mapping[str, Sequence[str]], how: dict,
         of_auc=lambda auc: auc) -> Estimate:
  """How often a held-out answer scores above a forgotten one, by clusters of both, or a function of it."""
  above = unlearning.higher(value_E[f"holdout_{attack}"], value_E[f"forget_{attack}"])
  above_KC, size_C = stats.by_cluster(above, cluster["forget"])
  above_CK, size_K = stats.by_cluster(above_KC.T, cluster["holdout"])

  def statistic(count_RC: np.ndarray, count_RK: np.ndarray) -> np.ndarray:
    wins_R = np.sum(count_RC @ above_CK * count_RK, axis=1)
    return of_auc(wins_R / (count_RC @ size_C) / (count_RK @ size_K))[:, None]

  return stats.bootstrap_interval(statistic, (len(size_C), len(size_K)), **how)


def as_retain_model(
  questions: Sequence[Question], answers: Mapping[str, Any], ended: bool = False
) -> dict[str, Any]:
  """What retain_model.json holds, from the answers of a model that never saw the forget set; it serves the variants
  that are `ended` alike."""
  measured = {q.id: found for q, found in zip(questions, items(questions, answers, ended), strict=True)
              if q.set in ("forget", "holdout")}
  record = {"truth_ratio": {identity: found["ratio"] for identity, found in measured.items() if "ratio" in found},
            "loss": {identity: found["loss"] for identity, found in measured.items()}, "ended": ended}
  leak = {name: [found["min_k"] for identity, found in measured.items() if identity.startswith(name)]
          for name in ("holdout", "forget")}
  return record | ({"leak_auc": float(unlearning.higher(*leak.values()).mean())} if leak["holdout"] else {})


def _metrics(generate: bool) -> dict:
  kept = {f"{name}_{measure}": Higher() for name in KEPT for measure in ("probability", "truth_ratio")}
  rouge = {f"forget_{ROUGE}": Lower(), **{f"{name}_{ROUGE}": Higher() for name in KEPT},
           "model_utility_unstemmed": Higher()}  # fmt: skip
  return {
    "forget_quality": Higher(), "log10_forget_quality": Higher(),
    "forget_truth_ratio": Higher(), "forget_probability": Lower(), "exact_memorization": Lower(),
    "extraction_strength": Lower(), **kept, **(rouge if generate else {}),
    **{f"auc_{name}": Ideal(0.5) for name in unlearning.ATTACKS}, "privacy_leak": Ideal(0.0, "%"),
  }  # fmt: skip


def _task(name: str, generate: bool, ended: bool) -> Task:
  benchmark = Benchmark(name, _metrics(generate), "Maini et al. 2024; formulas of open-unlearning (Dorna et al. 2025); "
                        f"the end-of-text token is {'an' if ended else 'no'} answer token",
                        cluster="author (forget, retain, holdout) or question")
  bind = functools.partial
  return Task(benchmark, CAUSAL, TOKENS_AND_CONTINUATIONS if generate else TOKENS, bind(load, ended=ended),
              bind(rows, generate=generate, ended=ended), bind(reduce, ended=ended))


TASKS = (
  _task("tofu", generate=True, ended=False), _task("tofu_likelihood", generate=False, ended=False),
  _task("tofu_eos", generate=True, ended=True), _task("tofu_likelihood_eos", generate=False, ended=True),
)  # fmt: skip
