"""A controller in the loop: roles exchanged by type, decisions written down, and repeated by a continued run."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from jaxbias import cli
from jaxbias.compare import Comparison
from jaxbias.data.pipeline import text_segment
from jaxbias.errors import UserError
from jaxbias.methods.controllers import Phase
from jaxbias.methods.recipes import Row
from jaxbias.models import adapted
from jaxbias.train.batches import Texts
from tests.train import Workplace, lines, read, untimed


def texts(paired: bool, roles=("forget", "retain", "general")) -> Texts:
  domains = {"forget": "aabb", "retain": "aabb", "general": ["", ""]}
  rows = {role: tuple(Row(f"{role}{i}", "x", 0, d) for i, d in enumerate(domains[role])) for role in roles}
  segments = {role: tuple(text_segment([1, 10 * n + i], 1) for i, _ in enumerate(rows[role]))
              for n, role in enumerate(roles)}  # fmt: skip
  return Texts(rows, segments, paired)


def ids(found: Texts, role: str) -> list[str]:
  for row, segment in zip(found.rows[role], found.segments[role], strict=True):
    number = ("forget", "retain", "general").index(row.id[:-1])
    assert segment.target.tolist() == [10 * number + int(row.id[-1])], "a segment travels with its row"
  return [row.id for row in found.rows[role]]


def test_types_that_are_swapped_change_roles_and_the_others_do_not():
  found = texts(paired=False).in_phase(Phase(10, swapped=("b",)))
  assert ids(found, "forget") == ["forget0", "forget1", "retain2", "retain3"]
  assert ids(found, "retain") == ["retain0", "retain1", "forget2", "forget3"]
  assert ids(found, "general") == ["general0", "general1"]
  paired = texts(paired=True).in_phase(Phase(10, swapped=("a",)))
  assert ids(paired, "forget") == ["retain0", "retain1", "forget2", "forget3"]
  assert ids(paired, "retain") == ["forget0", "forget1", "retain2", "retain3"]


@pytest.mark.parametrize("paired", [False, True])
def test_one_type_alone_and_exchanging_twice(paired):
  found = texts(paired).in_phase(Phase(10, only="b", swapped=("b",)))
  assert ids(found, "forget") == ["retain2", "retain3"] and ids(found, "retain") == ["forget2", "forget3"]
  assert ids(found, "general") == ["general0", "general1"]
  twice = texts(paired).in_phase(Phase(10, swapped=("a", "b"))).in_phase(Phase(10, swapped=("a", "b")))
  assert [ids(twice, role) for role in twice.rows] == [ids(texts(paired), role) for role in twice.rows]


def test_a_phase_without_texts_and_an_objective_without_both_roles_are_refused():
  with pytest.raises(UserError, match="no text of the type `c` can play the role `forget`"):
    texts(paired=False).in_phase(Phase(10, only="c"))
  with pytest.raises(UserError, match="does not read both"):
    texts(paired=False, roles=("retain",)).in_phase(Phase(10))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


MINE = ("biasunlearn", "biasunlearn_published")


def command(tiny, workdir, **more) -> list[str]:
  settings = {"compare": "('biasunlearn',)", "seeds": "(0,)", "train.steps": 8, "train.checkpoint_every": 3,
              "train.learning_rate": 0.05, "control.name": "signed", "control.every": 2, "control.tolerance": 0.001,
              "control.hysteresis": 0.0} | more  # fmt: skip
  return ["compare", "--config", str(tiny.config), "--workdir", str(workdir),
          *(f"--config.{key}={value}" for key, value in settings.items())]  # fmt: skip


@pytest.fixture(scope="module")
def controlled(tiny, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXBIAS_CACHE", str(tiny.cache))
    workdir = tmp_path_factory.mktemp("controlled") / "run"
    config = tiny.config.read_text()
    tiny.config.write_text(config.replace("for name in c.compare}", "for name in (*c.compare, *MINE)}")
                           .replace("def get_config", f"MINE = {MINE}\n\n\ndef get_config"))
    assert cli.main(command(tiny, workdir)) == 0
    yield workdir


def test_the_log_says_what_was_seen_and_decided(controlled):
  run = controlled / "biasunlearn-seed0"
  log = lines(run / "controller.jsonl")
  assert [line["step"] for line in log] == [2, 4, 6, 8]
  for line, following in zip(log, log[1:], strict=False):
    expected = {t for t, s in line["scores"].items() if s < 50} | (
      set(line["next"]["swapped"]) & {t for t, s in line["scores"].items() if s == 50})  # fmt: skip
    assert set(line["next"]["swapped"]) == expected and line["next"]["until"] == following["step"]
  gaps = [round(max(abs(s - 50) for s in line["scores"].values()), 1) for line in log]
  best = max(i for i, line in enumerate(log) if line["best"])
  assert gaps[best] == min(gaps)
  assert {int(p.name) for p in (run / "checkpoints").iterdir()} >= {6, 8, log[best]["step"]}, "the best state is kept"
  assert adapted.find(run).step == log[best]["step"], "and the run's folder as a model is the best state"


def test_a_continued_run_decides_as_an_uninterrupted_one(controlled, tiny, tmp_path):
  again = tmp_path / "run"
  shutil.copytree(controlled, again)
  run = again / "biasunlearn-seed0"
  (run / "evaluation.json").unlink()
  newest = max(run.joinpath("checkpoints").iterdir(), key=lambda p: int(p.name))
  shutil.rmtree(newest)
  assert cli.main(command(tiny, again)) == 0
  for file in ("controller.jsonl", "metrics.jsonl"):
    assert untimed(lines(run / file)) == untimed(lines(controlled / "biasunlearn-seed0" / file))
  assert read(run / "evaluation.json")["scores"] == read(controlled / "biasunlearn-seed0" / "evaluation.json")["scores"]


def test_what_decides_may_not_be_what_is_reported(tiny, tmp_path, controlled, capsys):
  assert cli.main(command(tiny, tmp_path / "x", **{"control.split": "test"})) == 2
  assert "control.split = eval.split = `test`" in capsys.readouterr().err


def test_the_controller_looks_at_the_model_that_is_reported(controlled, tiny, tmp_path):
  """`adapter_scale` multiplies the adapters (alpha 16, rank 2) that are looked at, too."""
  seen = []
  real = Comparison.control

  def control(job):
    found = real(job)
    noted = lambda adapters: seen.append(np.unique(adapters["lora_scale"]["scale"])) or found.look(adapters)
    return dataclasses.replace(found, look=noted)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Comparison, "control", control)
    settings = {"train.steps": 2, "variants.biasunlearn.adapter_scale": 0.25}
    assert cli.main(command(tiny, tmp_path / "scaled", **settings)) == 0
  assert [scale.tolist() for scale in seen] == [[2.0]]


def test_a_phase_with_its_own_schedule_starts_with_fresh_moments(controlled, tiny, tmp_path):
  """train.py's rule: behind the first look the optimizer and its schedule begin anew, at the phase's rate. The type
  that is trained alone from then on has texts of its own."""
  from jaxbias.methods import controllers
  from jaxbias.train.loop import Trainer

  seen = []
  real = controllers.Published("train", order=("gender", "race"), max_steps=100)
  early = lambda script, max_steps, processes: type("Early", (), {
    "first": lambda self: dataclasses.replace(real.first(), until=2),
    "next": lambda self, phase, step, scores: dataclasses.replace(real.next(phase, step, scores), until=step + 3),
  })()  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    moments = Trainer.fresh_moments
    patch.setattr("jaxbias.compare.Published", early)
    patch.setattr(controllers.Published, "centres", property(lambda self: {"gender": 0.0, "race": 0.0}))
    patch.setattr(Trainer, "fresh_moments", lambda self, *a: seen.append(1) or moments(self, *a))
    settings = {"control.name": "published", "compare": "('biasunlearn_published',)"}
    assert cli.main(command(tiny, tmp_path / "published", **settings)) == 0
  run = tmp_path / "published" / "biasunlearn_published-seed0"
  log = lines(run / "controller.jsonl")
  assert [line["step"] for line in log] == [2, 5, 8]
  assert log[0]["next"]["schedule_steps"] == 3000 and log[0]["next"]["only"] in ("gender", "race")
  assert len(seen) >= 3  # at the start, and behind each look that began a phase
  losses = [line["loss"] for line in lines(run / "metrics.jsonl")]
  assert len(losses) == 8 and np.isfinite(losses).all()
