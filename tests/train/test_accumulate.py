"""A step in parts is the whole step: loss, parts, gradient; and what cannot be cut is refused by name."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from jaxbias import compare as comparison
from jaxbias import config as configs
from jaxbias.data.pipeline import Shape
from jaxbias.errors import UserError
from jaxbias.losses.registry import LOSSES, parse
from jaxbias.methods.recipes import Recipe, Row
from jaxbias.models import language_model
from jaxbias.train.batches import Sampler, plan_shape, tokenise
from jaxbias.train.loop import Trainer
from jaxbias.train.step import make_train_step
from tests.train import Workplace

ADDITIVE = {
  "sft": {}, "sft:tokens": {"reduction": "token_mean"}, "ga": {"weight": 0.1}, "kl": {}, "npo": {}, "simnpo": {},
  "kl:padded": {"over": "padded"}, "unlikelihood": {}, "wga": {}, "satimp": {}, "undial": {"weight": 0.1}, "dpo": {},
  "rmu": {"steer": 1.0}, "rmu_retain": {}, "simpo": {}, "orpo": {}, "ram": {}, "clp": {},
  "clp:odds": {"form": "log_odds"}, "l2sp": {}, "ewc": {"weight": 2.0}, "distill": {}, "adept_anchor": {},
}  # fmt: skip
GROUPED = {"contrast": {}, "group_ce": {}, "sft": {"on": "general"}}
COUPLED = {
  "kto": {}, "infonce": {}, "supcon": {}, "mabel_contrast": {}, "mabel_alignment": {}, "nc3": {}, "adept": {},
  "ase_orthogonal": {}, "npo": {"reduction": "batch_token_mean"}, "contrast": {"w_mode": "batch_flag"},
  "contrast:n": {"normalize_w": "yes"}, "contrast:e": {"w_mode": "entity_rate"}, "sft": {"scale": "ema"},
  "ga": {"scale": "uncertainty"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


@pytest.fixture(scope="module")
def trainer(tiny) -> Trainer:
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXBIAS_CACHE", str(tiny.cache))
    config = configs.from_command_line([f"--config={tiny.config}"])[0]
    return Trainer.of(language_model.load(config.model, "float32"), config)


def paired() -> Recipe:
  texts = lambda role, end: tuple(Row(f"{role} {n}", "the cat " * n + end, 8 * n) for n in range(1, 6))
  return Recipe(texts("forget", "a hat."), texts("retain", "is a hat."), texts("general", "and the others"), True)


def grouped() -> Recipe:
  def members(group: int, role: str, count: int) -> list[Row]:
    source = f"the {'ca' * group}t "
    return [Row(f"{group} {role} {n}", source + f"sat {role[n:]} here", len(source), group=group, kind="swap_ent",
                entities=((len(source), len(source) + 3),)) for n in range(count)]  # fmt: skip

  of = lambda role, count: tuple(row for group in range(1, 5) for row in members(group, role, count))
  return Recipe(of("forget", 2), of("retain", 3), paired().general, False)


@pytest.fixture(scope="module")
def stepped(trainer):
  """`first_step` of the trainer, once for each of its arguments."""
  return functools.cache(functools.partial(first_step, trainer))


def first_step(trainer: Trainer, losses: str, parts: int):
  """(metrics, gradient, program's text) of the first step, away from the start, its texts in so many parts."""
  objective, coefficients = parse(ADDITIVE if losses == "paired" else GROUPED)
  texts = tokenise(paired() if losses == "paired" else grouped(), objective, trainer.model.tokenizer, 256)
  counts = {"forget": 4, "retain": 4, "general": 5, "groups": 4, "positives": 3, "negatives": 2}
  sampler = Sampler(texts, objective, counts, None, 0, 1, parts)
  state, rng = trainer.initial_state(0, objective), np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), state.params)
  tx = optax.identity()
  state = state.replace(params=params, opt_state=tx.init(params))
  fisher = {name: np.ones_like(leaf) for name, leaf in kernels(trainer).items()}
  frozen = {"params": trainer.model.params, "lora_scale": trainer.scale, "fisher": fisher}
  traced = jax.tree.map(np.float32, {"learning_rate": 1.0, "losses": coefficients})
  batch, ids = sampler.batch(0, plan_shape([sampler], 1))
  step = make_train_step(trainer.model.module, objective, tx, parts)
  text = step.lower(state, frozen, batch, traced).compile().as_text()
  moved, metrics = step(state, frozen, batch, traced)
  return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), params, moved.params), text, batch, ids


