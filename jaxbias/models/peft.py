"""Adapters in PEFT's format: our `lora` and `lora_scale` collections to an adapter folder, and back.

Where Hugging Face has one module for several projections of ours (GPT-2's c_attn, Phi 3's qkv_proj), their adapters
are one adapter there: A's stacked, each B in its own rows and columns. The file's metadata says how it falls apart
again; without it (an adapter that peft trained) every projection takes all of A and its own rows of B.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbias.errors import UserError
from jaxbias.files import new_folder
from jaxbias.models.checkpoints import open_safetensors
from jaxbias.models.config import ModelConfig
from jaxbias.models.export import Tensor, on_host, write_safetensors
from jaxbias.models.families import family_of
from jaxbias.models.families.layout import Rows
from jaxbias.models.lora import group_scales
from jaxbias.models.transformer import Transformer, abstract_variables

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.{}.lora_{}.weight"
# Options of a LoRA that are honoured, or that do not change what a trained adapter computes; every other one must be
# off, whatever it is, or the adapter is refused by that option's name.
HONOURED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias")
HARMLESS = frozenset(
  """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
  inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core peft_version
  qalora_group_size revision runtime_config target_modules task_type""".split()
)
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)  # others change the base model's weights as well


class Part(NamedTuple):
  """A projection of ours in one of Hugging Face's modules."""

  path: tuple[str, ...]
  rows: Rows | None
  transposed: bool


class Adapter(NamedTuple):
  """One module's A [r, in] and B [out, r]; the update is scale * B A."""

  a: np.ndarray
  b: np.ndarray
  scale: float


def modules(config: ModelConfig) -> dict[str, list[Part]]:
  """{Hugging Face's module, {} standing for the layer: the projections of ours in it} for all that can be adapted."""
  found = collections.defaultdict(list)
  for path, stored in family_of({"architectures": [config.architecture]}).layout(config).items():
    if path.endswith("/kernel") and stored.stacked:
      part = Part(tuple(path.split("/")[:-1]), stored.rows, stored.transposed)
      found[stored.name.removesuffix(".weight")].append(part)
  return dict(found)


# Out


def save_adapters(
  out: Path, base: str, config: ModelConfig, adapters: Mapping, texts: Mapping[str, str] | None = None
) -> None:
  """Write `out`, an adapter folder for `base` (a source: a folder, hf:org/name[@revision], ...).

  adapters: {"lora", "lora_scale"}. Layers whose scale is 0 are left out; scales that differ become alphas that do.
  Raises UserError where `out` has something in it, where nothing is left, or for factors that are not finite.
  """
  factors = {path: on_host(leaf) for path, leaf in flatten_dict(dict(adapters["lora"])).items()}
  scale_G = group_scales(adapters["lora_scale"]["scale"], config.groups)
  named, short, split = {}, {}, {}
  for template, parts in modules(config).items():
    parts = [part for part in parts if (*part.path, "a") in factors]
    for number in np.flatnonzero(scale_G) if parts else ():
      name = template.format(number)
      named[name] = _joined(parts, factors, number, float(scale_G[number]))
      short[name] = template.rpartition("{}.")[2]
    if parts and parts[0].rows:
      split[template] = {part.path[-1]: factors[(*part.path, "a")].shape[-1] for part in parts}
  if not named:
    raise UserError("no layer has an adapter; there is nothing to write.")
  broken = [name for name, adapter in named.items() if not all(np.isfinite(x).all() for x in adapter[:2])]
  if broken:
    raise UserError(f"the adapter of {broken[0]} holds NaN or infinity; nothing was written. Train it anew.")
  tensors = [Tensor(KEY.format(name, kind), x.shape, "float32", lambda x=x: x)
             for name, adapter in named.items() for kind, x in zip("AB", adapter[:2], strict=True)]  # fmt: skip
  with new_folder(out) as work:
    write_safetensors(work / WEIGHTS, tensors, {"jaxbias": json.dumps({"split": split})})
    described = json.dumps(_describe(base, config, named, short), indent=2)
    (work / CONFIG).write_text(described + "\n", encoding="utf-8")
    for name, text in (texts or {}).items():
      (work / name).write_text(text, encoding="utf-8")


def _joined(parts: list[Part], factors: Mapping, number: int, scale: float) -> Adapter:
  """The adapters of the projections in one module, as one: a [in, r] and b [r, out] each become A and B of theirs."""
  a = [factors[(*part.path, "a")][number].T for part in parts]
  b = [factors[(*part.path, "b")][number].T for part in parts]
  if parts[0].rows is None:
    return Adapter(a[0], b[0], scale)
  joined, column = np.zeros((parts[0].rows.total, sum(map(len, a))), np.float32), 0
  for part, ours in zip(parts, b, strict=True):
    joined[part.rows.at(np.arange(len(ours))), column : column + ours.shape[1]] = ours
    column += ours.shape[1]
  return Adapter(np.concatenate(a), joined, scale)


