"""Configs: defaults, command-line overrides, validation, the config's hash. No jax here, so that `--help` is quick.

A config file has `get_config()` returning `defaults()` with changes. `--config.train.steps=40` overrides one key;
a key that does not exist stops with the nearest one that does.
"""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from jaxbias.errors import UserError, did_you_mean

MESH_AXES = ("data", "fsdp", "tensor")
CHANGEABLE = ("mesh.", "train.keep_checkpoints")  # begins of keys on which a run's numbers do not depend
MESH_PRESETS = ("data", "fsdp", "fsdp_tensor")
SHARDING_RULES = {  # logical axis of a parameter -> the mesh axis that cuts it, "" = none
  "layers": "", "embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
}  # fmt: skip
VARIANT = ("method", "label", "losses", "learning_rate_scale", "adapter_scale", "remedy", "texts", "cell")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", tuple: "a tuple"}


def defaults() -> ConfigDict:
  """Every key that a run reads, with its default. The result is locked: new keys are errors."""
  c = ConfigDict()
  c.title = "Comparison of debiasing objectives"
  c.model = "smollm2-135m-instruct"  # a name, a folder, a .gguf file, or hf:org/name[@revision]
  c.dtype = "auto"  # of the computation and the frozen weights; auto = float32 on CPU, bfloat16 on accelerators
  c.mesh = {  # sizes: 0 = as the preset says, -1 = all devices that are left
    "preset": "data",  # data: a copy of the weights on each device; fsdp; fsdp_tensor. See docs/scaling.md
    "data": 0,
    "fsdp": 0,
    "tensor": 0,
    "rules": dict(SHARDING_RULES),
  }
  c.data = {
    "source": "builtin",  # or a path to StereoSet's own JSON
    "tasks": ("intrasentence",),  # of StereoSet, to train on; intersentence: continuations of a context
    "domains": (),  # bias types whose triples are read, such as ("gender",); empty = all
    "groups": "",  # a JSONL file of positives and negatives, see docs/data.md; empty = made from the triples
    "corpus": "",  # JSON lines {"id", "text"}: the pool that `cda` makes its texts of, see docs/diagnosis.md
    "roles": {"forget": "", "retain": "", "general": ""},  # own texts in place of the method's, see docs/data.md
    "max_tokens": 0,  # longer texts are cut; 0 = none is, and one past the model's window is refused
    "split_file": "",  # target terms of each split, for StereoSet; empty = by the hash rule of docs/data.md
  }
  c.lora = {
    "rank": 8,
    "alpha": 16.0,
    "targets": ("q", "k", "v", "o", "gate", "up", "down"),
    "layers": (),  # the first layer and the one behind the last, e.g. (0, 10); empty = all
    "dropout": 0.0,
  }
  c.train = {
    "steps": 40,
    "rows": {"forget": 8, "retain": 8, "general": 8},  # texts of each role in a step, over all devices
    "groups": {"groups": 4, "positives": 4, "negatives": 8},  # contrast groups in a step; at most so many of each
    "learning_rate": 2e-4,  # at its peak; a variant's learning_rate_scale multiplies it
    "warmup_steps": 4,
    "schedule": "linear",  # after the warm-up: constant, linear or cosine down to 0
    "weight_decay": 0.0,
    "rules": (),  # by path: (("layers/*/b", {"learning_rate": 4.0}), ("*", {"weight_decay": 0.1})), the first that fits
    "clip_norm": 1.0,
    "accumulate": 1,  # parts of a step's texts that are computed one after the other: the same step in less memory
    "checkpoint_every": 10,
    "keep_checkpoints": 2,  # the newest so many of a run stay, and the controller's best
    "checkpoints": "",  # where they go, such as gs://bucket/mine; empty = into the run's folder
    "base": (),  # parameters of the base that train beside the adapters: "embedding", "layers/mlp/*", "*"
    "reference": "cache",  # what the start model says: computed once and kept on disk, or anew in every "step"
    "remat": False,  # recompute activations in the backward pass: less memory, a third more arithmetic
  }
  c.remedy = {  # what changes the step to hold weights near their start; a variant's `remedy` replaces single keys
    "recadam_gamma": 0.0,  # RecAdam's pull (1 - k) gamma (theta - theta_0); 0 = plain Adam. Published: 5000
    "recadam_kappa": 0.1,  # k = sigma(kappa (t - t_0)) goes from 0 to 1
    "recadam_midpoint": 0.25,  # t_0, as a share of the steps
    "mixout": 0.0,  # share of weights that a step's forward pass takes from the start model
    "layers": (),  # only these train: the first and the one behind the last; empty = all that train.base and lora name
    "fisher_texts": 2048,  # general texts that the Fisher information of `ewc` is estimated on, at most
  }
  c.control = {  # exchange forget and retain texts of a bias type whose score fell below 50, and stop in time
    "name": "",  # signed: ours, by type, with hysteresis; published: BiasUnlearn's scripts; empty = none
    "split": "validation",  # looked at to decide; never the split that is reported
    "every": 10,  # signed: steps between looks
    "hysteresis": 1.0,  # signed: points around 50 within which nothing is exchanged
    "tolerance": 2.0,  # signed: done when every type is this near to 50
    "script": "train",  # published: train (GPT-2) or train_7b
    "processes": 1,  # published: GPUs of the script's run; its learning-rate schedules depend on them
  }
  c.watch = {  # what a run forgot so far, and where its loss parts pull: watch.jsonl, pictures; docs/forgetting.md
    "steps": "",  # looks after these, such as "0,10,100", and at the end; "log": 0, 1, 3, 10, 30, ...; empty = none
    "split": "validation",  # whose triples and general texts are read
    "general": "",  # JSON lines {"id", "text"}, read instead of the split's general texts
    "group": "",  # a field of these lines: forgetting for each of its values
    "batches": 2,  # of the run's first steps, on which gradients are taken
    "mask_draws": 4,  # masked models: copies of a general text
    "mask_share": 0.15,  # of its tokens, masked and scored in a copy
    "mask_seed": 0,
  }
  c.log = {  # beside metrics.jsonl and TensorBoard
    "wandb_project": "",  # of Weights & Biases, which has to be installed; empty = none
    "peak_tflops": 0.0,  # of one device, for MFU; 0 = as the maker says, where the device is known
  }
  c.seeds = (0,)
  c.variants = {}  # name -> {"method", "label", "losses", "learning_rate_scale"}; see jaxbias.methods.variant
  c.compare = ()  # which variants to run, in the table's order; empty = all, by name
  c.eval = {"split": "test", "scoring": "sum", "bootstrap_draws": 2000}
  c.lock()
  return c