def kernels(trainer: Trainer) -> dict:
  layers = trainer.model.params["layers"]
  return {name: functools.reduce(lambda tree, key: tree[key], name.split("/")[1:], layers) for name in trainer.moved}


@pytest.mark.parametrize("losses", ["paired", "grouped"])
@pytest.mark.parametrize("parts", [2, 4])
def test_in_parts_it_is_the_whole_step(stepped, losses, parts):
  alone, gradient, text, batch, ids = stepped(losses, 1)
  metrics, found, in_parts, cut, same = stepped(losses, parts)
  assert same == ids and cut.tokens.shape[0] == parts and (cut.segment > 0).sum() == (batch.segment > 0).sum()
  assert metrics["finite"] and metrics["parts"].keys() == alone["parts"].keys()
  for name, value in alone["parts"].items():
    np.testing.assert_allclose(metrics["parts"][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert value != 0, name
  np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-5)
  total = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
  assert total > 0.1
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    there = functools.reduce(lambda tree, key: tree[key.key], path, found)
    assert np.linalg.norm(there - leaf) < 1e-5 * np.linalg.norm(leaf) + 1e-7 * total, path
  assert in_parts.count(" dot(") <= text.count(" dot("), "counting the weights multiplied no matrices"


def test_every_loss_is_additive_or_refused():
  names = lambda losses: {key.split(":")[0] for key in losses}
  classifiers = {name for name in LOSSES if name.startswith("classif")}
  assert names(ADDITIVE) | names(GROUPED) | names(COUPLED) == set(LOSSES) - classifiers
  assert parse(ADDITIVE)[0].coupled() is parse(GROUPED)[0].coupled() is None
  for key, settings in COUPLED.items():
    assert f"losses.{key}" in parse({"sft:other": {"on": "general"}, key: settings})[0].coupled()


def test_what_cannot_be_cut_is_refused_by_name(tiny, trainer, tmp_path, monkeypatch):
  monkeypatch.setenv("JAXBIAS_CACHE", str(tiny.cache))
  config = configs.from_command_line([f"--config={tiny.config}", "--config.train.accumulate=2"])[0]
  with config.unlocked():
    config.variants.npo.losses.npo.reduction = "batch_token_mean"
  with pytest.raises(UserError, match="would change what is trained: losses.npo with reduction = batch_token_mean"):
    comparison.prepare(config, tmp_path / "work", "a test")
  objective, _ = parse({"sft": {}})
  texts = tokenise(paired(), objective, trainer.model.tokenizer, 256)
  with pytest.raises(UserError, match="accumulate = 4 is more than the 3 texts, pairs or groups"):
    Sampler(texts, objective, {"retain": 3}, None, 0, 1, 4).batch(0, Shape(1, 64, 8, 8, 8))


def test_a_run_in_parts_ends_where_the_whole_one_does(tiny, tmp_path):
  from tests.train import lines

  command = ["train", "--config", tiny.config, "--variant=sft", "--config.seeds=(0,)"]
  for parts in (1, 2):
    done = tiny.run(*command, "--workdir", tmp_path / str(parts), f"--config.train.accumulate={parts}")
    assert done.returncode == 0, done.stderr
  ours, whole = (lines(tmp_path / parts / "sft-seed0" / "metrics.jsonl") for parts in "21")
  assert [line["tokens"] for line in ours] == [line["tokens"] for line in whole]
  np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in whole], rtol=1e-4)
