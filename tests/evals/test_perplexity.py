"""Perplexities by hand, the texts of each variant, and the real WikiText-2 in both of its layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import perplexity
from jaxbias.evals.perplexity import Document

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/capability"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="WikiText-2 is not beside the repository")
TASKS = {task.name: task for task in perplexity.TASKS}
LINES = [" ", " = First = ", " ", " Text ( of it ) , 1 @,@ 000 @.@ 5 . ", " = = Part = = ", " ", " = Second = ",
         " End . "]  # fmt: skip


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
  """The same lines as a plain text and as Hugging Face's rows."""
  plain, rows = tmp_path / "wiki.txt", tmp_path / "wiki.jsonl"
  plain.write_text("".join(line + "\n" for line in LINES))
  rows.write_text("".join(json.dumps({"text": f"{line}\n" if line.strip() else ""}) + "\n" for line in LINES))
  return str(plain), str(rows)


def test_by_hand():
  documents = [Document("a", "", words=3, bytes=10), Document("b", "", words=5, bytes=30)]
  found = TASKS["text_file"].reduce(documents, {"a": [[-6.0, 2]], "b": [[-10.0, 6]]})
  value = {name: estimate.value for name, estimate in found.estimates["overall"].items()}
  assert_allclose(value["perplexity"], np.exp(16 / 8))
  assert_allclose(value["word_perplexity"], np.exp(16 / 8))
  assert_allclose(value["byte_perplexity"], np.exp(16 / 40))
  assert_allclose(value["bits_per_byte"], 16 / 40 / np.log(2))
  assert_allclose(np.log2(value["byte_perplexity"]), value["bits_per_byte"])
  assert found.items["nll"].tolist() == [6.0, 10.0]
  alone = TASKS["text_file"].reduce(documents[:1], {"a": [[-6.0, 2]]}).estimates["overall"]["perplexity"]
  assert alone.low is None and alone.value == np.exp(3.0)


def test_articles_are_cut_at_their_headings_and_read_as_prose(files):
  first, second = perplexity.articles(files[0])
  assert first.text == " = First =\n\nText (of it), 1,000.5.\n== Part ==\n"
  assert second.text == " = Second =\nEnd.\n"
  assert (second.words, second.bytes) == (7, len(" = Second = \n End . \n"))


def test_both_layouts_of_wikitext_are_one(files):
  plain, rows = files
  assert perplexity.articles(plain) == perplexity.articles(rows)
  assert perplexity.joined(plain) == perplexity.joined(rows)
  assert perplexity.joined(rows)[0].text == "\n\n".join(json.loads(line)["text"] for line in open(rows))


@pytest.mark.parametrize(("spaced", "prose"), [
  ("a well @-@ known fact", "a well-known fact"), ("so : a ; b , c . Yes ! No ? ", "so: a; b, c. Yes! No? "),
  ("( a [ b ] { c } )", "(a [b] {c})"), ('he said " so " .', 'he said "so" .'), ("dogs ' bones", "dogs' bones"),
  ("dogs ' own cat 's", "dogs'own cat's"),  # a fault of the rules: two apostrophes are taken for quotes
  ("40 ° C", "40°C"), ("= = = = X = = = =", "==== X ===="), ("a \n b", "a\nb"), (" N ", " 1 "),
])  # fmt: skip
def test_detokenising(spaced, prose):
  assert perplexity.detokenise(spaced) == prose


def test_windows_of_the_variants(files):
  def window(name):
    (row, *_) = TASKS[name].rows(TASKS[name].load(files[1]))
    return row.window, row.stride, row.prefixed

  assert window("wikitext2_biasbench") == (992, 992, False)
  assert window("wikitext2_disjoint") == (1024, 1024, False)
  assert window("wikitext2_strided") == (1024, 512, False)
  assert window("wikitext_lmeval") == window("text_file") == (0, 0, True)


def test_a_text_file_is_cut_between_lines_and_nothing_is_lost(tmp_path):
  text = "".join(f"Line number {number} of the text.\n" for number in range(500))
  (tmp_path / "text.txt").write_text(text)
  documents = perplexity.passages(str(tmp_path / "text.txt"))
  assert len(documents) == 4 and "".join(document.text for document in documents) == text
  assert all(document.text.endswith("\n") for document in documents)
  assert all(perplexity.PASSAGE <= len(document.text) < perplexity.PASSAGE + 40 for document in documents[:-1])


def test_malformed_files(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"text": "a"}\n{"txt": "b"}\n')
  with pytest.raises(UserError, match=r"rows.jsonl line 2: `text` is missing."):
    perplexity.joined(str(path))
  path.write_text('{"text": ""}\n')
  with pytest.raises(UserError, match="holds no text"):
    perplexity.articles(str(path))
  (tmp_path / "empty.txt").write_text("\n\n")
  with pytest.raises(UserError, match="holds no text"):
    perplexity.passages(str(tmp_path / "empty.txt"))


@needs_data
def test_the_real_wikitext():
  plain, rows = (str(DATA / name) for name in ("wikitext2_raw_test.txt", "wikitext2_raw_test_rows.jsonl"))
  articles = perplexity.articles(rows)
  assert len(articles) == 62 and articles == perplexity.articles(plain)
  assert (sum(a.words for a in articles), sum(a.bytes for a in articles)) == (241_335, 1_290_527)
  assert len(perplexity.joined(rows)[0].text) == 1_294_336
