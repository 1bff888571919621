"""RecAdam, mixout, frozen layers and fusion: their limits, weights that may not move, and a run that is continued."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias import config as configs
from jaxbias import methods
from jaxbias.data.pipeline import pack, place, text_segment, union
from jaxbias.errors import UserError
from jaxbias.losses.registry import parse
from jaxbias.models import adapted
from jaxbias.models.language_model import exchange
from jaxbias.models.lora import LoraConfig, LowRank, init_lora, lora_scale, merge, scaled
from jaxbias.models.transformer import Transformer, abstract_variables
from jaxbias.train import transforms
from jaxbias.train.checkpoint import Checkpoints
from jaxbias.train.optim import make_optimizer
from jaxbias.train.step import make_train_step
from jaxbias.train.trainable import collections, displacement
from jaxbias.types import ROLES, Batch, TrainState
from tests.models import tiny_config

LORA = LoraConfig(rank=2, targets=("q", "up"))
BASE = ("layers/mlp/down/kernel", "layers/mlp_norm/scale", "embedding")
RATE = 1e-2
flat = lambda tree: {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}


@functools.cache
def model() -> tuple[Transformer, dict, dict]:
  """A model, its parameters, and what a step is given that does not train."""
  module = Transformer(tiny_config(hidden_size=8, mlp_size=12, num_layers=2, num_heads=2, num_kv_heads=1))
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32)
  params = jax.tree.map(fill, nn.unbox(abstract_variables(module)))
  return module, params, {"params": params, "lora_scale": lora_scale(LORA, 2)}


def fresh(base=BASE, lora: bool = True) -> dict:
  """Trainable leaves of a run that has not begun."""
  _, params, _ = model()
  tree = init_lora(jax.random.key(0), params, LORA) if lora else {}
  leaves = {tuple(name.split("/")): leaf + 0 for name, leaf in flat(params).items() if name in base}
  return tree | ({"base": unflatten_dict(leaves)} if base else {})


def moved_from(tree: dict, size: float = 0.1) -> dict:
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: x + jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32), tree)


@functools.cache
def batch() -> Batch:
  rng = np.random.default_rng(0)
  segments = [text_segment(rng.integers(0, 23, 8), 3) for _ in range(4)]
  places, shape = place(segments, 16)
  shape = union([shape], 1)
  arrays = pack(segments, places, shape)
  arrays.pop("branch")
  role = np.full((shape.B, shape.S), -1, np.int32)
  for at in places:
    role[at.b, at.s] = ROLES.index("retain")
  return Batch(**arrays, role=role, pair=np.full_like(role, -1))


@functools.cache
def step_of(decay: float = 0.0):
  train = configs.defaults().train
  train.weight_decay, train.schedule, train.warmup_steps = decay, "constant", 0
  objective, coefficients = parse({"sft": {}})
  tx = make_optimizer(train)
  return make_train_step(model()[0], objective, tx), tx, coefficients


def run(params: dict, steps: int, remedy: dict, state: TrainState | None = None, decay: float = 0.0):
  """The state after `steps` more, and the losses on the way."""
  step, tx, losses = step_of(decay=decay)
  state = state or TrainState(jnp.int32(0), params, tx.init(params))
  state = jax.tree.map(jnp.copy, state)  # the step takes its argument's memory
  traced = jax.tree.map(jnp.float32, {"learning_rate": RATE, "losses": losses, "remedy": remedy})
  found = []
  for _ in range(steps):
    state, metrics = step(state, model()[2], batch(), traced | {"mixout_key": jax.random.key(7)})
    found.append(float(metrics["loss"]))
  return state, found


def same(one, other) -> None:
  jax.tree.map(assert_array_equal, one, other)


# How far weights are


def test_displacement_is_the_difference_of_the_models_weights():
  module, params, frozen = model()
  trained = moved_from(fresh((*BASE, "layers/mlp/up/kernel")))
  found = displacement(trained, frozen)
  assert isinstance(found["layers/attention/q/kernel"], LowRank), "adapters alone stay factors"
  used = collections(trained, frozen)
  whole = flat(merge(used["params"], used["lora"], used["lora_scale"]))
  for name, start in flat(params).items():
    each = found.get(name, jnp.zeros(()))
    each = each.dense() if isinstance(each, LowRank) else each
    assert_allclose(start + each, whole[name], atol=1e-6, err_msg=name)
  start = displacement(fresh(), frozen)
  assert all(not (x.dense() if isinstance(x, LowRank) else x).any() for x in start.values())


# Mixout


def test_mixouts_identities():
  """The formula as it is published; what did not move stays; p = 0 is the weight itself."""
  rng = np.random.default_rng(0)
  w, w0 = (jnp.asarray(rng.standard_normal((50, 40)), jnp.float32) for _ in range(2))
  key, p = jax.random.key(0), 0.7
  found = transforms.mixout(key, w0, w - w0, p)
  M = jax.random.bernoulli(key, p, w.shape)
  assert_allclose(found, ((1 - M) * w + M * w0 - p * w0) / (1 - p), atol=2e-5)
  assert_array_equal(transforms.mixout(key, w0, jnp.zeros_like(w), p), w0)
  assert_allclose(transforms.mixout(key, w0, w - w0, 0.0), w, atol=1e-6)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_mixouts_mean_is_the_weight(p):
  w, w0, draws = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.5]), 40_000
  keys = jax.random.split(jax.random.key(1), draws)
  found = jax.jit(jax.vmap(lambda key: transforms.mixout(key, w0, w - w0, p)))(keys)
  error = np.abs(w - w0) * np.sqrt(p / (1 - p) / draws)
  assert (np.abs(found.mean(0) - w) < 5 * error).all()
  assert_allclose(found.std(0), error * np.sqrt(draws), rtol=0.05)


def test_mixout_changes_the_forward_pass_of_what_moved_and_is_seeded_by_the_step():
  start, moved = fresh(), moved_from(fresh())
  plain, mixed = run(start, 1, {})[1], run(start, 1, {"mixout": 0.5})[1]
  assert_allclose(mixed, plain, rtol=1e-6)  # nothing to thin out yet
  _, tx, _ = step_of()
  at = lambda step: TrainState(jnp.int32(step), moved, tx.init(moved))
  loss_at = lambda step, p: run(moved, 1, {"mixout": p}, at(step))[1][0]
  assert loss_at(3, 0.5) == loss_at(3, 0.5) != loss_at(4, 0.5)
  assert abs(loss_at(3, 0.5) - run(moved, 1, {}, at(3))[1][0]) > 1e-4
  assert_allclose(loss_at(3, 0.0), run(moved, 1, {}, at(3))[1][0], rtol=1e-5)  # adapters multiplied out, all kept


# RecAdam


def gradients(params: dict) -> dict:
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)


def recalled(step: float, params: dict, **settings) -> tuple[dict, dict]:
  """(update, Adam's own update) of one step, and equal moments."""
  adam = optax.scale_by_adam()
  tx = transforms.recalling(adam)
  recadam = {"gamma": 1 / RATE, "kappa": 0.5, "midpoint": 100.0} | settings
  recall = transforms.recall(jnp.float32(step), params, model()[2], recadam)
  update, state = tx.update(gradients(params), tx.init(params), params, recall=recall)
  plain, plain_state = adam.update(gradients(params), adam.init(params), params)
  same(state, plain_state)  # the quadratic term is outside the moments
  return update, plain


def test_recadam_is_adam_at_last():
  jax.tree.map(lambda x, y: assert_allclose(x, y, atol=1e-6), *recalled(1000, moved_from(fresh())))


def test_recadam_pulls_straight_to_the_start_at_first():
  """At gamma x rate = 1 and k = 0 one step ends at theta_0."""
  params = moved_from(fresh(lora=False))
  update, _ = recalled(-1000, params)
  after = jax.tree.map(lambda w, u: w - RATE * u, params, update)
  jax.tree.map(lambda x, y: assert_allclose(x, y, atol=1e-6), after, fresh(lora=False))


def test_recadam_in_the_middle_is_half_of_each():
  params = moved_from(fresh(lora=False))
  update, plain = recalled(99, params, gamma=3.0)  # steps count from 1
  pull = jax.tree.map(lambda w, w0: 3.0 * (w - w0), params, fresh(lora=False))
  jax.tree.map(lambda u, a, q: assert_allclose(u, (a + q) / 2, atol=1e-5), update, plain, pull)


def test_recadam_draws_adapters_back_and_leaves_a_losss_own_parameters_to_adam():
  params = moved_from(fresh(base=())) | {"losses": {"contrast": {"w": jnp.ones(3)}}}
  update, plain = recalled(-1000, params, gamma=1.0)
  same(update["losses"], plain["losses"])
  far = lambda tree: float(transforms.total_square(displacement(tree, model()[2]).values()))
  after = jax.tree.map(lambda w, u: w - RATE * u, params, update)
  slope = jax.grad(lambda tree: 0.5 * transforms.total_square(displacement(tree, model()[2]).values()))(params)
  same(update["layers"], slope["layers"])
  assert far(after) < far(params)


def test_a_run_under_recadam_stays_nearer_to_the_start():
  free, held = (run(fresh(), 6, remedy)[0].params for remedy in (
    {}, {"recadam": {"gamma": 50.0, "kappa": 0.1, "midpoint": 1000.0}}))  # fmt: skip
  far = lambda tree: float(transforms.total_square(displacement(tree, model()[2]).values()))
  assert 0 <= far(held) < 1e-6 < 0.01 < far(free)


# Frozen layers


@pytest.mark.parametrize("remedy", [{}, {"recadam": {"gamma": 5.0, "kappa": 0.1, "midpoint": 2.0}, "mixout": 0.3}])
def test_weights_of_other_layers_do_not_change_by_a_bit(remedy):
  """Under weight decay, a pull and mixout, too; and what is not in `train.base` is not even there to be changed."""
  mask = transforms.layer_mask((1, 2), model()[0].config)
  start = moved_from(fresh())
  after, _ = run(start, 3, remedy | {"layers": mask}, decay=0.1)
  for name, leaf in flat(after.params).items():
    before = flat(start)[name]
    if name == "base/embedding":
      assert (leaf != before).any(), name
    else:
      assert_array_equal(leaf[0], before[0], err_msg=name)
      assert (leaf[1] != before[1]).all(), name


def test_frozen_layers_do_not_count_in_clipping():
  step, tx, losses = step_of()
  start, mask = fresh(base=BASE, lora=False), transforms.layer_mask((0, 1), model()[0].config)
  state = TrainState(jnp.int32(0), start, tx.init(start))
  traced = jax.tree.map(jnp.float32, {"learning_rate": RATE, "losses": losses, "remedy": {"layers": mask}})
  norm = step(jax.tree.map(jnp.copy, state), model()[2], batch(), traced)[1]["gradient_norm"]
  whole = step(state, model()[2], batch(), traced | {"remedy": {"layers": jnp.ones(2)}})[1]["gradient_norm"]
  assert 0 < norm < whole


# From the config


SECTION = configs.to_dict(configs.defaults())["remedy"]
CONFIG = tiny_config()


def test_what_is_off_is_not_given_to_the_step():
  assert transforms.coefficients(SECTION, 40, CONFIG) == {}
  on = SECTION | {"recadam_gamma": 5e3, "mixout": 0.5, "layers": [1, 3]}
  found = transforms.coefficients(on, 40, CONFIG)["remedy"]
  assert found["recadam"] == {"gamma": 5e3, "kappa": 0.1, "midpoint": 10.0} and found["mixout"] == 0.5
  assert_array_equal(found["layers"], [0, 1, 1])


@pytest.mark.parametrize("layers,groups,said", [((2, 2), 3, "has layers 0 to 2"), ((0, 4), 3, "has layers 0 to 2"),
                                                ((1, 3), 1, "divides layers that share their weights")])  # fmt: skip
def test_layers_that_are_not_there_are_refused(layers, groups, said):
  with pytest.raises(UserError, match=said):
    transforms.layer_mask(layers, tiny_config(num_groups=groups))


@pytest.mark.parametrize("change,said", [
  ({"mixout": 1.0}, "variants.mine.remedy.mixout = 1.0; it must be"),
  ({"mixuot": 0.5}, "variants.mine.remedy has no key `mixuot`; did you mean `mixout`"),
  ({"recadam_gamma": 2e4}, "recadam_gamma x learning rate = 4; .* give less than 1e[+]04"),
  ({"recadam_kappa": 0.0}, "recadam_kappa must be positive"),
  ({"layers": (1,)}, "give the first layer and the one behind the last"),
  ({"fisher_texts": 0}, "at least one text"),
])  # fmt: skip
def test_a_remedy_that_cannot_be_is_refused(change, said):
  config = configs.defaults()
  with config.unlocked():
    config.variants = {"mine": methods.variant("sft")}
  configs.validate(config)
  with config.unlocked():
    config.variants["mine"]["remedy"] = change
  with pytest.raises(UserError, match=said):
    configs.validate(config)
  assert configs.remedy(config, "mine").items() >= change.items() and configs.remedy(config)["mixout"] == 0


def test_mixout_and_adapter_dropout_exclude_each_other():
  config = configs.defaults()
  config.remedy.mixout, config.lora.dropout = 0.5, 0.1
  with config.unlocked():
    config.variants = {"mine": methods.variant("sft")}
  with pytest.raises(UserError, match="lora.dropout would do nothing"):
    configs.validate(config)


# Continued


def test_a_run_continued_from_a_checkpoint_ends_with_the_same_bits(tmp_path):
  remedy = {"mixout": 0.5, "recadam": {"gamma": 5.0, "kappa": 1.0, "midpoint": 2.0}}
  whole, _ = run(fresh(), 4, remedy)
  half, _ = run(fresh(), 2, remedy)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(half, {})
  again = checkpoints.restore(half)
  checkpoints.close()
  same(run(fresh(), 2, remedy, again)[0], whole)


# Fusion


def test_fusion_goes_from_the_start_to_the_run_to_the_last_bit():
  module, params, frozen = model()
  trained = moved_from(fresh())
  adapters, tokens = collections(trained, frozen), jnp.arange(6)[None]
  states = jax.jit(lambda variables: module.apply(variables, tokens, jnp.ones_like(tokens), tokens)[0])
  of = lambda factor: states({"params": params, **scaled(adapters, factor, params)})
  assert_array_equal(of(0.0), states({"params": params}))
  assert_array_equal(of(1.0), states({"params": params, **adapters}))
  half = flat(scaled(adapters, 0.5, params)["params"])
  for name, leaf in flat(adapters["params"]).items():
    assert_allclose(half[name], (leaf + flat(params)[name]) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor,expected", [(None, 0.4), (0.0, 0.0), (1.0, 1.0), (-1.0, -1.0)])
def test_a_finished_run_is_loaded_as_far_along_as_one_asks(tmp_path, factor, expected):
  """By default as it was evaluated; a factor replaces that, for adapters and for weights that trained themselves."""
  module, params, _ = model()
  trained, checkpoints = moved_from(fresh()), Checkpoints(tmp_path / "checkpoints")
  about = {"model": "base", "lora": {"rank": 2, "alpha": 16.0, "targets": ["q", "up"], "layers": [], "dropout": 0.0},
           "variant": "mine", "variants": {"mine": {"adapter_scale": 0.4}}}  # fmt: skip
  checkpoints.save(TrainState(jnp.int32(1), trained, {}), about)
  checkpoints.close()
  found = adapted.find(tmp_path, factor)
  collected = found.read(module.config)
  assert found.factor == expected
  assert_allclose(collected["lora_scale"]["scale"], expected * 8.0)
  whole = flat(exchange(params, collected["params"], found.factor))
  for name in BASE:
    start = flat(params)[name]
    assert_allclose(whole[name], start + expected * (flat(trained["base"])[name] - start), atol=1e-6)
  if expected in (0.0, 1.0):
    same(whole["embedding"], (params, trained["base"])[int(expected)]["embedding"])
