"""Texts from TFDS: a data set that is prepared here as ArrayRecord files, read at random without TensorFlow."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from jaxbias.data import hub, roles, sources
from jaxbias.data.roles import with_roles
from jaxbias.errors import UserError

pytest.importorskip("importlib_resources", reason="needs importlib_resources, of the extra `data`")
tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets, of the extra `data`")

ROWS = [{"key": f"r{i}", "text": f"the cat {i} é", "domain": ("gender", "race")[i % 2], "n": i} for i in range(12)]


class Tiny(tfds.core.GeneratorBasedBuilder):
  """Twelve texts with a label, in two splits."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["race", "gender"])
    features = {"key": text, "text": text, "domain": label, "n": tfds.features.Scalar(np.int64)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, download):
    return {"train": self._rows(ROWS), "test": self._rows(ROWS[:2])}

  def _rows(self, rows):
    return ((row["key"], row) for row in rows)

  def _generate_examples(self):
    """Abstract in TFDS, and called by nobody: `_split_generators` brings the rows itself."""
    raise NotImplementedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  Tiny.pkg_dir_path = tmp_path_factory.mktemp("package")
  builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
  builder.download_and_prepare()
  return builder.data_dir


def test_the_rows_are_what_was_written(folder):
  assert sorted(hub.records(f"tfds:{folder}:train"), key=lambda row: row["n"]) == ROWS


@pytest.mark.parametrize("large", [False, True])
def test_texts_of_a_role(folder, monkeypatch, large):
  monkeypatch.setattr(roles, "IN_MEMORY", 0 if large else 100)
  data = with_roles(sources.load("builtin"), {"general": f"tfds:{folder}:train?id=key"})
  role = data.train.roles["general"]
  assert isinstance(role.passages, tuple) != large
  found = {p.id: (p.text, p.domain) for p in role.rows(lambda passage: passage)}
  assert found == {row["key"]: (row["text"], row["domain"]) for row in ROWS}


@pytest.mark.parametrize("rest, said", [
  (":train?text=txet", "has no column `txet`; did you mean `text`?"),
  (":train?text=n", "`n` has to be a string, it is "),
  (":tran", "there is no split `tran`; did you mean `train`?"),
  ("", "name a split; choose from test, train."),
])  # fmt: skip
def test_what_is_wrong_is_named(folder, rest, said):
  with pytest.raises(UserError) as error:
    with_roles(sources.load("builtin"), {"general": f"tfds:{folder}{rest}"})
  assert said in str(error.value)


def test_damaged_files(folder, tmp_path):
  copy = tmp_path / "tiny" / "1.0.0"
  shutil.copytree(folder, copy)
  for file in copy.glob("*train*"):
    file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(UserError, match="cannot be read"):
    with_roles(sources.load("builtin"), {"general": f"tfds:{copy}:train"})