def from_command_line(arguments: Sequence[str]) -> tuple[ConfigDict, list[str]]:
  """The config of `--config=FILE --config.key=value ...`, and the arguments that are not about it.

  Raises UserError for a missing file, a file without get_config(), an unknown key or a value of the wrong type.
  """
  mine = [a for a in arguments if a == "--config" or a.startswith(("--config=", "--config."))]
  rest = [a for a in arguments if a not in mine]
  file = next((a.split("=", 1)[1] for a in mine if a.startswith("--config=")), None)
  if file is None:
    raise UserError("name a config, e.g. --config=configs/quickstart.py.")
  if not Path(file).is_file():
    beside = [str(found) for found in Path(file).parent.glob("*.py")]
    close = did_you_mean(file, beside) if beside else "see configs/ for those that exist."
    raise UserError(f"there is no config file {file}; {close}")
  config = _read(file)
  for argument in (a for a in mine if a.startswith("--config.")):
    _override(config, argument, file)
  return config, rest


def _read(file: str) -> ConfigDict:
  """What the file's get_config() returns; whatever its code raises becomes one line that names the place."""
  known = _flat(defaults())
  try:
    names = runpy.run_path(file)
    config = names["get_config"]() if "get_config" in names else None
  except Exception as error:
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    places += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
    where = f"{file} line {places[-1]}" if places else file
    if missing := re.search(r'Key "(.+?)" does not exist', str(error)):
      valid = {part for key in known for part in key.split(".")}
      raise UserError(f"{where}: no key is called `{missing[1]}`; {did_you_mean(missing[1], valid)}") from None
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    raise UserError(f"{where}: {kind}{' '.join(said.split())}") from None
  if "get_config" not in names:
    raise UserError(f"{file} has no get_config(); see configs/quickstart.py for one.")
  if not isinstance(config, ConfigDict) or not known.keys() <= _flat(config).keys():
    raise UserError(f"{file}: get_config() has to return jaxbias.config.defaults() with changes.")
  config.lock()
  return config


def _override(config: ConfigDict, argument: str, file: str) -> None:
  """Change `config` in place as `--config.KEY=VALUE` says."""
  key, equals, _ = argument.removeprefix("--config.").partition("=")
  flat = _flat(config)
  if not equals:
    raise UserError(f"{argument} has no value; write {argument}=VALUE.")
  if inside := [name for name in flat if name.startswith(f"{key}.")]:
    raise UserError(f"{file}: `{key}` is a section; set one of its keys: {', '.join(inside)}.")
  if key not in flat:
    raise UserError(f"{file} has no key `{key}`; {did_you_mean(key, flat)}")
  values = flags.FlagValues()
  kind = KINDS.get(type(flat[key]), f"a {type(flat[key]).__name__}")
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["jaxbias", argument])
    values(["jaxbias", argument])
  except (TypeError, ValueError, SyntaxError, flags.Error):
    raise UserError(f"{argument}: `{key}` has to be {kind}; it is {flat[key]!r} in {file}.") from None


