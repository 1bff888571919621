"""Perplexity of running text, under the windows that published figures use; never compared between tokenizers.

The same model has another perplexity in each variant, and per word another than per token; bits per byte is what
models of different vocabularies share. Words and bytes are those of the text as it was given.

Axis letters: E documents.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxbias.data.fields import field, json_lines, text_file
from jaxbias.data.rows import Running
from jaxbias.errors import UserError
from jaxbias.evals.metrics import Benchmark, Lower, Result, Scores, score_array
from jaxbias.evals.tabulate import tabulate
from jaxbias.evals.task import CAUSAL, SCORES, Task

FORMULAS = {  # of means over documents; words and bytes are the original's
  "perplexity": lambda mean: np.exp(mean["nll"] / mean["tokens"]),
  "word_perplexity": lambda mean: np.exp(mean["nll"] / mean["words"]),
  "byte_perplexity": lambda mean: np.exp(mean["nll"] / mean["bytes"]),
  "bits_per_byte": lambda mean: mean["nll"] / mean["bytes"] / np.log(2.0),
}
PASSAGE = 4096  # characters at least, unless the text ends


@dataclasses.dataclass(frozen=True)
class Document:
  """What the model reads, and how many words and UTF-8 bytes its original has."""

  id: str
  text: str
  words: int
  bytes: int

  @classmethod
  def of(cls, identity: str, original: str, text: str | None = None) -> Document:
    """Words are counted as lm-evaluation-harness does: an empty one before a leading space, and after a last one."""
    return cls(identity, original if text is None else text, len(re.split(r"\s+", original)), len(original.encode()))


def wikitext_lines(path: str) -> list[str]:
  """WikiText's lines without their ends: a plain .txt, or Hugging Face's rows in a .jsonl, whose blank ones are "".

  Raises UserError for a row without `text`, or a file of blank lines.
  """
  if Path(path).suffix == ".jsonl":
    lines = [field(record, "text", str, where).removesuffix("\n") or " " for where, record in json_lines(path)]
  else:
    lines = text_file(path).removesuffix("\n").split("\n")
  if not any(map(str.strip, lines)):
    raise UserError(f"{path} holds no text.")
  return lines


def joined(path: str) -> list[Document]:
  """WikiText-2, raw, as a .txt or Hugging Face's rows in a .jsonl; one string, as the recipe joins the rows.

  Blank rows are empty, the others end in a line.
  """
  rows = [line + "\n" if line.strip() else "" for line in wikitext_lines(path)]
  return [Document.of("text", "\n\n".join(rows))]


def articles(path: str) -> list[Document]:
  """WikiText as a .txt or Hugging Face's rows in a .jsonl; by article, detokenised.

  An article begins at each heading of the first level, `= Title =`.
  """
  pages: list[list[str]] = [[]]
  for line in wikitext_lines(path):
    if re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()):
      pages.append([])
    pages[-1].append(line)
  pages[-1].append("")  # the file's last line has an end
  texts = ["\n".join(page) for page in pages]
  return [Document.of(f"article{number}", text, detokenise(text))
          for number, text in enumerate(filter(str.strip, texts), start=1)]


_BEFORE = ((r"s '", "s'"), (r" @([-,.])@ ", r"\1"))
_AFTER = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (r" ° ", "°"), (r" \n", "\n"), (r"\n ", "\n"),
          (" N ", " 1 "), (" 's", "'s"))
_SPACED = ":;.!?,"  # no space before, one behind
_PAIRED = ("()", "[]", "{}", '""', "''")  # no space inside


def detokenise(page: str) -> str:
  """WikiText's spaced tokens as prose, by the rules, and in the order, of lm-evaluation-harness' `wikitext`."""
  inside = [(rf"{re.escape(a)}\s*([^{re.escape(b)}]*?)\s*{re.escape(b)}", rf"{a}\1{b}") for a, b in _PAIRED]
  spaced = [(f" {re.escape(mark)} ", f"{mark} ") for mark in _SPACED]
  for pattern, written in (*_BEFORE, *spaced, *inside, *_AFTER):
    page = re.sub(pattern, written, page)
  return page


def passages(path: str) -> list[Document]:
  """Any text file, in passages of whole lines, each read on its own: the bootstrap draws them."""
  found = [""]
  for line in text_file(path).splitlines(keepends=True):
    if len(found[-1]) >= PASSAGE:
      found.append("")
    found[-1] += line
  texts = [text for text in found if text.strip()]
  if not texts:
    raise UserError(f"{path} holds no text.")
  return [Document.of(f"passage{number}", text) for number, text in enumerate(texts, start=1)]


def rows(documents: Sequence[Document], **window) -> list[Running]:
  return [Running(document.id, document.text, **window) for document in documents]


def reduce(documents: Sequence[Document], scores: Scores, *, benchmark: Benchmark, **how) -> Result:
  """exp of the NLL of all documents together per predicted token, word and byte; bits are nats / log 2.

  The interval draws documents; one document has none.
  """
  logprob_E, token_E = np.moveaxis(score_array([document.id for document in documents], scores, 1)[:, 0], -1, 0)
  item_E = {"nll": -logprob_E, "tokens": token_E, "words": np.array([document.words for document in documents]),
            "bytes": np.array([document.bytes for document in documents])}
  return tabulate(benchmark, item_E, {"overall": np.ones(len(documents), bool)},
                  [document.id for document in documents], FORMULAS, **how)


def _task(name: str, source: str, load, cluster: str, **window) -> Task:
  benchmark = Benchmark(name, {metric: Lower() for metric in FORMULAS}, source, cluster)
  return Task(benchmark, CAUSAL, SCORES, load, functools.partial(rows, **window),
              functools.partial(reduce, benchmark=benchmark))


# bias-bench and the recipe give each window the weight of all its tokens though its first is not predicted; here each
# predicted token weighs the same, which shifts the last window's weight by less than 1e-6.
TASKS = (
  _task("wikitext2_biasbench", "Meade et al. 2022; McGill-NLP/bias-bench, WikiText-2 in windows of 1024 - 32", joined,
        "none", window=992, stride=992, prefixed=False),
  _task("wikitext2_disjoint", "Hugging Face, Perplexity of fixed-length models: window 1024, stride 1024", joined,
        "none", window=1024, stride=1024, prefixed=False),
  _task("wikitext2_strided", "Hugging Face, Perplexity of fixed-length models: window 1024, stride 512", joined,
        "none", window=1024, stride=512, prefixed=False),
  _task("wikitext_lmeval", "lm-evaluation-harness wikitext: articles, rolling windows", articles, "article"),
  _task("text_file", "ours: passages of any text file", passages, f"passage of {PASSAGE} characters"),
)
