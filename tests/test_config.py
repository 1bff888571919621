"""Config files, overrides from the command line, validation, and the hash that a run is known by."""

from __future__ import annotations

import copy

import pytest

from jaxbias import config as configs
from jaxbias import methods
from jaxbias.config import config_hash, differing_keys, from_command_line, to_dict, validate
from jaxbias.errors import UserError

FILE = """
from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  {change}
  with c.unlocked():
    c.variants = {{name: methods.variant(name) for name in ("npo", "sft")}}
  return c
"""


@pytest.fixture
def file(tmp_path):
  """file(change) writes a config file with that line in its get_config(), and returns its path."""

  def make(change: str = "c.train.steps = 20"):
    path = tmp_path / "a config.py"
    path.write_text(FILE.format(change=change))
    return path

  return make


@pytest.fixture
def config(file):
  """config(*overrides) is the merged config."""
  return lambda *overrides: from_command_line([f"--config={file()}", *overrides])[0]


def refusal(call, *arguments) -> str:
  with pytest.raises(UserError) as error:
    call(*arguments)
  assert "\n" not in str(error.value)
  return str(error.value)


# Files


def test_a_file_changes_the_defaults(config):
  c = config()
  assert c.train.steps == 20 and c.train.learning_rate == configs.defaults().train.learning_rate
  validate(c)


def test_the_defaults_and_every_config_are_locked(config):
  for c in (configs.defaults(), config()):
    for section in (c, c.train):
      with pytest.raises(AttributeError, match="locked"):
        section.stepz = 3


def test_what_is_not_about_the_config_is_handed_back(file):
  path = file()
  c, rest = from_command_line(["--workdir=x", f"--config={path}", "--config.train.steps=3", "y"])
  assert c.train.steps == 3 and rest == ["--workdir=x", "y"]


@pytest.mark.parametrize("change, said", [
  ("c.train.stepz = 3", "line 8: no key is called `stepz`; did you mean `steps`?"),
  ("c.modle = 'x'", "line 8: no key is called `modle`; did you mean `model`?"),
  ("c.train.steps = 'many'", "line 8: TypeError: Could not override field 'steps'"),
  ("c.train.steps = undefined", "line 8: NameError: name 'undefined' is not defined"),
  ("c.train.steps = (3", "line 8: SyntaxError: "),
  ("import nowhere", "line 8: ModuleNotFoundError: No module named 'nowhere'"),
  ("methods.variant('nppo')", "line 8: there is no method `nppo`; did you mean `npo`?"),
  ("return None", "get_config() has to return jaxbias.config.defaults() with changes."),
  ("return {'train': 3}", "get_config() has to return jaxbias.config.defaults() with changes."),
])  # fmt: skip
def test_a_fault_in_a_file_is_one_line_with_its_place(file, change, said):
  path = file(change)
  told = refusal(from_command_line, [f"--config={path}"])
  assert told.startswith(str(path)) and said in told


def test_a_file_without_get_config(tmp_path):
  (tmp_path / "c.py").write_text("x = 1\n")
  assert refusal(from_command_line, [f"--config={tmp_path / 'c.py'}"]) == (
    f"{tmp_path / 'c.py'} has no get_config(); see configs/quickstart.py for one.")  # fmt: skip


def test_no_file_at_all(tmp_path):
  assert refusal(from_command_line, []) == "name a config, e.g. --config=configs/quickstart.py."
  assert refusal(from_command_line, ["--config=none.py"]) == (
    "there is no config file none.py; see configs/ for those that exist.")  # fmt: skip
  assert "there is no config file" in refusal(from_command_line, [f"--config={tmp_path}"])
  (tmp_path / "mine.py").write_text("")
  assert refusal(from_command_line, [f"--config={tmp_path}/mien.py"]).endswith(f"did you mean `{tmp_path}/mine.py`?")


# Overrides


