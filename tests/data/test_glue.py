"""Labelled texts: tables of every kind, what is wrong with them, and where the two parts of a task lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxbias.data import glue
from jaxbias.data.glue import TASKS, Example
from jaxbias.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "glue"


@pytest.mark.parametrize("name,row", [
  ("t.tsv", 'a "good" film \t1'), ("t.csv", '"a ""good"" film ",1'),
  ("t.jsonl", json.dumps({"sentence": 'a "good" film ', "label": "positive"})),
  ("t.jsonl", json.dumps({"sentence": 'a "good" film ', "label": 1, "idx": 3})),
])  # fmt: skip
def test_a_table_of_any_kind_is_read(tmp_path, name, row):
  head = {"t.tsv": "sentence\tlabel\n", "t.csv": "sentence,label\n"}.get(name, "")
  (tmp_path / name).write_text(head + row + "\n")
  assert glue.read(str(tmp_path / name), TASKS["sst2"], "dev") == [Example("dev-0", ('a "good" film',), 1)]


def test_parts_of_a_folder_of_a_hub_and_by_name(tmp_path):
  for name in ("train_first.tsv", "validation.jsonl", "SOURCE.md", "test.tsv"):
    (tmp_path / name).touch()
  assert glue.parts([str(tmp_path)]) == {"train": str(tmp_path / "train_first.tsv"),
                                         "dev": str(tmp_path / "validation.jsonl")}  # fmt: skip
  assert glue.parts(["hf:glue:sst2"]) == {"train": "hf:glue:sst2:train", "dev": "hf:glue:sst2:validation"}
  assert glue.parts(["hf:./mine"])["dev"] == "hf:./mine::validation"
  assert glue.parts(["tfds:glue/rte"])["train"] == "tfds:glue/rte:train"
  assert glue.parts(["dev=b.tsv", "train=a.csv"]) == {"train": "a.csv", "dev": "b.tsv"}


@pytest.mark.parametrize("content,message", [
  ("text\tlabel\nx\t1\n", "t.tsv line 1: there is no column `sentence`"),
  ("sentence\nx\n", "t.tsv line 1: there is no column `label`"),
  ("sentence\tlabel\nx\t1\ny\t2\n", r"t.tsv line 3: `label` is `2`; sst2 has 0 \(negative\), 1 \(positive\)"),
  ("sentence\tlabel\nx\t-1\n", "line 2: `label` is `-1`"),
  ("sentence\tlabel\nx\t\n", "line 2: `label` is ``"),
  ("sentence\tlabel\n  \t1\n", "line 2: `sentence` is empty"),
  ("sentence\tlabel\nx\n", "line 2: `label` is missing"),
  ("sentence\tlabel\n", "t.tsv holds no examples"),
  ("", "t.tsv line 1: there is no column `sentence`"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_named_by_line_and_field(tmp_path, content, message):
  (tmp_path / "t.tsv").write_text(content)
  with pytest.raises(UserError, match=message):
    glue.read(str(tmp_path / "t.tsv"), TASKS["sst2"], "train")


@pytest.mark.parametrize("given,message", [
  (["{}"], "has no dev or validation file .*--data dev=FILE"),
  (["{}/train.tsv"], "is a file; give a folder .*--data train=FILE --data dev=FILE"),
  (["{}/nowhere"], "is not there"),
  (["train=a.tsv"], "both of --data train=SOURCE and --data dev=SOURCE"),
  (["train=a.tsv", "b.tsv"], "both of"),
])  # fmt: skip
def test_parts_that_are_not_there(tmp_path, given, message):
  (tmp_path / "train.tsv").touch()
  with pytest.raises(UserError, match=message):
    glue.parts([one.format(tmp_path) for one in given])
  (tmp_path / "train.csv").touch()
  with pytest.raises(UserError, match="has train.csv and train.tsv; say which"):
    glue.parts([str(tmp_path)])


@pytest.mark.skipif(not SHARED.exists(), reason="../shared has no GLUE files here")
@pytest.mark.parametrize("task,folder,train,dev", [("sst2", "SST-2", 20_000, 872), ("rte", "RTE", 2490, 277)])
def test_glues_own_files_have_its_sizes(task, folder, train, dev):
  found = {part: glue.read(path, TASKS[task], part) for part, path in glue.parts([str(SHARED / folder)]).items()}
  assert (len(found["train"]), len(found["dev"])) == (train, dev)
  assert {example.label for part in found.values() for example in part} == {0, 1}
