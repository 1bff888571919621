"""What a run would need on devices that are not here: the real train step, compiled on abstract arrays.

Nothing is allocated and no weights are read. By default the compiler is XLA's for CPUs: what lies in memory before the
step and what the partitioner sends carry over to other devices, temporaries are an estimate. Where libtpu is installed,
the TPU's own compiler can be asked instead, still without a TPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jaxbias import config as configs
from jaxbias.errors import UserError, did_you_mean
from jaxbias.files import write_json
from jaxbias.hlo import collective_bytes
from jaxbias.losses.registry import Objective, parse
from jaxbias.mesh import batch_sharding, batch_shards, make_mesh, replicated
from jaxbias.models.checkpoints import read_config
from jaxbias.models.families import model_config
from jaxbias.models.language_model import LanguageModel, layout_for
from jaxbias.models.sources import resolve
from jaxbias.models.transformer import Transformer, abstract_variables
from jaxbias.train import transforms
from jaxbias.train.flops import step_flops
from jaxbias.train.loop import Trainer
from jaxbias.types import Batch, TrainState

GIB = 2**30
SEGMENTS = 8  # texts in a packed row
# A CPU multiplies bfloat16 as float32, and these passes would then copy whole stacks of weights and activations ahead
# of the loop over layers, which no accelerator does.
CPU_ONLY = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion,change-op-data-type"
PARTITIONER = "spmd-partitioning"
SHAPES = {  # published shapes of models whose files one has to ask for
  "llama-3.1-8b": {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": False, "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
  """One compiled train step. Bytes and collectives are of one device, FLOPs of the whole mesh."""

  model: str
  mesh: Mapping[str, int]
  batch: int  # packed rows of a step, over all devices
  length: int  # tokens of a row
  losses: tuple[str, ...]
  dtype: str
  memory: Mapping[str, int]  # what lies on a device during the step; adds up to its peak
  flops: float  # needed by the mathematics, frozen weights without gradients
  xla_flops: float  # that XLA counts in its program, loops once
  collectives: Mapping[str, float]  # bytes received, by kind
  unknown_loops: int
  compile_seconds: float
  compiler: str

  @property
  def peak(self) -> int:
    return sum(self.memory.values())


def shape_of(source: str) -> dict:
  """config.json's content: of a file, of a folder or another model source, or one of `SHAPES`."""
  path = Path(source).expanduser()
  if source.lower() in SHAPES:
    return SHAPES[source.lower()]
  if path.is_file() and path.suffix == ".json":
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise UserError(f"{path} is not JSON ({error}).") from None
  return read_config(path if (path / "config.json").is_file() else resolve(source).path)