def _flat(config: Mapping, prefix: str = "") -> dict:
  out = {}
  for key in config:
    value = config[key]
    nested = isinstance(value, Mapping | ConfigDict)
    out.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
  return out


def to_dict(config: ConfigDict) -> dict:
  """Plain JSON types, keys in order: what is hashed and saved with a run."""
  return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def config_hash(config: Mapping) -> str:
  """12 hex digits of the sha256 of the merged config."""
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def differing_keys(ours: Mapping, theirs: Mapping) -> list[str]:
  """Dotted keys at which two plain configs differ, with both values; those that a run may go on with do not count."""
  a, b = _flat(ours), _flat(theirs)
  show = lambda side, key: repr(side[key]) if key in side else "(absent)"
  keys = (key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key) and not key.startswith(CHANGEABLE))
  return [f"{key}: {show(b, key)} there, {show(a, key)} here" for key in keys]


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first value that no run could use."""
  t = config.train
  counts = ("steps", "learning_rate", "clip_norm", "checkpoint_every", "accumulate", "keep_checkpoints")
  positive = {f"train.{key}": t[key] for key in counts}
  positive |= {"eval.bootstrap_draws": config.eval.bootstrap_draws, "control.processes": config.control.processes}
  for key, value in positive.items():
    if not value > 0:
      raise UserError(f"{key} = {value}; it must be positive.")
  if config.log.peak_tflops < 0:
    raise UserError(f"log.peak_tflops = {config.log.peak_tflops}; it must not be negative.")
  if not 0 <= t.warmup_steps <= t.steps:
    raise UserError(f"train.warmup_steps = {t.warmup_steps} is not between 0 and train.steps = {t.steps}.")
  if config.data.max_tokens < 0 or config.data.max_tokens == 1:
    raise UserError(f"data.max_tokens = {config.data.max_tokens}; give at least 2, or 0 for no cut.")
  _one_of("control.name", config.control.name, ("", "signed", "published"))
  _one_of("control.script", config.control.script, ("train", "train_7b"))
  _one_of("control.split", config.control.split, ("train", "validation", "test"))
  if config.control.name and config.control.split == config.eval.split:
    raise UserError(f"control.split = eval.split = `{config.eval.split}`; what decides when to stop cannot be "
                    "reported, so name another split.")
  _validate_watch(config)
  _one_of("train.schedule", t.schedule, ("constant", "linear", "cosine"))
  for rule in t.rules:
    if len(rule) != 2 or not isinstance(rule[1], Mapping) or rule[1].keys() - {"learning_rate", "weight_decay"}:
      raise UserError(f"train.rules has {rule!r}; each is (pattern, {{'learning_rate': factor, 'weight_decay': x}}), "
                      "of which either may be left out.")  # fmt: skip
  _one_of("train.reference", t.reference, ("cache", "step"))
  _one_of("eval.split", config.eval.split, ("train", "validation", "test"))
  _one_of("eval.scoring", config.eval.scoring, ("sum", "token_mean"))
  _one_of("dtype", config.dtype, ("auto", "float32", "bfloat16"))
  _one_of("mesh.preset", config.mesh.preset, MESH_PRESETS)
  for name, axis in config.mesh.rules.items():
    _one_of(f"mesh.rules.{name}", axis, ("", *MESH_AXES))
    if axis and name != "embed" and axis == config.mesh.rules.embed:
      raise UserError(f"mesh.rules sends both `embed` and `{name}` to `{axis}`; they meet in one matrix, which one "
                      "mesh axis can cut once.")  # fmt: skip
  if config.mesh.rules.layers:
    raise UserError("mesh.rules.layers must be empty; layers are computed one after the other.")
  if min(t.groups.values()) < 1:
    raise UserError(f"train.groups = {t.groups.to_dict()}; each has to be at least 1.")
  if min(t.rows.values()) < 1:
    raise UserError(f"train.rows = {t.rows.to_dict()}; every role needs at least one text a step.")
  if config.lora.rank < (0 if t.base else 1):
    raise UserError(f"lora.rank = {config.lora.rank}; it must be at least 1, or 0 where train.base names what trains.")
  if not 0 <= config.lora.dropout < 1:
    raise UserError(f"lora.dropout = {config.lora.dropout}; it must be at least 0 and below 1.")
  if len(config.lora.layers) not in (0, 2):
    raise UserError(f"lora.layers = {tuple(config.lora.layers)}; give the first layer and the one behind the last, or "
                    "nothing for all.")
  for name in ("", *compared(config)):
    _validate_remedy(config, name)
  if not config.seeds:
    raise UserError("seeds is empty; give at least one, e.g. --config.seeds='(0,)'.")
  if len({s for s in config.seeds if isinstance(s, int) and s >= 0}) < len(config.seeds):
    raise UserError(f"seeds = {tuple(config.seeds)}; each must be a whole number from 0 on, and appear once.")
  if not config.variants:
    raise UserError("variants is empty; give at least one, e.g. variants = {'sft': methods.variant('sft')}.")
  for name in config.compare:
    if name not in config.variants:
      raise UserError(f"compare names the variant `{name}`, which is not there; {did_you_mean(name, config.variants)}")
  for name in compared(config):
    if missing := {"method", "label", "losses", "learning_rate_scale"} - set(config.variants[name]):
      raise UserError(f"variants.{name} has no `{min(missing)}`; make it with jaxbias.methods.variant.")
    for key in config.variants[name]:
      _one_of(f"the key of variants.{name}", key, VARIANT)


def remedy(config: Mapping, variant: str = "") -> dict:
  """The `remedy` section with what a variant replaces in it."""
  own = config["variants"][variant].get("remedy", {}) if variant in config["variants"] else {}
  return {**config["remedy"], **own}


def _validate_remedy(config: ConfigDict, variant: str) -> None:
  r, where = remedy(config, variant), f"variants.{variant}.remedy" if variant else "remedy"
  if unknown := r.keys() - config.remedy.keys():
    raise UserError(f"{where} has no key `{min(unknown)}`; {did_you_mean(min(unknown), config.remedy)}")
  if not 0 <= r["mixout"] < 1:
    raise UserError(f"{where}.mixout = {r['mixout']}; it must be at least 0 and below 1.")
  if r["mixout"] and config.lora.dropout:
    raise UserError(f"{where}.mixout thins out whole weights, so that lora.dropout would do nothing; set one to 0.")
  if r["recadam_gamma"] < 0 or r["recadam_kappa"] <= 0 or not 0 <= r["recadam_midpoint"] <= 1:
    raise UserError(f"{where}: recadam_gamma must not be negative, recadam_kappa must be positive, and "
                    "recadam_midpoint is a share of the steps.")
  scale = config.variants[variant].get("learning_rate_scale", 1.0) if variant in config.variants else 0.0
  pull = r["recadam_gamma"] * config.train.learning_rate * scale
  if pull >= 2:
    raise UserError(f"{where}.recadam_gamma x learning rate = {pull:.3g}; from 2 on a step ends farther from the start "
                    f"than it began, so give less than {2 * r['recadam_gamma'] / pull:.3g}.")
  if len(r["layers"]) not in (0, 2):
    raise UserError(f"{where}.layers = {tuple(r['layers'])}; give the first layer and the one behind the last, or "
                    "nothing for all.")
  if r["fisher_texts"] < 1:
    raise UserError(f"{where}.fisher_texts = {r['fisher_texts']}; at least one text is needed.")


def watched(config: ConfigDict) -> tuple[int, ...]:
  """The steps after which runs are looked at, () where `watch` is off. Raises UserError for one that is no step."""
  chosen, last = config.watch.steps, config.train.steps
  if chosen == "log":
    return (0, *(step for n in range(len(str(last))) for step in (10**n, 3 * 10**n) if step < last), last)
  listed = [part.strip() for part in chosen.split(",")] if chosen.strip() else []
  for part in listed:
    if not part.isdecimal() or int(part) > last:
      raise UserError(f"watch.steps = `{chosen}`: `{part}` is no step of a run of {last}; give whole numbers from 0 on "
                      "with commas between, or log.")
  return tuple(sorted(set(map(int, listed))))


def _validate_watch(config: ConfigDict) -> None:
  watched(config)
  w = config.watch
  _one_of("watch.split", w.split, ("train", "validation", "test"))
  if w.group and not w.general:
    raise UserError(f"watch.group = `{w.group}` is a field of the file watch.general, which is not given.")
  if w.batches < 1:
    raise UserError(f"watch.batches = {w.batches}; gradients need at least one.")
  if w.mask_draws < 4:
    raise UserError(f"watch.mask_draws = {w.mask_draws}; fewer than 4 are mostly noise.")
  if not 0 < w.mask_share < 1:
    raise UserError(f"watch.mask_share = {w.mask_share}; it must be above 0 and below 1.")
  if w.mask_seed < 0:
    raise UserError(f"watch.mask_seed = {w.mask_seed}; it must be a whole number from 0 on.")


def compared(config: ConfigDict) -> tuple[str, ...]:
  """The variants that a config runs, in the table's order."""
  return tuple(config.compare) or tuple(sorted(config.variants))


def _one_of(key: str, value: str, valid: Sequence[str]) -> None:
  if value not in valid:
    raise UserError(f"{key} = `{value}` is not known; {did_you_mean(value, valid)}")
