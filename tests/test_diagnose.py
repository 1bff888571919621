"""The diagnosis from end to end on the planted language, and its report on findings that are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from jaxbias import config as configs
from jaxbias import diagnose as run
from jaxbias.data import planted
from jaxbias.data.rows import Split, Text
from jaxbias.errors import UserError
from jaxbias.inputs import load_data
from jaxbias.methods import cda, grid
from jaxbias.report import diagnosis as report

STEPS = 4
CONFIG = Path(__file__).parents[1] / "configs" / "diagnose_planted.py"


def tiny_config():
  c = configs.defaults()
  c.seeds = (0, 1)
  c.lora.rank, c.train.base = 0, ("*",)
  c.train.steps, c.train.warmup_steps, c.train.checkpoint_every = STEPS, 1, STEPS
  c.train.rows = {"forget": 1, "retain": 8, "general": 4}
  c.train.learning_rate = 1e-3
  c.watch.steps, c.watch.split, c.watch.batches = "0,2", "validation", 1
  c.eval.bootstrap_draws = 20
  with c.unlocked():
    c.diagnose = grid.settings() | {
      "planted": True, "pretrain": {"steps": 10, "learning_rate": 3e-3, "rows": 16},
      "objectives": ("two_sided", "random"), "sizes": (20,), "remedy_sizes": (20,), "draws": 50,
      "remedies": {"slower": {"remedy": "learning_rate", "strength": 0.5}},
      "columns": {"downstream": {"benchmark": "openbookqa_cloze", "data": "facts.jsonl", "metric": "acc",
                                 "group": "overall", "limit": 8}},
    }  # fmt: skip
  return c


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("diagnosis")
  page = run.diagnose(tiny_config(), folder, "a command")
  return folder, page.read_text()


def rows_of(folder):
  return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]


def test_the_table_has_every_look_at_every_run(finished):
  folder, _ = finished
  table = rows_of(folder)
  cells = {("two_sided", "none"), ("two_sided", "slower"), ("random", "none")}
  assert {(row["objective"], row["remedy"]) for row in table} == cells
  assert len(table) == len(cells) * 2 * 3 and {row["step"] for row in table} == {0, 2, STEPS}
  for row in table:
    if row["step"] == 0:
      assert row["f_all"] == row["f_st"] == row["f_sel"] == row["distance"] == 0.0 and row["downstream"] is not None
    else:
      assert row["f_all"] != 0.0 and row["distance"] > 0.0
    assert row["b"] == abs(row["ss"] - 50.0) and row["gap_size"] == abs(row["gap"])
    assert row["lr"] == pytest.approx(5e-4 if row["remedy"] == "slower" else 1e-3)
    assert (row["downstream"] is None) == (row["step"] == 2) == ("downstream" in row["missing"])
  halves = {row["remedy"]: row["distance"] for row in table
            if (row["objective"], row["seed"], row["step"]) == ("two_sided", 0, STEPS)}  # fmt: skip
  assert halves["slower"] < halves["none"]
  with (folder / "table.csv").open(newline="") as file:
    written = list(csv.DictReader(file))
  assert [row["f_all"] for row in written] == [str(row["f_all"]) for row in table]
  assert {row["downstream"] for row in written if row["step"] == "2"} == {""}


def test_the_report_says_what_was_measured_and_what_was_not(finished):
  folder, page = finished
  found = json.loads((folder / "findings.json").read_text())
  assert found["runs"] == 6 and found["points"] == 18 and found["failed"] == []
  assert len(found["slopes"]) == 4 and found["tolerance"] >= 0.0
  cards = json.loads((folder / "cards.json").read_text())
  assert [(card["corpus"], card["texts"], card["overlapping"]) for card in cards[::2]] == [
    ("two_sided", 40, 0), ("random", 20, 0)]
  for claim, _ in report.CLAIMS:
    assert f"| {claim}:" in page
  assert "measured at the start and the end alone" in page and "no number below is theirs" in page
  for kind, head in (("svg", b"<svg"), ("png", b"\x89PNG")):
    assert (folder / "figures" / f"forgetting_bias.{kind}").read_bytes().startswith(head)


def test_a_finished_diagnosis_trains_nothing_again(finished):
  folder, page = finished
  written = {path: path.stat().st_mtime_ns for path in folder.rglob("evaluation.json")}
  kept = {path: path.stat().st_mtime_ns for path in folder.rglob("columns.json")}
  assert len(written) == 9 and len(kept) == 7
  assert run.diagnose(tiny_config(), folder, "a command").read_text() == page
  assert written | kept == {path: path.stat().st_mtime_ns for path in (*written, *kept)}


def test_every_cell_of_the_grid_is_a_variant():
  c = tiny_config()
  c.diagnose.sizes, c.diagnose.objectives = (10, 20, 40), ("two_sided", "one_sided", "unswapped", "random")
  found = dict(grid.variants(c.diagnose))
  assert len(found) == 4 * 3 + 1
  assert found["one_sided-n40"]["texts"] == {"corpus": "one_sided", "n": 40}
  slower = found["two_sided-n20-slower"]
  assert slower["cell"] == {"objective": "two_sided", "remedy": "slower", "n": 20}
  assert slower["learning_rate_scale"] == 0.5 and slower["losses"] == found["two_sided-n20"]["losses"]


@pytest.mark.parametrize("change,said", [
  (lambda d: d.update(objectives=("twosided",)), "did you mean `two_sided`"),
  (lambda d: d.update(remedy_objectives=("one_sided",)), "diagnose.objectives lacks"),
  (lambda d: d.update(remedy_sizes=(7,)), "diagnose.sizes lacks"),
  (lambda d: d.update(remedies={"x": {"remedy": "ewcc", "strength": 1.0}}), "did you mean `ewc`"),
  (lambda d: d.update(columns={"x": {"benchmark": "crows_pair", "data": "", "metric": "ss"}}), "`crows_pairs`"),
  (lambda d: d.update(planted=False), "there is no such file"),
])  # fmt: skip
def test_a_grid_that_cannot_be_run_is_refused_before_anything_is_trained(tmp_path, change, said):
  c = tiny_config()
  with c.unlocked():
    change(c.diagnose)
  with pytest.raises(UserError, match=said):
    run.diagnose(c, tmp_path, "")
  assert not any(tmp_path.iterdir())


def test_the_recipe_takes_its_texts_from_the_pool():
  split = Split((), (Text("g", "A plain text."),), pool=planted.language().pool)
  found = cda.recipe(split, 0, corpus="two_sided", n=5)
  assert len(found.retain) == 10 and found.forget == () and [row.text for row in found.general] == ["A plain text."]
  assert [row.text for row in cda.recipe(split, 0, "unswapped", 5).retain] == [r.text for r in found.retain[:5]]
  with pytest.raises(UserError, match="makes its texts of data.corpus"):
    cda.recipe(Split((), ()), 0)
  with pytest.raises(UserError, match="the pool has 0 for it"):  # there were texts, and evaluation reads all of them
    cda.recipe(Split((), (), overlapping=3), 0)


def test_the_planted_pool_holds_what_its_config_asks_for(tmp_path):
  planted.write(tmp_path)
  c, _ = configs.from_command_line([f"--config={CONFIG}"])
  c.data.source, c.data.corpus = str(tmp_path), str(tmp_path / "pool.jsonl")
  train = load_data(c.data).train
  for corpus in c.diagnose.objectives:
    assert cda.recipe(train, 0, corpus, max(c.diagnose.sizes)).retain
  watched = tmp_path / "watched.jsonl"  # of the pool's own texts: nothing that is watched is trained on
  watched.write_text("".join((tmp_path / "pool.jsonl").read_text().splitlines(keepends=True)[:5]))
  assert load_data(c.data, str(watched)).train.overlapping > train.overlapping


# The report, on tables whose answer is known.


def table(front: float, remedy_front: float, down: float = -20.0):
  """Runs along F_all = front x (bias given up); performance falls by `down` a nat of F_all. Three seeds."""
  rows = []
  for objective, n in (("two_sided", 100), ("two_sided", 1000), ("random", 100), ("random", 1000)):
    for remedy, slope in (("none", front), ("held", remedy_front)) if objective == "two_sided" else (("none", front),):
      for seed in range(3):
        reach = {("two_sided", 100): 5.0, ("two_sided", 1000): 10.0}.get((objective, n), 0.0)
        for step in range(4):
          fell = reach * step / 3
          forgot = slope * fell + (0.002 * seed * (step > 0)) + (0.01 * step if objective == "random" else 0.0)
          rows.append({"model": "m", "objective": objective, "remedy": remedy, "n": n, "seed": seed, "step": step,
                       "b": 12.0 - fell, "gap": 0.1, "f_all": forgot, "f_sel": 0.05 * fell, "distance": float(step),
                       "downstream": 90.0 + down * forgot + 0.01 * ((seed + step) % 2), "missing": {}})  # fmt: skip
  return rows


def claims(rows) -> dict[str, str]:
  about = grid.settings() | {"draws": 200, "level": 8.0, "margins": {"f_all": 0.02}}
  found = json.loads(json.dumps(run.findings(rows, about)))
  text = report.markdown(found, rows)
  assert "None" not in text and "nan" not in text
  return {name: line.split("**")[1] for name, _ in report.CLAIMS for line in text.splitlines()
          if line.startswith(f"| {name}:")}  # fmt: skip


def test_a_table_that_bears_the_claims_out():
  assert claims(table(0.05, 0.05)) == {"C1": "agrees", "C2": "agrees", "C3": "agrees", "C4": "agrees"}


def test_where_no_size_is_enough_nothing_is_known_of_the_fourth():
  far = [row | {"b": row["b"] + 40.0} for row in table(0.05, 0.05)]
  about = grid.settings() | {"draws": 200, "level": 48.0, "margins": {"f_all": 0.02}}
  verdict, told = report.claim_4(json.loads(json.dumps(run.findings(far, about))))
  assert verdict == "undecided" and "none (" in told


def test_a_remedy_that_works_contradicts_the_third_claim():
  assert claims(table(0.05, 0.0))["C3"] == "disagrees"


def test_performance_that_rises_with_forgetting_contradicts_the_first():
  assert claims(table(0.05, 0.05, down=20.0))["C1"] == "disagrees"


def test_forgetting_stereotypes_alone_contradicts_the_second():
  assert claims(table(-0.05, -0.05))["C2"] == "disagrees"


def test_what_was_not_measured_is_not_claimed():
  rows = [row | {"downstream": None, "missing": {"downstream": "nobody asked"}} for row in table(0.05, 0.05)]
  assert claims(rows)["C1"] == report.NOTHING
  assert math.isfinite(run.findings(rows, grid.settings())["tolerance"])