def plan(config, source: str, variant: str | None = None, batch: int = 0, length: int = 0, tpu: str = "") -> Plan:
  """Compile the train step of one of the config's variants on the devices that JAX sees, or for a TPU topology.

  source: as for `shape_of`. batch: packed rows over all devices, 0 = one on each that holds rows; length: tokens of a
  row, 0 = 1024 or the model's window; tpu: such as v5e:2x4, needs libtpu. Raises UserError for what cannot be compiled.
  """
  configs.validate(config)
  variant = variant or configs.compared(config)[0]
  if variant not in config.variants:
    raise UserError(f"the config has no variant `{variant}`; {did_you_mean(variant, config.variants)}")
  objective, coefficients = parse(configs.to_dict(config)["variants"][variant]["losses"])
  model = abstract_model(shape_of(source), source, config, make_mesh(config.mesh, topology(tpu) if tpu else None))
  trainer = Trainer.of(model, config)
  shards = batch_shards(model.mesh)
  parts = config.train.accumulate
  if parts > 1 and (why := objective.coupled()):
    raise UserError(f"train.accumulate = {parts} would change what is trained: {why}; set it to 1.")
  batch, length = batch or shards * parts, length or min(1024, model.config.max_positions)
  if batch % (shards * parts):
    raise UserError(f"--batch {batch} packed rows cannot be cut into {shards * parts} equal parts, the mesh's data x "
                    f"fsdp{' x train.accumulate' * (parts > 1)}.")  # fmt: skip
  if length > model.config.max_positions:
    raise UserError(f"--length {length} is past the model's {model.config.max_positions} positions.")
  state, whole = abstract_state(trainer, objective), replicated(model.mesh)
  rows = abstract_batch(config, objective, batch // parts, length, model)
  if parts > 1:
    stacked = batch_sharding(model.mesh, parts)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, *x.shape), x.dtype, sharding=stacked), rows)
  remedy = transforms.coefficients(configs.remedy(config, variant), config.train.steps, model.config)
  traced = {"learning_rate": 0.0, "losses": coefficients, **remedy}
  frozen = {"params": model.params, "lora_scale": jax.tree.map(lambda x: _like(x, whole), trainer.scale)}
  if "fisher" in objective.needs:
    weights = {"/".join(path): leaf for path, leaf in flatten_dict(dict(model.params)).items()}
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    frozen["fisher"] = {path: like(weights[path]) for path in trainer.moved}
  traced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32, sharding=whole), traced)
  if config.lora.dropout:
    traced["dropout_key"] = _like(jax.eval_shape(lambda: jax.random.key(0)), whole)
  if "mixout" in remedy.get("remedy", {}):
    traced["mixout_key"] = _like(jax.eval_shape(lambda: jax.random.key(0)), whole)
  began = time.perf_counter()
  lowered = trainer.step_for(objective).lower(state, frozen, rows, traced)
  compiled, text = _compile_for_tpu(lowered, tpu) if tpu else _compile(lowered)
  seconds = time.perf_counter() - began
  found, cost = compiled.memory_analysis(), compiled.cost_analysis()
  memory = {
    "parameters (frozen)": device_bytes(frozen),
    "adapters": device_bytes(state.params),
    "optimizer state": device_bytes(state.opt_state),
    "batch": device_bytes(rows),
    "temporaries": found.temp_size_in_bytes + max(found.output_size_in_bytes - found.alias_size_in_bytes, 0),
  }
  collectives, unknown = collective_bytes(text, model.mesh.size) if text else ({}, 0)
  return Plan(source, dict(model.mesh.shape), batch, length, tuple(term.key for term in objective.terms),
              model.config.dtype, memory, step_flops(model.config, rows, state.params, objective, config.train.remat),
              float(cost.get("flops", 0)) * model.mesh.size, collectives, unknown, seconds, tpu or "cpu")  # fmt: skip


def topology(name: str) -> list:
  """The devices of a TPU slice, as its compiler knows them. UserError without libtpu, or for a name that it has not."""
  try:
    return topologies.get_topology_desc(name, "tpu").devices
  except Exception as error:  # a plug-in that cannot be loaded raises what it likes
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(f"--tpu {name}: {said[:160]}; it needs a name such as v5e:2x4, and pip install libtpu.") from None


def _compile(lowered):
  """The program, and what the partitioner made of it, where collectives have the width that the model asks for."""
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({
      "xla_disable_hlo_passes": CPU_ONLY, "xla_dump_to": folder, "xla_dump_hlo_pass_re": PARTITIONER,
      "xla_dump_hlo_as_text": True,
    })  # fmt: skip
    partitioned = sorted(Path(folder).glob(f"*after_{PARTITIONER}*.txt"))
    return compiled, partitioned[-1].read_text(encoding="utf-8") if partitioned else compiled.as_text()


def _compile_for_tpu(lowered, name: str):
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needs = re.search(r"Used .*? of .*? hbm", str(error))
    raise UserError(f"--tpu {name}: its compiler says that the step does not fit ({needs[0] if needs else 'memory'}); "
                    "use more devices, shorter rows or --config.train.remat=true.") from None  # fmt: skip
  return compiled, ""  # it turns collectives into rings inside of loops, whose steps the text does not tell


def abstract_model(hf: Mapping, name: str, config, mesh: Mesh) -> LanguageModel:
  """The model with shapes for weights; bfloat16 unless the config says otherwise."""
  shape = model_config(hf).with_dtype("bfloat16" if config.dtype == "auto" else config.dtype)
  layout = layout_for(shape, mesh, config.mesh.rules)
  module = Transformer(shape, remat=config.train.remat, mesh=mesh)
  boxed = abstract_variables(module)
  logical = nn.get_partition_spec(boxed)
  layout.report(nn.unbox(boxed), logical)
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(shape.dtype), sharding=sharding)
  params = jax.tree.map(place, nn.unbox(boxed), layout.shardings(nn.unbox(boxed), logical))
  return LanguageModel(name, shape, module, params, None, "", layout)


