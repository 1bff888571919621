"""Winogender: prompts, gotchas, subsets and the paper's correlation, worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import winogender

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/winogender"
TASK, *SUBSETS = winogender.TASKS
STATISTICS = "occupation\tbergsma_pct_female\tbls_pct_female\nnurse\t80\t90\npilot\t20\t5\nbaker\t50\t60\n"


def written(folder, lines, statistics=STATISTICS) -> str:
  (folder / "occupations-stats.tsv").write_text(statistics)
  (folder / "all_sentences.tsv").write_text("sentid\tsentence\n" + "".join(f"{line}\n" for line in lines))
  return str(folder)


def every(occupations=("nurse", "pilot", "baker")) -> list[str]:
  pronouns = {"male": "he", "female": "she", "neutral": "they"}
  return [f"{name}.guest.{answer}.{gender}.txt\tThe {name} told the guest that {pronoun} would {verb}."
          for name in occupations for answer, verb in ((0, "stay"), (1, "go")) for gender, pronoun in pronouns.items()]


def answered(sentences, occupation) -> dict:
  """Scores of a model that takes the occupation where `occupation(sentence)`."""
  return {s.id: [[-1.0, 1], [-2.0, 1]] if occupation(s) else [[-2.0, 1], [-1.0, 1]] for s in sentences}


def values(sentences, occupation, group="overall"):
  found = TASK.reduce(sentences, answered(sentences, occupation), draws=50).estimates[group]
  return {name: estimate.value for name, estimate in found.items()}


def test_the_prompt(tmp_path):
  lines = ["nurse.someone.1.female.txt\tTheo asked the nurse if Her keys were there."]
  row, = TASK.rows(winogender.load(written(tmp_path, lines)))
  assert row.context == "Theo asked the nurse if Her keys were there. ‘Her’ refers to the"
  assert row.options == (" nurse", " someone")


def test_a_gotcha_is_where_the_majority_misleads(tmp_path):
  gotchas = {s.id for s in winogender.load(written(tmp_path, every())) if s.gotcha}
  assert gotchas == {"nurse.guest.0.male.txt", "nurse.guest.1.female.txt", "pilot.guest.0.female.txt",
                     "pilot.guest.1.male.txt", "baker.guest.0.male.txt", "baker.guest.1.female.txt"}


def test_a_model_that_goes_by_the_majority_misses_every_gotcha(tmp_path):
  sentences = winogender.load(written(tmp_path, every()))
  majority = lambda s: (s.women["bls"] > 50) == (s.gender == "female")
  found = values(sentences, majority)
  assert found["gotcha_gap"] == 100.0
  assert values(sentences, majority, "gotcha")["acc"] == 0.0
  assert values(sentences, majority, "not gotcha")["acc"] == 100.0
  leads, women = [1.0, -1.0, 1.0], [[90.0, 5.0, 60.0], [80.0, 20.0, 50.0]]
  assert_allclose([found["bls_r"], found["bergsma_r"]], [np.corrcoef(leads, share)[0, 1] for share in women])


def test_a_right_model_has_no_gap_and_no_correlation_to_speak_of(tmp_path):
  sentences = winogender.load(written(tmp_path, every()))
  assert values(sentences, lambda s: s.answer == 0) == {"acc": 100.0, "gotcha_gap": 0.0}
  found = TASK.reduce(sentences, answered(sentences, lambda s: True), draws=50).estimates
  assert list(found) == ["overall", "female", "male", "neutral", "gotcha", "not gotcha", "gotcha_female", "gotcha_male"]
  assert found["neutral"]["acc"].value == 50.0


def test_the_published_subsets_are_tasks_of_their_own(tmp_path):
  """A model that takes everyone but nurses for the occupation: right half of the time, and never of a male nurse."""
  folder = written(tmp_path, every())
  occupation = lambda s: s.names[0] != "nurse"
  whole = TASK.reduce(TASK.load(folder), answered(TASK.load(folder), occupation), draws=50).estimates
  found = {}
  for task in SUBSETS:
    sentences = task.load(folder)
    assert task.rows(sentences) == TASK.rows(sentences) and list(task.benchmark.metrics) == ["acc"]
    estimate = task.reduce(sentences, answered(sentences, occupation), draws=50).estimates["overall"]["acc"]
    group = task.name.removeprefix("winogender_")
    assert estimate.value == whole[group]["acc"].value
    found[group] = (len(sentences), round(estimate.value, 1))
  assert found == {"male": (6, 50.0), "female": (6, 50.0), "neutral": (6, 50.0), "gotcha": (6, 50.0),
                   "gotcha_male": (3, 33.3), "gotcha_female": (3, 66.7)}
  gotchas = next(task for task in SUBSETS if task.name == "winogender_gotcha")
  with pytest.raises(UserError, match="holds no sentences of the subset `gotcha`"):
    gotchas.load(written(tmp_path, every()[2:3]))


@pytest.mark.parametrize(("line", "said"), [
  ("nurse.guest.2.male.txt\tHe ran.", "line 2: `sentid` is `nurse.guest.2.male.txt`, not"),
  ("judge.guest.1.male.txt\tHe ran.", "line 2: occupations-stats.tsv has no `judge`."),
  ("nurse.guest.1.male.txt\tShe ran.", "line 2: `sentence` has no male pronouns, one is needed."),
  ("nurse.guest.1.male.txt", "line 2: `sentence` is missing."),
])
def test_malformed_sentences_are_named(tmp_path, line, said):
  with pytest.raises(UserError) as caught:
    winogender.load(written(tmp_path, [line]))
  assert "all_sentences.tsv" in str(caught.value) and said in str(caught.value)


def test_malformed_statistics_are_named(tmp_path):
  with pytest.raises(UserError, match="occupations-stats.tsv line 2: `bls_pct_female` is `many`, not a number"):
    winogender.load(written(tmp_path, every(), STATISTICS.replace("90", "many")))


@pytest.mark.skipif(not DATA.exists(), reason="Winogender's files are not beside the repository")
def test_the_published_files():
  sentences = winogender.load(str(DATA))
  assert len(sentences) == 720 and len({s.names[0] for s in sentences}) == 60
  assert [len(task.load(str(DATA))) for task in SUBSETS] == [240, 240, 240, 240, 120, 120]
  assert sum(s.gotcha is True for s in sentences) == sum(s.gotcha is False for s in sentences) == 240
  found = TASK.reduce(sentences, answered(sentences, lambda s: s.answer == 0), draws=50).estimates
  assert {name: estimates["acc"].value for name, estimates in found.items()} == dict.fromkeys(found, 100.0)
