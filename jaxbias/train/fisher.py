"""The diagonal Fisher information of the start model's weights: what elastic weight consolidation holds them by.

F_i = E_x sum_t E_{y ~ p(. | x_<t)} (d log p(y | x_<t) / d theta_i)^2 / E_x |x|: per predicted token, labels drawn
from the model itself (Kirkpatrick et al. 2017; Kunstner et al. 2019 on why not the text's own). Given x the draws at
different positions are independent and each score has mean 0, so that the square of a text's summed gradient has the
right expectation. It is squared text by text: the square of a batch's mean gradient would be about a B-th of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxbias.data.pipeline import LENGTHS, Place, Segment, Shape, draw, pack
from jaxbias.data.rows import Split
from jaxbias.data.tokens import Tokenizer
from jaxbias.distributed import everywhere, first, on_host, to_devices
from jaxbias.errors import UserError
from jaxbias.losses.logprobs import gather_positions, logits, token_logprobs
from jaxbias.losses.registry import parse
from jaxbias.mesh import BATCH, batch_shards
from jaxbias.methods.recipes import Recipe, general_rows
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import Transformer, head
from jaxbias.train.batches import tokenise
from jaxbias.train.reference import key_of

FORMAT = 1  # raise it when what is stored changes
GRADIENT_BYTES = 2**30  # of the gradients that one device holds at a time, one for each of its texts
SIDE_BY_SIDE = 8  # at most so many of these texts
CALL_TEXTS = 64  # on each device between two reports of progress
SAMPLED_AT_ONCE = 64  # positions whose logits exist at one time while labels are drawn


def general_segments(
  split: Split, held_out: Split, tokenizer: Tokenizer, max_positions: int, most: int
) -> tuple[Segment, ...]:
  """`most` of the split's general texts, or all of them, drawn without replacement; every token is predicted.

  Raises UserError where one is among the texts that are evaluated: a model held by what it is tested on would seem to
  forget less.
  """
  rows, tested = general_rows(split), {text.text for text in held_out.texts}
  if both := [row.id for row in rows if row.text in tested]:
    raise UserError(f"the general text {both[0]} is in the training split and among those that are evaluated; `ewc` "
                    "may not read it.")  # fmt: skip
  chosen = tuple(rows[i] for i in draw(len(rows), min(most, len(rows)), 0, (0,)))
  objective, _ = parse({"sft": {"on": "general"}})
  return tokenise(Recipe((), (), chosen, paired=False), objective, tokenizer, max_positions).segments["general"]


def compute(
  model: LanguageModel,
  segments: Sequence[Segment],
  paths: Sequence[str],
  folder: Path,
  advance: Callable[[int], None] = lambda texts: None,
) -> dict[str, jax.Array]:
  """{path: F} of the weights at `paths`, float32, laid out like the weights; from `folder` when it is there already,
  for all processes; the first one writes it there.

  Every distinct text counts once. Labels are drawn by the text's own key: neither its neighbours nor the mesh matter.
  """
  distinct = {key_of(segment): segment for segment in segments if len(segment.target)}
  of_model = [model.fingerprint, model.tokenizer.fingerprint, model.config.dtype]
  identity = json.dumps([FORMAT, *of_model, sorted(distinct), sorted(paths)])
  path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
  weights = {name: leaf for name, leaf in _by_name(model.params).items() if name in set(paths)}
  if everywhere(path.exists()):
    advance(len(distinct))
    with np.load(path) as stored:
      return {name: to_devices(stored[name], leaf.sharding) for name, leaf in weights.items()}
  total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32, device=leaf.sharding), weights)
  add = _accumulate(model.module, {name: leaf.sharding for name, leaf in weights.items()})
  for arrays, texts in _chunks(distinct, model, sum(leaf.size for leaf in weights.values())):
    total = add(total, model.params, arrays)
    jax.block_until_ready(total)
    advance(texts)
  tokens = sum(len(segment.target) for segment in distinct.values())
  found = jax.tree.map(lambda x: x / tokens, total)
  on_disk = dict(zip(found, on_host(list(found.values())), strict=True))
  if first():
    _write(path, on_disk)
  return found


def normalised(fisher: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """F with mean 1 over all of its weights, so that a coefficient means the same for any model and text."""
  mean = sum(x.sum() for x in fisher.values()) / sum(x.size for x in fisher.values())
  return {path: x / jnp.maximum(mean, 1e-30) for path, x in fisher.items()}


def squared_gradients(total, weights, log_likelihood: Callable, examples):
  """`total` plus, over all `examples`, the square of each one's own gradient; trees of one structure.

  log_likelihood(weights, example) -> scalar; examples: arrays [N, B, ...], of which B are differentiated side by side
  and N one after the other.
  """
  slopes = jax.vmap(jax.grad(log_likelihood), in_axes=(None, 0))

  def add(total, group):
    return jax.tree.map(lambda old, g: old + (g.astype(jnp.float32) ** 2).sum(0), total, slopes(weights, group)), None

  return jax.lax.scan(add, total, examples)[0]


def _accumulate(module: Transformer, shardings: Mapping[str, jax.sharding.Sharding]) -> Callable:
  """The jitted add(total, params, arrays [N, B, 1, ...]) of texts that lie one to a row."""
  alone = module.clone(mesh=None)  # a single row is cut over no device

  def add(total, params, arrays):
    fixed = flatten_dict(dict(params))

    def log_likelihood(weights, text):
      leaves = fixed | {tuple(name.split("/")): leaf for name, leaf in weights.items()}
      whole = unflatten_dict(leaves)
      hidden_1TD, _ = alone.apply({"params": whole}, text["tokens"], text["segment"], text["position"])
      hidden_1PD, top = gather_positions(hidden_1TD, text["score_at"]), head(whole, alone.config)
      stop = jax.lax.stop_gradient
      label_P = _draw(text["key"], stop(hidden_1PD[0]), stop(top))
      logprob_P = token_logprobs(hidden_1PD, top, label_P[None])[0]
      return jnp.where(text["score_segment"][0] > 0, logprob_P, 0.0).sum()

    weights = {name: fixed[tuple(name.split("/"))] for name in total}
    return squared_gradients(total, weights, log_likelihood, arrays)

  return jax.jit(add, donate_argnums=0, out_shardings=dict(shardings))


def _draw(key_2: jax.Array, hidden_PD: jax.Array, top) -> jax.Array:
  """A token for every position from the model's own distribution there, int32 [P]."""
  key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
  one = lambda at: jax.random.categorical(jax.random.fold_in(key, at[0]), logits(at[1], top))
  return jax.lax.map(one, (jnp.arange(len(hidden_PD)), hidden_PD), batch_size=SAMPLED_AT_ONCE)


