"""What the start model says about the training texts: computed once, fingerprinted, kept on disk.

Per text: the log-probability of each answer token, and for texts that anchor the model the last hidden state at
every position, from which the whole reference distribution follows exactly (one product with the head).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxbias.data.pipeline import Segment, pack, packed_batches
from jaxbias.distributed import everywhere, first, on_host, to_devices
from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.mesh import batch_sharding, batch_shards
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import Transformer, head

FORMAT = 1  # raise it when what is stored changes


@dataclasses.dataclass(frozen=True)
class Reference:
  """Arrays per text, by the text's key: logprob[key] float32 [answer tokens], hidden[key] float32 [positions, D]."""

  logprob: dict[str, np.ndarray]
  hidden: dict[str, np.ndarray]


def key_of(segment: Segment) -> str:
  """Identifies a text by its tokens and by what is read off it."""
  parts = (segment.tokens, segment.score_at, segment.target, segment.kl_at)
  return hashlib.sha256(b"|".join(np.asarray(part, np.int32).tobytes() for part in parts)).hexdigest()[:24]


@functools.lru_cache(maxsize=4)
def _forward(module: Transformer, mesh):
  @jax.jit
  def run(params, arrays):
    hidden, _ = module.apply({"params": params}, *(arrays[n] for n in ("tokens", "segment", "position")))
    scored = gather_positions(hidden, arrays["score_at"])
    logprob = token_logprobs(scored, head(params, module.config, module.mesh), arrays["target"])
    return logprob, gather_positions(hidden, arrays["kl_at"]).astype("float32")

  sharding = batch_sharding(mesh)
  return lambda params, arrays: on_host(run(params, to_devices(arrays, sharding)))


def compute(
  model: LanguageModel,
  segments: Sequence[Segment],
  folder: Path,
  advance: Callable[[int], None] = lambda texts: None,
) -> Reference:
  """The reference for every distinct text among `segments`, from `folder` when it is there already, for all processes;
  the first one writes it there."""
  distinct = {key_of(segment): segment for segment in segments}
  identity = [FORMAT, model.fingerprint, model.tokenizer.fingerprint, model.config.dtype, sorted(distinct)]
  path = folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"
  if everywhere(path.exists()):
    advance(len(distinct))
    return _read(path)
  keys, todo = list(distinct), list(distinct.values())
  run = _forward(model.module, model.mesh)
  logprob, hidden = {}, {}
  for indices, places, shape in packed_batches(todo, batch_shards(model.mesh)):
    logprobs_BP, hidden_BKD = run(model.params, pack([todo[i] for i in indices], places, shape))
    for i, at in zip(indices, places, strict=True):
      logprob[keys[i]] = logprobs_BP[at.b, at.p : at.p + len(todo[i].target)]
      hidden[keys[i]] = hidden_BKD[at.b, at.k : at.k + len(todo[i].kl_at)]
    advance(len(indices))
  reference = Reference(logprob, hidden)
  if first():
    _write(path, reference)
  return reference


def _write(path: Path, reference: Reference) -> None:
  keys = list(reference.logprob)
  lengths = lambda table: np.array([len(table[key]) for key in keys])
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
  np.savez(
    temporary, keys=np.array(keys),
    logprob=np.concatenate([reference.logprob[k] for k in keys]), logprob_lengths=lengths(reference.logprob),
    hidden=np.concatenate([reference.hidden[k] for k in keys]), hidden_lengths=lengths(reference.hidden),
  )  # fmt: skip
  os.replace(temporary, path)


def _read(path: Path) -> Reference:
  with np.load(path) as stored:
    keys = stored["keys"].tolist()
    cut = lambda name: np.split(stored[name], np.cumsum(stored[f"{name}_lengths"])[:-1])
    return Reference(*(dict(zip(keys, cut(name), strict=True)) for name in ("logprob", "hidden")))
