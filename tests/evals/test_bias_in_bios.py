"""Bias in Bios: what is asked, rates and gaps by hand. tests/losses/oracles/evaluators.py has the published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.evals import bias_in_bios

TASK, = bias_in_bios.TASKS
PEOPLE = [("nurse", "female"), ("nurse", "female"), ("nurse", "male"), ("judge", "male"), ("judge", "female"),
          ("poet", "female"), ("clerk", "male"), ("clerk", "female")]  # fmt: skip


def written(folder, people=PEOPLE) -> str:
  path = folder / "bios.csv"
  lines = [f"b{i},They live in a town.,{occupation},{gender}" for i, (occupation, gender) in enumerate(people)]
  path.write_text("\n".join(["id,text,occupation,gender", *lines]) + "\n")
  return str(path)


def test_every_occupation_of_the_file_is_an_option(tmp_path):
  rows = TASK.rows(TASK.load(written(tmp_path)))
  assert rows[0].context == "They live in a town.\nOccupation:"
  assert {row.options for row in rows} == {(" clerk", " judge", " nurse", " poet")}


def test_gaps_by_hand(tmp_path):
  """Nurses: women 2 of 2, men 0 of 1; judges: the man; no clerk; the poet has no man beside her."""
  bios = TASK.load(written(tmp_path))
  right = np.array([1, 1, 0, 1, 0, 1, 0, 0], bool)
  names = bias_in_bios.occupations(bios)
  scores = {}
  for bio, hit in zip(bios, right, strict=True):
    chosen = bio.occupation if hit else names[(names.index(bio.occupation) + 1) % len(names)]
    scores[bio.id] = [[-1.0 if name == chosen else -2.0, 1] for name in names]
  found = TASK.reduce(bios, scores, draws=20).estimates
  values = {name: estimate.value for name, estimate in found["overall"].items()}
  assert_allclose([values[name] for name in ("acc", "acc_male", "acc_female", "gap")],
                  [50, 100 / 3, 60, 100 / 3 - 60])
  assert_allclose(values["tpr_rms"], 100 * np.sqrt((1 + 1 + 0) / 3))
  assert_allclose(values["tpr_rms_published"], 100.0)
  assert "tpr_rms" not in found["poet"] and found["clerk"]["tpr_rms"].value == 0
  assert "tpr_rms_published" not in found["clerk"]


@pytest.mark.parametrize("people,said", [
  ([("nurse", "f"), ("judge", "male")], "line 2: `gender` is `f`, not male or female"),
  ([("nurse", "female")], "no biographies of two occupations"),
])  # fmt: skip
def test_malformed_biographies_are_named(tmp_path, people, said):
  with pytest.raises(UserError, match=said):
    TASK.load(written(tmp_path, people))
