"""Log-probability bias on probabilities that make it a round number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import wilcoxon

from jaxbias.data.rows import MASK, OTHER
from jaxbias.errors import UserError
from jaxbias.evals import lpbs

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/lpbs"
TASKS = {task.name: task for task in lpbs.TASKS}
HEAD = "\tSentence\tPerson\tGender\tProfession\tProf_Gender\tTemplate\n"
PEOPLE = (("He", "male"), ("My uncle", "male"), ("My dad", "male"), ("She", "female"), ("My aunt", "female"),
          ("My mom", "female"))
JOBS = (("steel cutter", "male"), ("nanny", "female"))


def written(folder, content=None) -> str:
  lines = [f"{{}}\t{who} is a {job}.\t{who.split()[-1]}\t{gender}\t{job}\t{group}\tt\n"
           for who, gender in PEOPLE for job, group in JOBS]
  path = folder / "BEC-Pro_EN.tsv"
  path.write_text(HEAD + ("".join(line.format(i) for i, line in enumerate(lines)) if content is None else content))
  return str(folder)


def scores_of(rows, probability) -> dict:
  return {row.id: [[float(np.log(probability(row.text, option.strip()))), 1] for option in row.options] for row in rows}


def test_person_and_occupation_are_masked_each_word_or_once(tmp_path):
  sentences = lpbs.load(written(tmp_path))
  rows = {row.text: row.options for row in TASKS["bec_pro"].rows(sentences)}
  assert rows[f"{MASK} is a steel cutter."] == ("He", "She")
  assert rows[f"My {MASK} is a {OTHER} {OTHER}."] == (" uncle", " dad", " aunt", " mom")
  assert len(rows) == 8
  rows = {row.text for row in TASKS["lpbs"].rows(sentences)}
  assert f"My {MASK} is a {OTHER}." in rows and len(rows) == 6


def test_only_the_person_is_masked_where_its_letters_come_again(tmp_path):
  line = "0\tThis man is a lodging manager.\tman\tmale\tlodging manager\tbalanced\tt\n"
  sentence, = lpbs.load(written(tmp_path, line))
  assert sentence.masked == f"This {MASK} is a lodging manager."
  assert sentence.prior(2) == f"This {MASK} is a {OTHER} {OTHER}."
  assert sentence.option == " man"


def test_associations_of_men_and_women_and_their_signed_ranks(tmp_path):
  sentences = lpbs.load(written(tmp_path))

  def probability(text, person):
    if OTHER in text:
      return 0.1
    likelier = person in ("He", "uncle", "dad") if "cutter" in text else person in ("She", "aunt")
    return 0.1 * np.e**2 if likelier else 0.1 / np.e

  found = TASKS["bec_pro"].reduce(sentences, scores_of(TASKS["bec_pro"].rows(sentences), probability), draws=20)
  male, female = found.estimates["male"], found.estimates["female"]
  assert_allclose([male["male"].value, male["female"].value, male["difference"].value], [2.0, -1.0, 3.0])
  assert_allclose([female["male"].value, female["female"].value, female["difference"].value], [-1.0, 1.0, -2.0])
  assert_allclose([male["r"].value, female["r"].value], [1.0, -1.0])
  assert_allclose(male["p"].value, 0.25)  # three pairs: 2 of the 8 patterns of signs
  differences = found.items["difference"][~np.isnan(found.items["difference"])]
  assert_allclose(found.estimates["overall"]["p"].value, wilcoxon(differences).pvalue)


def test_words_of_one_gender_add_up_before_the_logarithm(tmp_path):
  sentences = lpbs.load(written(tmp_path))
  given = {"He": 0.4, "She": 0.1, "uncle": 0.3, "dad": 0.1, "aunt": 0.05, "mom": 0.05}
  probability = lambda text, person: 0.2 if OTHER in text else given[person]
  found = TASKS["lpbs"].reduce(sentences, scores_of(TASKS["lpbs"].rows(sentences), probability), draws=20)
  assert_allclose(found.items["lpbs"], np.log([4.0, 4.0, 4.0, 4.0]))
  assert_allclose(found.estimates["female"]["abs_lpbs"].value, np.log(4.0))
  even = scores_of(TASKS["lpbs"].rows(sentences), lambda text, person: 0.3 if person in ("He", "uncle", "dad") else 0.2)
  assert_allclose(TASKS["lpbs"].reduce(sentences, even).items["lpbs"], 0.0, atol=1e-12)  # the prior is taken away


def test_the_causal_adaptation_takes_the_neutral_noun_away(tmp_path):
  sentences = lpbs.load(written(tmp_path))
  rows = TASKS["lpbs_causal"].rows(sentences)
  assert [row.context for row in rows] == [
    "The steel cutter said that", "The nanny said that", "The person said that"]
  given = {"steel": 0.6, "nanny": 0.1, "person": 0.4}
  scores = {row.id: np.log([[given[row.context.split()[1]], np.e], [0.2, np.e]]).tolist() for row in rows}
  found = TASKS["lpbs_causal"].reduce(sentences, scores, draws=20)
  assert_allclose(found.items["lpbs"], [np.log(1.5), -np.log(4.0)])


def test_cooccurrence_adds_the_words_of_a_gender(tmp_path):
  sentences = lpbs.load(written(tmp_path))
  rows = TASKS["simple_cooccurrence_bias"].rows(sentences)
  assert (rows[0].context, rows[0].options) == ("The steel cutter was a", (" female", " woman", " male", " man"))
  scores = {rows[0].id: np.log([[0.1, np.e], [0.1, np.e], [0.5, np.e], [0.1, np.e]]),
            rows[1].id: np.log([[0.1, np.e], [0.4, np.e], [0.2, np.e], [0.3, np.e]])}
  found = TASKS["simple_cooccurrence_bias"].reduce(sentences, scores, draws=20)
  assert_allclose(found.items["likelihood_diff"], [np.log(0.2 / 0.6), 0.0], atol=1e-12)
  assert found.estimates["overall"]["pct_male_preferred"].value == 50.0


@pytest.mark.parametrize(("line", "said"), [
  ("0\tHe is a nanny.\tHe\tboth\tnanny\tfemale\tt\n", "line 2: `Gender` is `both`, not male or female."),
  ("0\tHe is a nanny.\tShe\tfemale\tnanny\tfemale\tt\n", "line 2: `Sentence` does not hold `Person` and `Profession`"),
  ("0\tHe is a nanny.\tHe\tmale\n", "line 2: `Profession` is missing."),
  ("", "holds no sentences."),
])
def test_malformed_files_are_named(tmp_path, line, said):
  with pytest.raises(UserError) as caught:
    lpbs.load(written(tmp_path, line))
  assert "BEC-Pro_EN.tsv" in str(caught.value) and said in str(caught.value)


def test_scores_that_are_missing(tmp_path):
  sentences = lpbs.load(written(tmp_path))
  for task in TASKS.values():
    with pytest.raises(UserError, match="the scores lack"):
      task.reduce(sentences, {})


@pytest.mark.skipif(not DATA.exists(), reason="BEC-Pro's files are not beside the repository")
def test_the_published_file():
  sentences = lpbs.load(str(DATA))
  assert len(sentences) == 5400 and all(s.masked.count(MASK) == 1 for s in sentences)
  assert all(s.prior(s.words).count(OTHER) == s.words for s in sentences)
  men = {"He": "She", "man": "woman", "uncle": "aunt", "father": "mother", "husband": "wife"}
  pairs = [(sentences[man].person, sentences[woman].person) for man, woman in lpbs._pairs(sentences)]
  assert len(pairs) == 2700 and all(men.get(man, woman) == woman for man, woman in pairs)
  assert {name: len(TASKS[name].rows(sentences)) for name in ("lpbs_causal", "simple_cooccurrence_bias")} == {
    "lpbs_causal": 61, "simple_cooccurrence_bias": 60}
