"""SEAT and WEAT on vectors whose cosines are known, and a permutation p against one counted otherwise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import seat

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/seat"
TASKS = {task.name: task for task in seat.TASKS}
PLANE = {"x1": [2.0, 0.0], "x2": [1.0, 0.0], "y1": [0.0, 3.0], "y2": [0.0, 1.0], "a": [5.0, 0.0], "b": [0.0, 0.5]}
SETS = {"targ1": ["x1", "x2"], "targ2": ["y1", "y2"], "attr1": ["a"], "attr2": ["b"]}


def written(folder, sets=SETS, name="weat6") -> str:
  path = folder / f"{name}.jsonl"
  path.write_text(json.dumps({key: {"category": key, "examples": texts} for key, texts in sets.items()}))
  return str(path)


def test_targets_that_are_their_attributes(tmp_path):
  tests = seat.load(written(tmp_path))
  found = TASKS["weat"].reduce(tests, {name: np.array(vector) for name, vector in PLANE.items()}).estimates["weat6"]
  assert_allclose(found["d"].value, np.sqrt(3.0))  # s = 1, 1, -1, -1: difference 2, standard deviation 2 / sqrt(3)
  assert_allclose(found["p"].value, 1 / 6)
  assert_allclose(found["cosine"].value, 0.5)
  swapped = seat.load(written(tmp_path, SETS | {"attr1": ["b"], "attr2": ["a"]}))
  found = TASKS["weat"].reduce(swapped, PLANE).estimates["weat6"]
  assert_allclose([found["d"].value, found["abs_d"].value, found["p"].value], [-np.sqrt(3.0), np.sqrt(3.0), 1.0])


def test_length_and_rotation_of_the_vectors_change_nothing():
  rng = np.random.default_rng(0)
  targets, first, second = rng.normal(size=(8, 5)), rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
  turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
  s, cosine = seat.associations(targets, first, second)
  turned, same = seat.associations(3.0 * targets @ turn, first @ turn, 0.1 * second @ turn)
  assert_allclose(s, turned)
  assert_allclose(cosine, same)


def test_exact_p_counts_every_equal_partition_and_ties():
  s = np.array([0.3, 0.2, 0.1, 0.2, -0.1, 0.0])
  sums = [s[list(chosen)].sum() for chosen in itertools.combinations(range(6), 3)]
  assert_allclose(seat.p_value(s), np.mean([total > 0.6 - 1e-12 for total in sums]))
  assert seat.p_value(np.full(6, 0.1)) == 1.0


def test_sampled_p_is_near_the_exact_one_and_never_zero(monkeypatch):
  s = np.random.default_rng(1).normal(size=16) + np.repeat([0.5, 0.0], 8)
  exact = seat.p_value(s)
  monkeypatch.setattr(seat, "EXACT", 0)
  assert_allclose(seat.p_value(s), exact, atol=0.005)
  assert seat.p_value(np.repeat([1.0, -1.0], 20)) == 1 / 100_000
  assert seat.p_value(s, seed=3) == seat.p_value(s, seed=3)


def test_means_are_over_the_tests_of_a_domain(tmp_path):
  for name in ("sent-weat6", "sent-weat7", "sent-religion1"):
    written(tmp_path, SETS if name != "sent-weat7" else SETS | {"attr1": ["b"], "attr2": ["a"]}, name)
  written(tmp_path, name="weat6")
  tests = TASKS["seat"].load(str(tmp_path))
  found = TASKS["seat"].reduce(tests, PLANE).estimates
  assert list(found) == ["overall", "gender", "religion", "sent-religion1", "sent-weat6", "sent-weat7"]
  assert_allclose([found["gender"]["abs_d"].value, found["gender"]["d"].value], [np.sqrt(3.0), 0.0], atol=1e-12)
  assert "p" not in found["gender"] and "p" in found["sent-weat6"]
  assert [row.id for row in TASKS["seat"].rows(tests)] == ["x1", "x2", "y1", "y2", "a", "b"]
  assert [test.name for test in TASKS["weat"].load(str(tmp_path))] == ["weat6"]


def test_vectors_that_are_all_alike_have_no_effect_size(tmp_path):
  found = TASKS["weat"].reduce(seat.load(written(tmp_path)), dict.fromkeys(PLANE, [1.0, 2.0])).estimates["weat6"]
  assert "d" not in found and found["p"].value == 1.0
  assert_allclose(found["cosine"].value, 1.0)


@pytest.mark.parametrize(("sets", "said"), [
  (SETS | {"targ2": ["y1"]}, "`targ1` has 2 examples and `targ2` 1, as many are needed."),
  (SETS | {"attr1": []}, ", `attr1`: `examples` has to be a list of strings, none of them empty."),
  (SETS | {"attr1": ["a", "a"]}, ", `attr1`: a text of `examples` appears twice."),
  ({"targ1": ["x"]}, "`targ2` is missing."),
])
def test_malformed_files_are_named(tmp_path, sets, said):
  with pytest.raises(UserError) as caught:
    seat.load(written(tmp_path, sets))
  assert "weat6.jsonl" in str(caught.value) and said in str(caught.value)


def test_embeddings_that_cannot_be_used(tmp_path):
  tests = seat.load(written(tmp_path))
  with pytest.raises(UserError, match="the embeddings lack 1 texts of weat6, `b` first"):
    TASKS["weat"].reduce(tests, {name: PLANE[name] for name in PLANE if name != "b"})
  with pytest.raises(UserError, match="zero or not finite"):
    TASKS["weat"].reduce(tests, PLANE | {"b": [0.0, 0.0]})
  with pytest.raises(UserError, match="holds no sent-"):
    TASKS["seat"].load(str(tmp_path))


@pytest.mark.skipif(not DATA.exists(), reason="SEAT's files are not beside the repository")
def test_the_published_tests_are_all_read():
  tests = TASKS["seat"].load(str(DATA)) + TASKS["weat"].load(str(DATA))
  listed = {name for names in seat.DOMAINS.values() for name in names}
  assert listed <= {test.name for test in tests} and len(tests) == 23 + 15
  rows = TASKS["seat"].rows(tests)
  assert len({row.id for row in rows}) == len(rows)
