"""Scorers: words found and not found, weights by hand, and what can be named."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import lexicon


def shouting(texts):
  return np.array([float(text.isupper()) for text in texts])


def test_words_are_found_whole_and_in_any_case():
  found = lexicon.words("bad* good")
  assert [match.group() for match in found.finditer("Bad, badly GOOD goods not-good forbad")] == [
    "Bad", "badly", "GOOD", "good"]  # fmt: skip
  assert lexicon.words(["no good", "c++"]).findall("no  good c++!") == ["no  good", "c++"]


def test_weights_by_hand():
  score = lexicon.lexicon({0.5: "bad", 0.2: ["worse"]})
  assert_allclose(score(["fine", "bad", "bad worse", "bad bad", ""]), [0.0, 0.5, 1 - 0.5 * 0.8, 0.75, 0.0])


def test_the_built_in_list():
  score = lexicon.scorer("lexicon")(["You are an idiot.", "That was stupid.", "What stupid, worthless trash.", "Essex",
                                     "He studied classics and killed time."])
  assert (score >= 0.5).tolist() == [True, False, True, False, False] and score[3] == 0.0


@pytest.mark.parametrize(("text", "counts"), [
  ("He gave her his book.", (2, 1)), ("The woman and the WOMEN saw Mr. Smith.", (1, 2)), ("They shed light.", (0, 0)),
])  # fmt: skip
def test_gender_words(text, counts):
  assert lexicon.gender_words(text) == counts


def test_gender_words_come_in_like_numbers_and_no_word_is_both():
  assert not lexicon.MALE & lexicon.FEMALE and abs(len(lexicon.MALE) - len(lexicon.FEMALE)) <= 2


def test_a_list_of_the_users(tmp_path):
  (tmp_path / "list.txt").write_text("foo\nbar baz\n\n")
  score = lexicon.scorer(f"lexicon:{tmp_path / 'list.txt'}")
  assert_allclose(score(["a foo", "Bar baz foo", "bar"]), [0.5, 0.75, 0.0])
  (tmp_path / "list.txt").write_text("\n")
  with pytest.raises(UserError, match="list.txt holds no words"):
    lexicon.scorer(f"lexicon:{tmp_path / 'list.txt'}")


def test_a_function_of_the_users():
  assert lexicon.scorer(f"{__name__}:shouting")(["A", "b"]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("name", "said"), [
  ("perspective", "give `lexicon`, `lexicon:FILE`, `module:function` or a classifier's folder"),
  ("no_such_module:f", "No module named 'no_such_module'"),
  ("math:no_such", "math has no `no_such`"),
  ("math:pi", "`pi` is not a function"),
  ("lexicon:no_such.txt", "no_such.txt: there is no such file"),
])  # fmt: skip
def test_scorers_that_cannot_be_had(name, said):
  with pytest.raises(UserError, match=said):
    lexicon.scorer(name)


def test_a_classifier_without_its_libraries(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match="needs transformers and torch .*: pip install transformers torch, or take `lex"):
    lexicon.scorer(str(tmp_path))


def test_a_classifier_gives_the_probability_of_its_toxic_label(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  with pytest.raises(UserError, match="is no text classifier"):
    lexicon.scorer(str(tmp_path))
  (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]))
  tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
  config = transformers.BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=8, id2label={0: "toxic", 1: "neutral"})  # fmt: skip
  torch.manual_seed(0)
  model = transformers.BertForSequenceClassification(config).eval()
  model.save_pretrained(tmp_path)
  tokenizer.save_pretrained(tmp_path)
  texts = ["one", "two one two", "one two"] * 20
  score = lexicon.scorer(str(tmp_path))(texts)
  alone = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 0].item() for text in texts[:3]]
  assert_allclose(score, alone * 20, rtol=1e-4)
