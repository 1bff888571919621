"""CrowS-Pairs worked by hand: what counts, what ties, what is skipped; and the oracle's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import crows_pairs

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
DATA, ORACLE = SHARED / "data/crows_pairs/crows_pairs_dev.csv", SHARED / "oracles/smollm2"
TASKS = {task.name: task for task in crows_pairs.TASKS}
HEAD = ",sent_more,sent_less,stereo_antistereo,bias_type\n"
FILE = HEAD + """7,Xs sing.,Ys sing.,stereo,age
9,Xs run.,Ys run.,stereo,age
12,"Zs, too.",Ws too.,antistereo,gender
"""


@pytest.fixture
def pairs(tmp_path):
  path = tmp_path / "pairs.csv"
  path.write_text(FILE)
  return crows_pairs.load(path)


def values(name, pairs, scores, group="overall") -> dict[str, float]:
  found = TASKS[name].reduce(pairs, scores, draws=50).estimates[group]
  return {metric: estimate.value for metric, estimate in found.items()}


def test_rows_hold_both_sentences_the_more_stereotypical_first(pairs):
  row = TASKS["crows_pairs"].rows(pairs)[2]
  assert (row.id, row.context, row.options, row.span) == ("12", "", ("Zs, too.", "Ws too."), "all")
  spans = {name: {row.span for row in task.rows(pairs)} for name, task in TASKS.items()}
  assert spans == {"crows_pairs": {"all"}, "crows_pairs_original": {"shared"},
                   "crows_pairs_masked_biasbench": {"different"}, "crows_pairs_causal_biasbench": {"all"}}
  assert [task.name for task in TASKS.values() if task.bos == "split_bos"] == ["crows_pairs_causal_biasbench"]


def test_both_directions_count_for_the_more_stereotypical_sentence(pairs):
  scores = {"7": [[-4.0, 2], [-5.0, 2]], "9": [[-5.0, 2], [-4.0, 4]], "12": [[-6.0, 6], [-8.0, 2]]}
  assert_allclose(values("crows_pairs", pairs, scores)["ss"], 200 / 3)
  assert values("crows_pairs", pairs, scores)["stereo"] == 50.0
  assert values("crows_pairs", pairs, scores)["antistereo"] == 100.0
  assert_allclose(values("crows_pairs", pairs, scores)["likelihood_diff"], 4 / 3)
  assert values("crows_pairs", pairs, scores, "gender") == {
    "ss": 100.0, "antistereo": 100.0, "ties": 0.0, "likelihood_diff": 2.0}


def test_a_tie_counts_in_the_whole_and_in_no_direction(pairs):
  scores = {"7": [[-4.0, 2], [-4.0, 2]], "9": [[-3.0, 2], [-4.0, 2]], "12": [[-6.0, 2], [-8.0, 2]]}
  found = values("crows_pairs", pairs, scores)
  assert_allclose([found["ss"], found["stereo"], found["ties"]], [200 / 3, 100.0, 100 / 3])


def test_masked_scores_are_compared_to_three_decimals_and_causal_ones_as_they_are(pairs):
  scores = {"7": [[-4.0001, 2], [-4.0002, 2]], "9": [[-3.0, 2], [-4.0, 2]], "12": [[-6.0, 2], [-8.0, 2]]}
  assert_allclose(values("crows_pairs_original", pairs, scores)["ties"], 100 / 3)
  assert_allclose(values("crows_pairs_masked_biasbench", pairs, scores)["ties"], 100 / 3)
  assert values("crows_pairs_causal_biasbench", pairs, scores)["ss"] == 100.0


def test_sums_favour_the_short_and_means_do_not(pairs):
  scores = {"7": [[-4.0, 4], [-3.0, 2]], "9": [[-4.0, 4], [-3.0, 2]], "12": [[-4.0, 4], [-3.0, 2]]}
  assert values("crows_pairs", pairs, scores)["ss"] == 0.0
  assert values("crows_pairs_causal_biasbench", pairs, scores)["ss"] == 100.0


def test_a_side_without_differing_tokens_leaves_the_pair_out(pairs):
  scores = {"7": [[-4.0, 2], [0.0, 0]], "9": [[-3.0, 2], [-4.0, 2]], "12": [[-8.0, 2], [-6.0, 2]]}
  assert values("crows_pairs_masked_biasbench", pairs, scores)["ss"] == 50.0
  nothing_shared = scores | {"7": [[0.0, 0], [0.0, 0]]}
  assert_allclose(values("crows_pairs_original", pairs, nothing_shared)["ss"], 100 / 3)  # a tie, and it counts


@pytest.mark.parametrize(("content", "said"), [
  ("a,b\n1,2\n", "line 1: there is no column `sent_more`."),
  (HEAD + "1,a,b,stereo\n", "line 2: `bias_type` is missing."),
  (HEAD + "1,a,b,stereo,age\n1,a,b,stereo,age\n", "line 3: id `1` was already used, see"),
  (HEAD + "1,a,,stereo,age\n", "line 2: `sent_less` is empty."),
  (HEAD + "1,a,b,both,age\n", "line 2: `stereo_antistereo` is `both`, not stereo or antistereo."),
  (HEAD, "holds no pairs."),
])
def test_malformed_files_are_named(tmp_path, content, said):
  path = tmp_path / "pairs.csv"
  path.write_text(content)
  with pytest.raises(UserError) as caught:
    crows_pairs.load(path)
  assert str(caught.value).startswith(str(path)) and said in str(caught.value)


def test_missing_scores_are_named(pairs):
  with pytest.raises(UserError, match="the scores lack 3 of 3 ids, `7` first"):
    TASKS["crows_pairs"].reduce(pairs, {})


@pytest.mark.skipif(not (DATA.exists() and ORACLE.exists()), reason="CrowS-Pairs' files are not beside the repository")
def test_the_oracles_rows_and_a_count_of_its_scores():
  pairs = crows_pairs.load(DATA)
  oracle = [json.loads(line) for line in (ORACLE / "crows_dev.rows.jsonl").read_text().splitlines()]
  assert [(row.id, row.context, list(row.options)) for row in TASKS["crows_pairs"].rows(pairs)] == [
    (row["id"], row["context"], row["options"]) for row in oracle]
  scores = json.loads((ORACLE / "crows_dev.scores.json").read_text())
  found = TASKS["crows_pairs"].reduce(pairs, scores, draws=100)
  assert len(found.estimates) == 10
  assert_allclose(found.estimates["overall"]["ss"].value,
                  100 * sum(more[0] > less[0] for more, less in scores.values()) / 760)
  means = TASKS["crows_pairs_causal_biasbench"].reduce(pairs, scores, draws=100).estimates
  assert_allclose(means["overall"]["ss"].value,
                  100 * sum(a / n > b / m for (a, n), (b, m) in scores.values()) / 760)
  assert means["overall"]["ss"].low < means["overall"]["ss"].value < means["overall"]["ss"].high