@pytest.mark.parametrize("override, key, value", [
  ("--config.train.steps=40", "train.steps", 40),
  ("--config.train.learning_rate=2", "train.learning_rate", 2.0),
  ("--config.train.learning_rate=3e-4", "train.learning_rate", 3e-4),
  ("--config.train.weight_decay=0", "train.weight_decay", 0.0),
  ("--config.mesh.data=-1", "mesh.data", -1),
  ("--config.train.remat=true", "train.remat", True),
  ("--config.train.remat=False", "train.remat", False),
  ("--config.model=/a folder/with=signs", "model", "/a folder/with=signs"),
  ("--config.data.split_file=", "data.split_file", ""),
  ("--config.seeds=(0, 1, 2)", "seeds", (0, 1, 2)),
  ("--config.seeds=(3,)", "seeds", (3,)),
  ("--config.seeds=5", "seeds", (5,)),
  ("--config.compare=('sft', 'npo')", "compare", ("sft", "npo")),
  ("--config.lora.targets=('q',)", "lora.targets", ("q",)),
  ("--config.variants.npo.losses.npo.beta=0.2", "variants.npo.losses.npo.beta", 0.2),
  ("--config.variants.npo.losses.kl.on=retain", "variants.npo.losses.kl.on", "retain"),
])  # fmt: skip
def test_an_override_changes_one_key(config, override, key, value):
  before, c = configs._flat(to_dict(config())), config(override)
  found = configs._flat(c)[key]
  assert found == value and type(found) is type(value)
  assert {k for k, v in configs._flat(to_dict(c)).items() if v != before[k]} <= {key}


def test_later_overrides_win_and_several_go_together(config):
  c = config("--config.train.steps=3", "--config.seeds=(7,)", "--config.train.steps=4")
  assert (c.train.steps, c.seeds) == (4, (7,))


@pytest.mark.parametrize("override, said", [
  ("--config.train.stepz=3", "{file} has no key `train.stepz`; did you mean `train.steps`?"),
  ("--config.learning_rate=3", "{file} has no key `learning_rate`; did you mean `train.learning_rate`?"),
  ("--config.eval=3", "{file}: `eval` is a section; set one of its keys: eval.bootstrap_draws, "
   "eval.scoring, eval.split."),
  ("--config.variants.npo.losses.npo.betta=3",
   "{file} has no key `variants.npo.losses.npo.betta`; did you mean `variants.npo.losses.npo.beta`?"),
  ("--config.train.steps", "--config.train.steps has no value; write --config.train.steps=VALUE."),
  ("--config.train.steps=x", "--config.train.steps=x: `train.steps` has to be a whole number; it is 20 in {file}."),
  ("--config.train.steps=2.5", "--config.train.steps=2.5: `train.steps` has to be a whole number; it is 20 in {file}."),
  ("--config.train.weight_decay=some",
   "--config.train.weight_decay=some: `train.weight_decay` has to be a number; it is 0.0 in {file}."),
  ("--config.train.remat=perhaps",
   "--config.train.remat=perhaps: `train.remat` has to be true or false; it is False in {file}."),
  ("--config.seeds=(0,", "--config.seeds=(0,: `seeds` has to be a tuple; it is (0,) in {file}."),
])  # fmt: skip
def test_an_override_that_cannot_be(config, file, override, said):
  assert refusal(config, override) == said.format(file=file())


# Validation


