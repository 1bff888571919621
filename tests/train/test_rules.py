"""Optimizer rules by path: what they change, and that they cover every parameter."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from jaxbias import config as configs
from jaxbias.errors import UserError
from jaxbias.losses.registry import parse
from jaxbias.train.loop import NOTHING, Trainer
from jaxbias.train.optim import by_path
from tests.train import Workplace

PARAMS = {"layers": {"q": {"a": np.full(2, 2.0), "b": np.full(2, 3.0)}}, "losses": {"head": np.full(2, 5.0)}}
ONES = jax.tree.map(np.ones_like, PARAMS)


def test_without_rules_it_is_plain_weight_decay():
  ours, plain = by_path((), 0.1), optax.add_decayed_weights(0.1)
  got, expected = (tx.update(ONES, tx.init(PARAMS), PARAMS)[0] for tx in (ours, plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), got, expected)


def test_the_first_rule_that_matches_counts():
  tx = by_path((("layers/*/b", {"learning_rate": 4.0}), ("layers/*", {"weight_decay": 0.5}), ("*", {})), 0.1)
  got, _ = tx.update(ONES, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(got["layers"]["q"]["b"], 4 * (1 + 0.1 * 3), rtol=1e-6)
  np.testing.assert_allclose(got["layers"]["q"]["a"], 1 + 0.5 * 2, rtol=1e-6)
  np.testing.assert_allclose(got["losses"]["head"], 1 + 0.1 * 5, rtol=1e-6)


@pytest.fixture(scope="module")
def trainer_with(tmp_path_factory):
  """The tiny model's trainer under some rules."""
  tiny = Workplace.of(tmp_path_factory)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXBIAS_CACHE", str(tiny.cache))
    from jaxbias.models import language_model

    model = language_model.load(str(tiny.folder / "model"), "float32")

  def make(*rules) -> Trainer:
    config = configs.from_command_line([f"--config={tiny.config}"])[0]
    config.train.rules = rules
    configs.validate(config)
    return Trainer.of(model, config)

  return make


def test_rules_cover_every_parameter_and_each_covers_some(trainer_with):
  trainer_with().check_rules(NOTHING)
  trainer_with(("layers/*/a", {}), ("*/b", {"learning_rate": 2.0})).check_rules(NOTHING)
  with pytest.raises(UserError, match="no rule of train.rules covers the parameter layers/attention/q/b; end"):
    trainer_with(("*/a", {})).check_rules(NOTHING)
  with pytest.raises(UserError, match="train.rules has `layers/nlp/.`, which is no parameter's first match"):
    trainer_with(("layers/nlp/*", {}), ("*", {})).check_rules(NOTHING)
  objective, _ = parse({"contrast": {}})
  with pytest.raises(UserError, match="covers the parameter losses/contrast"):
    trainer_with(("layers/*", {})).check_rules(objective)
  with pytest.raises(UserError, match="each is .pattern, ..learning_rate"):
    trainer_with(("*", {"lr": 2.0}))
