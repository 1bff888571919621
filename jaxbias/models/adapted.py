"""Adapters on disk as a model: a training run's folder, or an adapter folder of PEFT, on top of the base it names."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxbias.errors import UserError
from jaxbias.files import checkpoint_folder
from jaxbias.models import peft
from jaxbias.models.config import ModelConfig
from jaxbias.models.lora import LoraConfig, lora_scale, scaled
from jaxbias.models.sources import CATALOGUE, ModelFolder, resolve
from jaxbias.models.transformer import Transformer, abstract_variables


@dataclasses.dataclass(frozen=True)
class Adapted:
  """`read(config of the base)` gives the collections {"lora", "lora_scale"} where there are adapters, and {"params"},
  leaves to exchange, where the run trained some of the base. `run`: the config of a training run, {} for PEFT's."""

  folder: Path
  base: str  # as `language_model.load` takes it
  read: Callable[[ModelConfig], dict]
  run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  step: int | None = None
  factor: float = 1.0  # of what was trained, in the model that results; `read` has it in its lora_scale already


def find(source: str | Path, factor: float | None = None) -> Adapted | None:
  """What `source` adapts, where it is the folder of a run or of an adapter; None for every other source.

  factor: of what was trained, by default the run's own `adapter_scale`.
  Raises UserError for a run without a whole checkpoint, and for an adapter that names no base.
  """
  folder = Path(source).expanduser()
  if (folder / "config.json").exists():
    return None
  if checkpoints := checkpoint_folder(folder):
    return _run(folder, checkpoints, factor)
  if (folder / peft.CONFIG).is_file():
    base = peft.base_of(folder)
    if not base:
      raise UserError(f"{folder / peft.CONFIG} names no base model; write its name to `base_model_name_or_path`.")
    known = base in CATALOGUE or Path(base).expanduser().exists() or base.startswith(("hf:", "/", ".", "~"))
    factor = 1.0 if factor is None else factor
    read = lambda config: scaled(peft.load_adapters(folder, config), factor)
    return Adapted(folder, base if known else f"hf:{base}", read, factor=factor)
  return None


def base_folder(source: str | Path) -> ModelFolder:
  """The folder of the model below any adapters."""
  adapted = find(source)
  return base_folder(adapted.base) if adapted else resolve(source)


def _run(folder: Path, checkpoints: Path, factor: float | None) -> Adapted:
  """The newest checkpoint, or the one that it names as the controller's best, which is what the run reports."""
  import orbax.checkpoint as ocp

  logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates every step
  with ocp.CheckpointManager(checkpoints) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"{folder} has no whole checkpoint yet; run the training command again, it goes on from there.")
    try:
      about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
      run, step = about["config"], (about.get("best") or {"step": step})["step"]
      fields = {field.name for field in dataclasses.fields(LoraConfig)} & run["lora"].keys()
      lora = LoraConfig(**{name: _frozen(run["lora"][name]) for name in fields})
      base = run["model"]
      if factor is None:
        factor = run.get("variants", {}).get(run.get("variant"), {}).get("adapter_scale", 1.0)
    except (OSError, ValueError, KeyError, TypeError):
      raise _damaged(checkpoints / str(step)) from None

  def read(config: ModelConfig) -> dict:
    try:
      trained = _restore(checkpoints / str(step) / "state")
    except Exception:  # a plain one is what Orbax raises for missing data
      raise _damaged(checkpoints / str(step)) from None
    found = {"params": trained["base"]} if "base" in trained else {}
    if "layers" in trained:
      scale = lora_scale(lora, config.num_layers)
      found |= scaled({"lora": {"layers": trained["layers"]}, "lora_scale": scale}, factor)
    _check_shapes(folder, found, config)
    return found

  return Adapted(folder, base, read, run, step, factor)


def _damaged(checkpoint: Path) -> UserError:
  return UserError(f"the checkpoint {checkpoint} is damaged; delete it and train again.")


def _check_shapes(folder: Path, found: Mapping, config: ModelConfig) -> None:
  """UserError where a run does not fit the model that it is put on."""
  need = {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(abstract_variables(Transformer(config)))).items()}
  for path, leaf in flatten_dict(found.get("params", {})).items():
    if leaf.shape != need.get(path):
      raise UserError(f"{folder} does not fit this model: {'/'.join(path)} has shape {leaf.shape}, {need.get(path)} is "
                      "needed.")  # fmt: skip
  for path, leaf in flatten_dict(found.get("lora", {})).items():
    groups, fan_in, fan_out = need.get((*path[:-1], "kernel"), (0, 0, 0))
    if leaf.shape != ((groups, fan_in, leaf.shape[2]) if path[-1] == "a" else (groups, leaf.shape[1], fan_out)):
      raise UserError(f"{folder} does not fit this model: the adapter of {'/'.join(path[:-1])} is for another size.")


def _frozen(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _restore(state: Path) -> dict:
  """The model's trained leaves alone, as numpy arrays: whatever the machine they were trained on."""
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    about = checkpointer.metadata(state).item_metadata
    if about is None:
      raise ValueError("no metadata")
    wanted = {"params": {key: tree for key, tree in about.tree["params"].items() if key != "losses"}}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    return checkpointer.restore(state, args=args)["params"]
