"""Counterfactual texts: the swap, what it cannot do, and the corpora made of it."""

from __future__ import annotations

import collections
import itertools
import json
import re
from pathlib import Path

import pytest

from jaxbias.data import corpora, swap
from jaxbias.data.corpora import Pool, disjoint, make
from jaxbias.data.rows import Text
from jaxbias.data.swap import PAIRS, PRONOUNS, Swapper, read_pairs, role
from jaxbias.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
BIAS_BENCH = SHARED / "wordlists" / "bias_bench_bias_attribute_words.json"
SWAP = Swapper()


@pytest.mark.parametrize("text,swapped", [
  ("He saw her.", "She saw him."),
  ("I saw her in the park.", "I saw him in the park."),
  ("Her mother called HER uncle, and she told her to wait.", "His father called HIS aunt, and he told him to wait."),
  ("The book is hers; his is on the table.", "The book is his; hers is on the table."),
  ("A friend of his, Mr. Smith's son.", "A friend of hers, Mrs. Smith's daughter."),
  ("They made her happily wait, then let her leaving friends go.", "They made him happily wait, then let him leaving "
   "friends go."),
  ("She lost her 2 keys and her “best” coat.", "He lost his 2 keys and his “best” coat."),
  ("he's here, she'll go: himself!", "she's here, he'll go: herself!"),
  ("The theme of shelter, hereby.", "The theme of shelter, hereby."),
  ("A NURSE SAID HE WAS A GENTLEMAN", "A NURSE SAID SHE WAS A LADY"),
])  # fmt: skip
def test_sentences(text, swapped):
  assert SWAP(text) == swapped


def test_the_map_is_its_own_inverse_on_every_word_and_role():
  words = [word for pair in PAIRS for word in pair]
  assert len(set(words)) == len(words) == 2 * len(PAIRS) and all(word == word.lower() for word in words)
  assert {"him", "his", "her", "hers"}.isdisjoint(words) and swap.UNPAIRED.isdisjoint(words)
  assert all(SWAP(SWAP(word)) == word != SWAP(word) for word in words)
  assert all(PRONOUNS[PRONOUNS[word, r], r] == word for word, r in PRONOUNS)
  for text in ("his coat", "her coat", "saw him.", "saw her.", "It is hers.", "It is his."):
    assert SWAP(SWAP(text)) == text != SWAP(text)


@pytest.mark.parametrize("word,shape", [("he", "she"), ("He", "She"), ("HE", "SHE"), ("Mr", "Mrs"), ("BOYS", "GIRLS")])
def test_case_is_kept(word, shape):
  assert SWAP(f"so {word}, too") == f"so {shape}, too"


def test_pairs_that_share_a_word_are_refused():
  with pytest.raises(UserError, match="`lady` is in 2 pairs"):
    Swapper((("lord", "lady"), ("gentleman", "lady")))


@pytest.mark.skipif(not BIAS_BENCH.exists(), reason="bias-bench's word list is not in ../shared")
def test_the_published_list_loses_nine_words():
  legacy = Swapper(read_pairs(BIAS_BENCH), legacy=True)
  words = {word for pair in read_pairs(BIAS_BENCH) for word in pair}
  assert len(words) == 105
  lost = {word for word in words if legacy(legacy(word)) != word}
  assert lost == {"boy", "boys", "gal", "gals", "gentleman", "gentlemen", "him", "ma'am", "mrs."}
  assert lost.isdisjoint(legacy.partners[word] for word in words)  # never produced at all
  assert {legacy(word) for word in ("boy", "him", "ma'am")} == {"girl", "her", "sir"} and legacy("her") == "his"
  assert legacy("I saw her, and He saw (him) .") == "I saw his, and He saw (him) ."  # no role, no capital, no bracket
  with pytest.raises(UserError, match="in . pairs"):
    Swapper(read_pairs(BIAS_BENCH))


def gold_of(path: Path) -> tuple[int, int]:
  """Of the masculine pronouns in a text: how many there are, and how many the rule would not find behind `her`."""
  text = path.read_text(encoding="utf-8")
  found = [(f, text[f.start : f.end].lower()) for f in SWAP.found(text)]
  gold = [("object" if word == "him" else "noun", f) for f, word in found if word in ("him", "his")]
  feminine = SWAP(text)
  twins = dict(zip((f.start for f, _ in found), SWAP.found(feminine), strict=True))
  expected = {"object": "him", "noun": "his"}
  wrong = 0
  for kind, f in gold:
    twin = twins[f.start]
    wrong += feminine[twin.start : twin.end].lower() == "hers" or twin.partner != expected[kind]
  return len(gold), wrong


@pytest.mark.parametrize("file,pronouns,most", [
  ("wikitext2_raw_test.txt", 1420, 0.035), ("austen_pride_and_prejudice.txt", 2035, 0.08)])
def test_the_error_rate_on_running_text(file, pronouns, most):
  """him and his need no rule, so that text about men says how often `her` in the same places would be misread. A `his`
  that truly stands alone is counted as an error here, which makes these upper bounds."""
  path = SHARED / "capability" / file
  if not path.exists():
    pytest.skip(f"{file} is not in ../shared")
  found, wrong = gold_of(path)
  assert found == pronouns and 0 < wrong / found < most