def _describe(base: str, config: ModelConfig, named: Mapping[str, Adapter], short: Mapping[str, str]) -> dict:
  """adapter_config.json: module names as short as they are exact, the most common rank and alpha, and what differs."""
  repository, _, revision = base.removeprefix("hf:").partition("@") if base.startswith("hf:") else (base, "", "")
  ranks = {name: len(adapter.a) for name, adapter in named.items()}
  alphas = {name: _alpha(adapter.scale, ranks[name]) for name, adapter in named.items()}
  rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
  everything = [template.format(number) for template in modules(config) for number in range(config.groups)]
  numbers = sorted({int(re.search(r"\.(\d+)\.", name)[1]) for name in named})
  meant = {name for name in everything if int(re.search(r"\.(\d+)\.", name)[1]) in numbers}
  suffixes, nested = set(short.values()), any(re.search(r"(^|\.)\d+\.", suffix) for suffix in short.values())
  exact = {name for name in meant if _ends(name, suffixes)} == set(named)
  partial = len(numbers) < config.groups
  plain = exact and not (partial and nested)  # peft's releases differ in which of two numbers is the layer's
  return {
    "peft_type": "LORA", "task_type": "CAUSAL_LM" if config.causal else None,
    "base_model_name_or_path": repository, "revision": revision or None,
    "inference_mode": True, "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
    "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
    "fan_in_fan_out": not any(part.transposed for parts in modules(config).values() for part in parts),
    "target_modules": sorted(suffixes) if plain else sorted(named),
    "layers_to_transform": numbers if plain and partial else None,
    "rank_pattern": _pattern(ranks, rank, short), "alpha_pattern": _pattern(alphas, alpha, short),
  }  # fmt: skip


def _alpha(scale: float, rank: int) -> float:
  """The roundest alpha with float32(alpha / rank) == scale; scale * rank itself, which float64 holds, if no other."""
  rounded = (float(f"{scale * rank:.{digits}g}") for digits in range(1, 9))
  alpha = next((a for a in rounded if np.float32(a / rank) == np.float32(scale)), scale * rank)
  return int(alpha) if alpha == int(alpha) else alpha


def _pattern(values: Mapping[str, Any], usual: Any, short: Mapping[str, str]) -> dict[str, Any]:
  """What is not as usual, by the module's short name where that says the same and by its whole name else."""
  brief = {short[name]: value for name, value in values.items() if value != usual}
  if all(_lookup(brief, name, usual) == value for name, value in values.items()):
    return brief
  return {name: value for name, value in values.items() if value != usual}


def _ends(name: str, suffixes: Iterable[str]) -> bool:
  return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _lookup(pattern: Mapping[str, Any], name: str, usual: Any) -> Any:
  """peft's rule: the first key that the module's name ends with, as a regular expression."""
  return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), usual)


# In


def load_adapters(folder: Path, config: ModelConfig) -> dict:
  """{"lora", "lora_scale"} of an adapter folder, ours or peft's, for a model of this config; float32.

  Modules whose scale differs from their layer's are folded into B. Raises UserError naming an option that is not
  honoured (DoRA, modules_to_save, biases, ...), listing tensors that are missing, extra or misshapen, and for damaged
  or pickled weights.
  """
  hf, (tensors, split) = _read_config(folder), _read_tensors(folder)
  templates, groups = modules(config), range(config.groups)
  names = {template.format(number): (template, number) for template in templates for number in groups}
  found = {name: adapter for name, adapter in _matched(folder, hf, tensors, names, config).items() if adapter.scale}
  scales = [collections.Counter(found[name].scale for name in sorted(found) if names[name][1] == i) for i in groups]
  scale_G = np.array([count.most_common(1)[0][0] if count else 0 for count in scales], np.float32)
  ours = collections.defaultdict(dict)  # path of a projection -> {layer: (a [in, r], b [r, out])}
  for name, adapter in found.items():
    template, number = names[name]
    folded = adapter._replace(b=adapter.b * np.float32(adapter.scale / scale_G[number]))
    for part, a, b in _parted(templates[template], folded, split.get(template, {})):
      ours[part.path][number] = (a.T, b.T)
  lora = {(*path, kind): leaf for path, layers in ours.items()
          for kind, leaf in zip("ab", _stacked(layers, config.groups), strict=True)}  # fmt: skip
  scale_L = np.repeat(scale_G, config.num_layers // config.groups)
  return {"lora": unflatten_dict(lora), "lora_scale": {"scale": jnp.asarray(scale_L)}}


def base_of(folder: Path) -> str | None:
  """The base model that an adapter folder names, with @revision where it names one."""
  hf = _read_config(folder)
  base, revision = hf.get("base_model_name_or_path"), hf.get("revision")
  return f"{base}@{revision}" if base and revision else base


def _read_config(folder: Path) -> dict:
  path = folder / CONFIG
  try:
    hf = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{folder} has no {CONFIG}; an adapter folder holds that and {WEIGHTS}.") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); fetch the adapter again.") from None
  if not isinstance(hf, dict) or hf.get("peft_type") != "LORA":
    raise UserError(f"{path} is not about a LoRA adapter (`peft_type` has to be LORA); no other kind is supported.")
  on = sorted(key for key, value in hf.items() if value and key not in HARMLESS and key not in HONOURED)
  on += [key for key, fine in {"bias": ("none", None), "init_lora_weights": PLAIN_STARTS}.items()
         if hf.get(key) not in fine]  # fmt: skip
  if on:
    raise UserError(f"{path} asks for {', '.join(f'`{key}` = {json.dumps(hf[key])}' for key in on)}, which is not "
                    "supported; merge that adapter with peft (merge_and_unload) and give the merged folder.")
  return hf