@pytest.mark.parametrize("override, said", [
  ("train.steps=0", "train.steps = 0; it must be positive."),
  ("train.learning_rate=-1", "train.learning_rate = -1.0; it must be positive."),
  ("train.learning_rate=nan", "train.learning_rate = nan; it must be positive."),
  ("train.checkpoint_every=0", "train.checkpoint_every = 0; it must be positive."),
  ("train.clip_norm=0", "train.clip_norm = 0.0; it must be positive."),
  ("eval.bootstrap_draws=0", "eval.bootstrap_draws = 0; it must be positive."),
  ("train.warmup_steps=21", "train.warmup_steps = 21 is not between 0 and train.steps = 20."),
  ("train.schedule=cosin", "train.schedule = `cosin` is not known; did you mean `cosine`?"),
  ("eval.split=dev", "eval.split = `dev` is not known; choose from test, train, validation."),
  ("eval.scoring=mean", "eval.scoring = `mean` is not known; did you mean `token_mean`?"),
  ("dtype=float16", "dtype = `float16` is not known; did you mean `bfloat16`?"),
  ("train.rows.retain=0", "train.rows = {'forget': 8, 'general': 8, 'retain': 0}; every role needs at least one text"),
  ("lora.rank=0", "lora.rank = 0; it must be at least 1, or 0 where train.base names what trains."),
  ("seeds=()", "seeds is empty; give at least one"),
  ("seeds=(1,1)", "seeds = (1, 1); each must be a whole number from 0 on, and appear once."),
  ("seeds=('a',)", "seeds = ('a',); each must be a whole number from 0 on, and appear once."),
  ("seeds=(-1,)", "seeds = (-1,); each must be a whole number from 0 on, and appear once."),
  ("compare=('nppo',)", "compare names the variant `nppo`, which is not there; did you mean `npo`?"),
])  # fmt: skip
def test_a_value_that_no_run_could_use(config, override, said):
  assert refusal(validate, config(f"--config.{override}")).startswith(said)


def test_a_misspelt_key_of_a_variant_is_named(config):
  c = config()
  with c.unlocked():
    c.variants.npo.remedi = {"l2sp": 1.0}
  assert refusal(validate, c) == "the key of variants.npo = `remedi` is not known; did you mean `remedy`?"


@pytest.mark.parametrize("name, texts, said", [
  ("cda", {"corpsu": "random"}, "the texts of the method `cda` have no setting `corpsu`; did you mean `corpus`?"),
  ("sft", {"n": 3}, "the texts of the method `sft` have no setting `n`; leave `texts` out."),
])  # fmt: skip
def test_a_setting_of_texts_that_a_method_has_not_is_named(name, texts, said):
  assert refusal(methods.recipe, name, texts) == said


def test_variants_are_needed_and_whole(config):
  c = config()
  with c.unlocked():
    del c.variants.npo["losses"]
  assert refusal(validate, c) == "variants.npo has no `losses`; make it with jaxbias.methods.variant."
  with c.unlocked():
    c.variants = {}
  assert "variants is empty; give at least one" in refusal(validate, c)


def test_a_variant_is_a_copy_of_its_method():
  one, two = methods.variant("npo"), methods.variant("npo")
  one["losses"]["npo"]["beta"] = 9.0
  assert two == methods.variant("npo") != one


def test_the_order_of_the_table(config):
  assert configs.compared(config()) == ("npo", "sft")
  assert configs.compared(config("--config.compare=('sft', 'npo')")) == ("sft", "npo")


# The hash


def test_the_hash_depends_on_values_and_on_nothing_else(config):
  plain = to_dict(config())
  shuffled = dict(reversed([(key, copy.deepcopy(value)) for key, value in plain.items()]))
  assert config_hash(plain) == config_hash(shuffled) == config_hash(to_dict(config()))
  assert len(config_hash(plain)) == 12 and int(config_hash(plain), 16) >= 0
  assert config_hash({"a": 1, "b": [1, 2]}) == "e6f20bdc3757"  # recorded runs are known by it: it must not change
  assert config_hash(to_dict(config("--config.train.steps=21"))) != config_hash(plain)
  assert config_hash(to_dict(config("--config.seeds=(1,)"))) != config_hash(plain)


def test_the_keys_that_differ(config):
  ours, theirs = to_dict(config("--config.train.steps=3", "--config.model=x")), to_dict(config())
  assert differing_keys(ours, ours) == []
  assert differing_keys(ours, theirs) == ["model: 'smollm2-135m-instruct' there, 'x' here",
                                          "train.steps: 20 there, 3 here"]  # fmt: skip
  del theirs["train"]["steps"]
  assert "train.steps: (absent) there, 3 here" in differing_keys(ours, theirs)