def abstract_state(trainer: Trainer, objective: Objective) -> TrainState:
  """The train state that the run would start from, as shapes."""
  params = trainer.abstract(objective)
  aux = jax.eval_shape(lambda: objective.init_aux(trainer.model.config, trainer.model.tokenizer))
  state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(trainer.tx.init, params), aux)
  return jax.tree.map(_like, state, trainer.state_shardings(objective))


def abstract_batch(config, objective: Objective, batch: int, length: int, model: LanguageModel) -> Batch:
  """Packed rows in which texts of all roles that the losses read take the shares that `train.rows` gives them; every
  token of a role is scored."""
  rows = {role: count for role, count in config.train.rows.items() if role in objective.roles}
  share = lambda roles: math.ceil(length * sum(rows.get(role, 0) for role in roles) / sum(rows.values()))
  P, K = share(objective.scored_roles), share(objective.kl_roles)
  sharding = batch_sharding(model.mesh)
  make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding)
  arrays = {name: make(length) for name in ("tokens", "segment", "position")}
  arrays |= {name: make(P) for name in ("score_at", "target", "score_segment")}
  arrays |= {name: make(SEGMENTS) for name in ("role", "row", "pair")}
  if "ref_logprob" in objective.needs:
    arrays["ref_logprob"] = make(P, dtype=jnp.float32)
  if "groups" in objective.needs:
    arrays |= {name: make(SEGMENTS) for name in ("group", "polarity", "kind")}
    arrays |= {name: make(length, dtype=jnp.bool_) for name in ("entity", "answer")}
    arrays["toxicity"] = make(SEGMENTS, dtype=jnp.float32)
  if K:
    arrays |= {"kl_at": make(K), "kl_segment": make(K), "kl_target": make(K)}
    arrays["ref_hidden"] = make(K, model.config.table_size, dtype=jnp.float32)
  return Batch(**arrays)


def _like(leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def device_bytes(tree) -> int:
  """Bytes of one device's shards."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def write(path: Path, found: Plan) -> None:
  """The plan as JSON, with its peak."""
  write_json(path, {**dataclasses.asdict(found), "peak": found.peak})


def table(found: Plan, device_memory: float | None):
  """A rich table of a plan; device_memory in GiB."""
  from rich.table import Table

  mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
  caveat = f"Compiled for {found.compiler}; collectives are not counted there." if found.compiler != "cpu" else (
    "Compiled for CPUs: temporaries are an estimate of a TPU's or GPU's.")  # fmt: skip
  if found.unknown_loops:
    caveat += f" {found.unknown_loops} loops of unknown length count once."
  out = Table(title=f"{found.model} on {math.prod(found.mesh.values())} devices ({mesh})", title_justify="left",
              caption=f"{found.batch} rows of {found.length:,} tokens a step; {found.dtype}; losses: "
              f"{', '.join(found.losses)}. {caveat}", caption_justify="left")  # fmt: skip
  out.add_column("on each device")
  out.add_column("", justify="right")
  for name, size in found.memory.items():
    out.add_row(name, f"{size / GIB:,.3f} GiB")
  limit = f" of {device_memory:g}" if device_memory else ""
  out.add_row("peak", f"{found.peak / GIB:,.3f}{limit} GiB", style="bold", end_section=True)
  received = found.collectives and {**found.collectives, "all collectives": sum(found.collectives.values())}
  for kind, size in received.items():
    out.add_row(f"received by {kind}, a step", f"{size / GIB:,.3f} GiB", end_section=kind == "all collectives")
  out.add_row("FLOPs of a step, all devices", f"{found.flops:.3e}")
  out.add_row("the same as XLA counts it, each loop's body once", f"{found.xla_flops:.3e}")
  out.add_row("compiled in", f"{found.compile_seconds:.1f} s")
  return out


def check(found: Plan, device_memory: float) -> None:
  """Raises UserError, saying what would help, when the peak is above `device_memory` GiB."""
  if found.peak <= device_memory * GIB:
    return
  largest = max(found.memory, key=found.memory.get)
  activations = "fewer rows (--batch) or shorter ones (--length), --config.train.remat=true or a larger mesh.tensor"
  help = {"temporaries": activations, "batch": activations}.get(largest, "more devices in mesh.fsdp or mesh.tensor")
  raise UserError(f"the plan needs {found.peak / GIB:.2f} GiB on each device, {device_memory:g} GiB are there; most "
                  f"are {largest}, which {help} would make smaller.")  # fmt: skip