def _read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
  """The tensors in float32, and how fused ones fall apart where jaxbias wrote them."""
  if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
    raise UserError(f"{folder} has adapter_model.bin but no {WEIGHTS}: pickles are refused, they can run code when "
                    "opened; save it again with peft (save_pretrained), which writes safetensors.")  # fmt: skip
  handle = open_safetensors(folder / WEIGHTS)
  tensors = {key: handle.get_tensor(key).astype(np.float32) for key in handle.keys()}
  broken = [key for key, value in tensors.items() if not np.isfinite(value).all()]
  if broken:
    raise UserError(f"{folder}: tensor {broken[0]} holds NaN or infinity; fetch the adapter again, or train it anew.")
  return tensors, json.loads((handle.metadata() or {}).get("jaxbias", "{}")).get("split", {})


def _matched(folder: Path, hf: Mapping, tensors: Mapping, names: Mapping, config: ModelConfig) -> dict[str, Adapter]:
  """{module: its adapter}. UserError listing every tensor that is missing, extra or misshapen."""
  shapes = flatten_dict(nn.unbox(abstract_variables(Transformer(config))))
  problems, found, wanted = [], {}, {KEY.format(name, kind): name for name in names for kind in "AB"}
  problems += [f"{key} is not of a module that can be adapted here" for key in sorted(tensors.keys() - wanted.keys())]
  for name in sorted({wanted[key] for key in tensors.keys() & wanted.keys()}):
    parts = modules(config)[names[name][0]]
    kernel = shapes[(*parts[0].path, "kernel")].shape
    rank = _lookup(hf.get("rank_pattern") or {}, name, hf.get("r", 8))
    need = {"A": (rank, kernel[1]), "B": (parts[0].rows.total if parts[0].rows else kernel[2], rank)}
    a, b = (tensors.get(KEY.format(name, kind)) for kind in "AB")
    for kind, tensor in (("A", a), ("B", b)):
      if tensor is None:
        problems.append(f"{KEY.format(name, kind)} is missing")
      elif tensor.shape != need[kind]:
        problems.append(f"{KEY.format(name, kind)} has shape {tensor.shape}, {need[kind]} is needed")
    alpha = _lookup(hf.get("alpha_pattern") or {}, name, hf.get("lora_alpha", 8))
    found[name] = Adapter(a, b, float(np.float32(alpha / (math.sqrt(rank) if hf.get("use_rslora") else rank))))
  if not found:
    problems.append("no adapter is in it")
  if problems:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise UserError(f"{folder} does not fit {config.architecture}: {'; '.join(problems[:8])}{more}.")
  return found


def _parted(parts: list[Part], adapter: Adapter, ranks: Mapping[str, int]):
  """(part, A, B) of each adapted projection in a module; `ranks` of those that jaxbias joined."""
  if parts[0].rows is None:
    yield parts[0], adapter.a, adapter.b
    return
  column, whole = 0, sum(ranks.values()) != len(adapter.a)
  for part in parts:
    own = slice(column, column := column + ranks.get(part.path[-1], 0))
    b = adapter.b[part.rows.at(np.arange(part.rows.sizes[part.rows.part]))]
    if whole or np.delete(b, own, axis=1).any():  # peft's own, or changed since
      yield part, adapter.a, b
    elif own.start < own.stop:
      yield part, adapter.a[own], b[:, own]


def _stacked(layers: Mapping[int, tuple[np.ndarray, np.ndarray]], groups: int) -> tuple[jnp.ndarray, jnp.ndarray]:
  """a [G, in, r] and b [G, r, out]; zeros for layers without an adapter and for ranks below the largest."""
  a, b = next(iter(layers.values()))
  rank = max(a.shape[1] for a, _ in layers.values())
  whole_a, whole_b = np.zeros((groups, len(a), rank), np.float32), np.zeros((groups, rank, b.shape[1]), np.float32)
  for number, (a, b) in layers.items():
    whole_a[number, :, : a.shape[1]], whole_b[number, : b.shape[0]] = a, b
  return jnp.asarray(whole_a), jnp.asarray(whole_b)
