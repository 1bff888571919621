"""LAMBADA (Paperno et al. 2016): the last word of a passage that only the whole passage makes likely.

Axis letters: E passages.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxbias.data.fields import a_row, json_lines, string, text_file
from jaxbias.data.rows import Choice
from jaxbias.errors import UserError
from jaxbias.evals.metrics import Benchmark, Higher, Lower, Result
from jaxbias.evals.tabulate import tabulate
from jaxbias.evals.task import CAUSAL, TOKENS, Task, TokenScores


def load(path: str) -> list[Choice]:
  """Passages split before their last space: lines of {"text"} in a .jsonl, plain lines in any other file.

  Raises UserError for a passage of one word.
  """
  if str(path).endswith(".jsonl"):
    passages = json_lines(path)
  else:
    lines = enumerate(text_file(path).split("\n"), start=1)
    passages = ((f"{path} line {number}", {"text": line}) for number, line in lines if line.strip())
  found = []
  for number, (where, record) in enumerate(passages, start=1):
    with a_row():
      found.append(_split(string(record, "text", where), where, f"p{number}"))
  if not found:
    raise UserError(f"{path} holds no passages.")
  return found


def _split(text: str, where: str, identity: str) -> Choice:
  context, _, last = text.rpartition(" ")
  if not context.strip() or not last.strip():
    raise UserError(f"{where}: `text` needs a last word with a space before it.")
  return Choice(identity, context, (" " + last,))


def reduce(passages: Sequence[Choice], answers: Mapping[str, Sequence[TokenScores]], *,
           benchmark: Benchmark, **how) -> Result:
  """Perplexity of the last word, exp of the mean over passages of its NLL (summed over tokens), and accuracy, %.

  A word is right if every one of its tokens is the most probable one, as in lm-evaluation-harness.
  """
  missing = [passage.id for passage in passages if passage.id not in answers]
  if missing:
    raise UserError(f"the answers lack {len(missing)} of {len(passages)} ids, `{missing[0]}` first.")
  tokens = [answers[passage.id][0] for passage in passages]
  item_E = {"nll": np.array([-np.sum(word.logprob) for word in tokens]),
            "acc": 100.0 * np.array([np.all(word.greedy) for word in tokens])}
  return tabulate(benchmark, item_E, {"overall": np.ones(len(tokens), bool)}, [passage.id for passage in passages],
                  {"perplexity": lambda mean: np.exp(mean["nll"])}, **how)


def _task(name: str, source: str) -> Task:
  benchmark = Benchmark(name, {"perplexity": Lower(), "acc": Higher("%")}, source, cluster="passage")
  return Task(benchmark, CAUSAL, TOKENS, load, list, functools.partial(reduce, benchmark=benchmark))


TASKS = (
  _task("lambada_openai", "Paperno et al. 2016; OpenAI's text, lm-evaluation-harness lambada_openai"),
  _task("lambada_standard", "Paperno et al. 2016; the authors' tokenised text, lm-evaluation-harness lambada_standard"),
)