def test_the_error_rate_on_winobias():
  """Sentences in which one pronoun alone differs; what is right is in the other version."""
  folder = SHARED / "winobias"
  if not folder.exists():
    pytest.skip("WinoBias is not in ../shared")
  pronoun = re.compile(r"\[(he|she|him|his|her)\]", re.IGNORECASE)
  total, wrong = collections.Counter(), collections.Counter()
  for kind, part in itertools.product(("type1", "type2"), ("dev", "test")):
    lines = [(folder / f"{side}_stereotyped_{kind}.txt.{part}").read_text().splitlines() for side in ("pro", "anti")]
    for pair in zip(*lines, strict=False):
      bare = [re.sub(r"^\d+ ", "", line) for line in pair]
      marks = [pronoun.search(line) for line in bare]
      if not all(marks) or pronoun.sub("", bare[0]) != pronoun.sub("", bare[1]):
        continue
      for line, mark, other in zip(bare, marks, reversed(marks), strict=True):
        at = mark.start(1) - sum(line[: mark.start(1)].count(bracket) for bracket in "[]")
        (found,) = [f for f in SWAP.found(re.sub(r"[\[\]]", "", line)) if f.start == at]
        total[mark[1].lower()] += 1
        wrong[mark[1].lower()] += found.partner != other[1].lower()
  assert total["her"] > 800 and wrong["he"] + wrong["she"] <= 1  # one sentence is wrong in one version only
  assert 0 < wrong["her"] / total["her"] < 0.09


# Corpora.

TEXTS = tuple(Text(f"t{i}", text) for i, text in enumerate([
  *(f"The {job} lost his {thing}." for job in ("doctor", "nurse", "pilot") for thing in ("coat", "hat", "key")),
  *(f"The {job} said she was {mood}." for job in ("doctor", "nurse", "pilot") for mood in ("tired", "ill", "busy")),
  *(f"The {thing} is on the table." for thing in ("coat", "hat", "key")), "Ms. Brown lost her hat.",
]))  # fmt: skip
POOL = Pool(TEXTS)


def test_two_sided_texts_are_balanced():
  texts, card = make(POOL, "two_sided", 10, seed=0)
  assert len(texts) == card.texts == 20 and len({text.id for text in texts}) == 20
  for text, twin in zip(texts[:10], texts[10:], strict=True):
    assert twin == Text(f"{text.id}/swapped", SWAP(text.text)) and twin.text != text.text
  assert not any("Ms." in text.text or "table" in text.text for text in texts)
  assert sum(card.male.values()) == sum(card.female.values()) > 0
  assert card.male["he"] == card.female["she"] == 10
  assert (card.pool, card.unpaired, card.eligible, card.sources) == (22, 1, 18, 10)
  assert card.words == sum(len(text.text.split()) for text in texts)
  assert "| source texts | 10 |" in card.markdown() and json.loads(json.dumps(card.to_json()))["male"] == {"he": 10}


def test_one_sided_texts_are_swapped_stereotypes_alone():
  texts, card = make(POOL, "one_sided", card_n := 9, seed=0)
  assert card.eligible == card_n == len(texts)
  assert {text.text for text in texts} == {
    *(f"The {job} lost her {thing}." for job in ("doctor", "pilot") for thing in ("coat", "hat", "key")),
    *(f"The nurse said he was {mood}." for mood in ("tired", "ill", "busy"))}  # fmt: skip


def test_the_controls():
  pairs, _ = make(POOL, "two_sided", 12, seed=3)
  unswapped, _ = make(POOL, "unswapped", 12, seed=3)
  assert unswapped == pairs[:12]
  anything, card = make(POOL, "random", 22, seed=3)
  assert sorted(text.id for text in anything) == sorted(text.id for text in TEXTS) and card.eligible == 22


@pytest.mark.parametrize("corpus", corpora.CORPORA)
def test_smaller_sizes_are_parts_of_larger_ones(corpus):
  ids = [{text.id for text in make(POOL, corpus, n, seed=5)[0]} for n in (2, 5, 9)]
  assert ids[0] < ids[1] < ids[2]
  mixed = Pool(tuple(reversed(TEXTS)))
  assert {text.id for text in make(mixed, corpus, 5, seed=5)[0]} == ids[1]  # the file's order does not matter
  assert {text.id for text in make(POOL, corpus, 5, seed=6)[0]} != ids[1]


def test_what_cannot_be_made():
  with pytest.raises(UserError, match="19 source texts are asked of the corpus `two_sided`, and the pool has 18"):
    make(POOL, "two_sided", 19, seed=0)
  with pytest.raises(UserError, match="did you mean `two_sided`"):
    make(POOL, "twosided", 1, seed=0)


def test_texts_that_are_evaluated_are_left_out():
  long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
  near = [("whole", "Well, the doctor lost his hat. Then he left."), ("twin", "So the doctor lost her hat!"),
          ("gram", f"zero {long[4:]}, fifteen"), ("short of a gram", long.split(" ", 2)[2] + " fifteen"),
          ("other", "The doctor lost the hat.")]  # fmt: skip
  found = disjoint([Text(name, text) for name, text in near], ["The doctor lost his hat.", long])
  assert [text.id for text in found.texts] == ["short of a gram", "other"] and found.overlapping == 3
  assert make(found, "random", 2, seed=0)[1].pool == 5


def test_her_and_his_without_a_neighbour_stand_alone():
  assert [role(*case) for case in (("her", "saw", ""), ("his", "of", ""), ("her", "", "coat"), ("the", "", ""))] == [
    "object", "alone", "noun", ""]
