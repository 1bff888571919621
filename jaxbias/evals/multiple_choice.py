"""Multiple choice by likelihood: PIQA, CommonsenseQA, OpenBookQA, MMLU as subsets, and any file of their layout.

Each option is read after the question, as a text of its own (cloze), not as a letter. Figures are of the very file they
were taken on: a reformatted subset is not comparable with what others print for the whole set.

Axis letters: E questions, O options.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from jaxbias.data.fields import a_row, json_lines, string
from jaxbias.data.rows import Choice
from jaxbias.errors import UserError
from jaxbias.evals.metrics import Benchmark, Higher, Neutral, Result, Scores, score_array
from jaxbias.evals.tabulate import tabulate
from jaxbias.evals.task import CAUSAL, SCORES, Task

METRICS = {"acc": Higher("%"), "acc_norm": Higher("%"), "acc_bytes": Higher("%"), "chance": Neutral("%"),
           "ties": Neutral("%")}
QUESTION_ANSWER = "Question: {}\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Question:
  """`right` marks the options that are right: one, and any other of the same words."""

  id: str
  text: str
  options: tuple[str, ...]
  right: tuple[bool, ...]


def load(path: str) -> list[Question]:
  """Lines of {"question", "options": "A. ...\\nB. ...", "answer": "B. ..."}.

  A question that swallowed its first options is mended. Raises UserError for letters out of order, fewer than two
  options, an empty one, or an answer that is not among them.
  """
  questions = []
  for number, (where, record) in enumerate(json_lines(path), start=1):
    with a_row():
      questions.append(_question(record, where, f"q{number}"))
  if not questions:
    raise UserError(f"{path} holds no questions.")
  return questions


def _question(record: object, where: str, identity: str) -> Question:
  whole = string(record, "question", where) + "\n" + string(record, "options", where).strip("\n")
  text, first, rest = whole.rpartition("\nA. ")
  parts = re.split(r"\n([A-Z])\.(?=\s)", first + rest)[1:]
  letters, options = parts[::2], [" ".join(option.split()) for option in parts[1::2]]
  if len(options) < 2 or letters != [chr(ord("A") + i) for i in range(len(letters))]:
    raise UserError(f"{where}: `options` has to be lines that begin with `A. `, `B. ` and so on, two at least.")
  if not text.strip() or not all(options):
    raise UserError(f"{where}: the question or one of its `options` is empty.")
  letter, _, words = string(record, "answer", where).partition(".")
  if letter not in letters or not options[letters.index(letter)].startswith(" ".join(words.split())):
    raise UserError(f"{where}: `answer` is not one of the `options`.")
  right = options[letters.index(letter)]
  return Question(identity, text.strip(), tuple(options), tuple(option == right for option in options))


def rows(questions: Sequence[Question], prompt: str = QUESTION_ANSWER) -> list[Choice]:
  """`prompt` takes the question's text; the options follow after a space."""
  return [Choice(q.id, prompt.format(q.text), tuple(" " + option for option in q.options)) for q in questions]


def reduce(questions: Sequence[Question], scores: Scores, *, benchmark: Benchmark, **how) -> Result:
  """Accuracy, %: the most likely option is right (`acc`), or the most likely by character (`acc_norm`) or by UTF-8 byte
  (`acc_bytes`) of its text.

  As lm-evaluation-harness counts: lengths without the space before it, the first of several equal ones. `ties` is how
  often the two most likely options are equal, `chance` what a blind guess gets.
  """
  items = {name: [] for name in METRICS}
  for q in questions:
    score_O = score_array([q.id], scores, len(q.options))[0, :, 0]
    length_O = {"acc": 1, "acc_norm": [len(option) for option in q.options],
                "acc_bytes": [len(option.encode()) for option in q.options]}
    for name, length in length_O.items():
      items[name].append(q.right[int((score_O / length).argmax())])
    items["chance"].append(np.mean(q.right))
    items["ties"].append(np.sum(score_O == score_O.max()) > 1)
  item_E = {name: 100.0 * np.array(values, float) for name, values in items.items()}
  return tabulate(benchmark, item_E, {"overall": np.ones(len(questions), bool)}, [q.id for q in questions], **how)


def _task(name: str, source: str, prompt: str = QUESTION_ANSWER) -> Task:
  benchmark = Benchmark(name, METRICS, source, cluster="question")
  return Task(benchmark, CAUSAL, SCORES, load, functools.partial(rows, prompt=prompt),
              functools.partial(reduce, benchmark=benchmark))


TASKS = (
  _task("piqa_cloze", "Bisk et al. 2020; prompt of lm-evaluation-harness piqa"),
  _task("openbookqa_cloze", "Mihaylov et al. 2018; prompt of lm-evaluation-harness openbookqa", "{}"),
  _task("commonsenseqa_cloze", "Talmor et al. 2019; options as texts, not letters"),
  _task("mmlu_cloze", "Hendrycks et al. 2021; options as texts, not letters"),
)
