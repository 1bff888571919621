"""Rows of Hugging Face and TFDS as JSON has them, and a reading that goes on past malformed rows."""

from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxbias.data import fields, hub
from jaxbias.errors import UserError


class Names(list):
  """A ClassLabel of either package."""

  def int2str(self, i: int) -> str:
    return self[i]


@pytest.fixture
def tfds(monkeypatch):
  """A stand-in for tensorflow_datasets, with one data set of two splits; its rows are what data sources yield."""
  rows = [{"text": "é".encode(), "label": np.int64(1), "inner": {"y": np.array([0, 1, -1])}, "n": np.float32(0.5)}]
  listed = SimpleNamespace(feature=Names("ab"))
  features = {"text": None, "label": Names(["no", "yes"]), "inner": {"y": listed}, "n": None}
  asked = []
  info = SimpleNamespace(features=features, splits={"train": 1, "test": 1})
  builder = SimpleNamespace(info=info, as_data_source=lambda split: rows,
                            download_and_prepare=lambda: asked.append("made"))  # fmt: skip
  module = SimpleNamespace(builder_from_directory=lambda name: builder,
                           builder=lambda name, file_format: asked.append((name, file_format)) or builder)  # fmt: skip
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  return asked


def test_tfds_rows(tfds, tmp_path):
  (row,) = hub.records("tfds:glue/sst2:1.0.0:test")
  assert row == {"text": "é", "label": "yes", "inner": {"y": ["a", "b", None]}, "n": 0.5}
  assert tfds == [("glue/sst2:1.0.0", "array_record"), "made"]
  assert hub.records(f"tfds:{tmp_path}:train") == [row] and len(tfds) == 2
  with pytest.raises(UserError, match="name a split; choose from test, train"):
    hub.records("tfds:glue/sst2:1.0.0")


@pytest.mark.parametrize("source, said", [
  ("hf:", "`hf:` names no data set"), ("tfds:", "`tfds:` names no data set"),
  ("hf:a:b:c:d", "too many parts"), ("tfds:x:tst", "there is no split `tst`; did you mean `test`"),
])  # fmt: skip
def test_sources_that_name_nothing(tfds, source, said):
  with pytest.raises(UserError, match=said):
    hub.records(source)


def test_what_goes_wrong_inside_a_package_is_one_line(tfds, monkeypatch):
  def broken(name):
    raise RuntimeError("first line\nsecond line")

  monkeypatch.setattr(hub, "_tfds", broken)
  with pytest.raises(UserError) as error:
    hub.records("tfds:x:test")
  assert str(error.value) == "tfds:x:test cannot be read (RuntimeError: first line)."


def test_a_tolerant_reading_notes_rows_and_files(tmp_path):
  file = tmp_path / "rows.jsonl"
  file.write_text('{"id": "a", "x": "1"}\nnot json\n{"id": "a", "x": "2"}\n{"id": "b"}\n{"id": "c", "x": null}\n')
  make = lambda row, where: SimpleNamespace(id=row["id"], x=row["x"])
  with fields.tolerant() as reading:
    rows = fields.unique(fields.table(file, ("id", "x")), make)
  assert [(row.id, row.x) for row in rows] == [("a", "1"), ("c", "")]
  assert [said.removeprefix(f"{file} line ")[0] for said in reading.malformed] == ["2", "3", "4"]
  assert reading.files == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
  with pytest.raises(UserError, match="line 2: not JSON"):
    fields.unique(fields.table(file, ("id", "x")), make)