def _chunks(distinct: Mapping[str, Segment], model: LanguageModel, size: int):
  """(arrays [N, B, 1, ...], how many texts are in them), texts of one length class together, one to a row. What is
  missing to a whole number of texts is rows without a scored token, whose gradient is 0."""
  each = min(max(1, GRADIENT_BYTES // (4 * size)), SIDE_BY_SIDE)
  B, N = each * batch_shards(model.mesh), max(1, CALL_TEXTS // each)
  by_length: dict[int, list[str]] = {}
  for key, segment in distinct.items():
    by_length.setdefault(next(n for n in LENGTHS if n >= len(segment.tokens)), []).append(key)
  for T, keys in sorted(by_length.items()):
    groups = min(N, math.ceil(len(keys) / B))
    for begin in range(0, len(keys), groups * B):
      chosen = keys[begin : begin + groups * B]
      places = [Place(b, 0, 0, 0, 0) for b in range(len(chosen))]
      arrays = pack([distinct[key] for key in chosen], places, Shape(groups * B, T, T, 0, 1))
      arrays = {name: arrays[name] for name in ("tokens", "segment", "position", "score_at", "score_segment")}
      arrays = {name: x.reshape(groups, B, 1, T) for name, x in arrays.items()}
      words = [[int(key[:8], 16), int(key[8:16], 16)] for key in chosen]
      key_data = np.zeros((groups * B, 2), np.uint32)
      key_data[: len(chosen)] = words
      arrays["key"] = key_data.reshape(groups, B, 2)
      yield to_devices(arrays, NamedSharding(model.mesh, PartitionSpec(None, *BATCH))), len(chosen)


def _by_name(params: Mapping) -> dict[str, jax.Array]:
  return {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}


def _write(path: Path, fisher: Mapping[str, np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
  np.savez(temporary, **fisher)
  os.replace(temporary, path)
