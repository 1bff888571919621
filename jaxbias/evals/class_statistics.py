"""Class counts, means and variances of a model's states over a data set, summed on the devices as the texts pass.

A state counts for the class of its label (`evals/class_labels.py`). A batch touches only the rows of the classes that
occur in it: what a call costs grows with its states, N D, not with the vocabulary, and no [N, C] array exists. Sums are
float32 with what rounding took from them kept beside them; counts are int32.

  moments = add(moments, x_ND, label_N)      one pass: means and squares (Chan, Golub & LeVeque 1983, pairwise merge)
  squares = deviate(squares, mean_CD, x_ND, label_N)    a second pass around final means, as the published code has it

Axis letters: N states, U classes of a batch, C classes, D features, K sites, B rows, T tokens, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbias.distributed import on_host, to_devices
from jaxbias.errors import UserError, did_you_mean
from jaxbias.losses.collapse import ahead
from jaxbias.mesh import batch_sharding, replicated
from jaxbias.models.config import ModelConfig
from jaxbias.models.layers import STACK_OUT
from jaxbias.models.transformer import Transformer

HEAD = "head_input"
TILE = 1024  # classes that a state is compared with at a time


@flax.struct.dataclass
class Sum:
  """A float32 sum, and what rounding took from it."""

  high: jax.Array
  low: jax.Array

  @classmethod
  def zeros(cls, *shape: int) -> Sum:
    return cls(jnp.zeros(shape), jnp.zeros(shape))

  def __add__(self, other: Sum) -> Sum:
    """The sum and, exactly, its rounding error (Knuth's two-sum)."""
    high = self.high + other.high
    part = high - self.high
    lost = (self.high - (high - part)) + (other.high - part)
    return Sum(high, self.low + other.low + lost)

  def value(self) -> jax.Array:
    return self.high + self.low


@flax.struct.dataclass
class Moments:
  count: jax.Array  # int32 [C]
  total: Sum  # [C, D]
  square: Sum  # [C], of |x - mu_c|^2

  @classmethod
  def zeros(cls, C: int, D: int) -> Moments:
    return cls(jnp.zeros(C, jnp.int32), Sum.zeros(C, D), Sum.zeros(C))

  def mean(self) -> jax.Array:
    """[C, D]; 0 for a class without samples."""
    return self.total.value() / jnp.maximum(self.count, 1)[:, None]


def merge(a: Moments, b: Moments) -> Moments:
  """Of the samples of both: M2 = M2_a + M2_b + |mu_a - mu_b|^2 n_a n_b / (n_a + n_b)."""
  n_a, n_b = a.count.astype(jnp.float32), b.count.astype(jnp.float32)
  apart = ((a.mean() - b.mean()) ** 2).sum(-1) * (n_a / jnp.maximum(n_a + n_b, 1.0)) * n_b
  square = a.square + b.square + Sum(apart, jnp.zeros_like(apart))
  return Moments(a.count + b.count, a.total + b.total, square)


def _slots(label_N: jax.Array, C: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The batch's classes, [N], C where there are no more; each state's place among them, [N]; whether it has one."""
  counts_N = label_N >= 0
  class_U, slot_N = jnp.unique(jnp.where(counts_N, label_N, C), size=len(label_N), fill_value=C, return_inverse=True)
  return class_U, slot_N, counts_N


def add(moments: Moments, x_ND: jax.Array, label_N: jax.Array) -> Moments:
  """Moments with N more samples; a label below 0 is none."""
  C, N = len(moments.count), len(label_N)
  class_U, slot_N, counts_N = _slots(label_N, C)
  x_ND = jnp.where(counts_N[:, None], x_ND.astype(jnp.float32), 0.0)
  sums = lambda value: jax.ops.segment_sum(value, slot_N, N)
  count_U, total_UD = sums(counts_N.astype(jnp.int32)), sums(x_ND)
  mean_UD = total_UD / jnp.maximum(count_U, 1)[:, None]
  square_U = sums(jnp.where(counts_N, ((x_ND - mean_UD[slot_N]) ** 2).sum(-1), 0.0))
  exact = lambda x: Sum(x, jnp.zeros_like(x))
  rows = jax.tree.map(lambda table: table.at[class_U].get(mode="fill", fill_value=0), moments)
  new = merge(rows, Moments(count_U, exact(total_UD), exact(square_U)))
  return jax.tree.map(lambda table, row: table.at[class_U].set(row, mode="drop"), moments, new)


def deviate(square: Sum, mean_CD: jax.Array, x_ND: jax.Array, label_N: jax.Array) -> Sum:
  """Sums of |x - mu_c|^2, [C], with N more samples."""
  away_N = ((x_ND.astype(jnp.float32) - mean_CD[jnp.maximum(label_N, 0)]) ** 2).sum(-1)
  more_C = jax.ops.segment_sum(jnp.where(label_N >= 0, away_N, 0.0), jnp.maximum(label_N, 0), len(mean_CD))
  return square + Sum(more_C, jnp.zeros_like(more_C))


def decisions(x_ND: jax.Array, mean_CD: jax.Array, weight_CD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """argmax_c x . w_c and argmin_c |x - mu_c|^2, int32 [N] both, the first of equals; TILE classes at a time."""
  C, center_D = len(mean_CD), mean_CD.mean(0)
  x_ND, away_ND = x_ND.astype(jnp.float32), x_ND.astype(jnp.float32) - center_D
  tiles = -(-C // TILE)
  cut = lambda rows: jnp.pad(rows, ((0, tiles * TILE - C), (0, 0))).reshape(tiles, TILE, -1)

  def best(found, tile):
    mean_MD, weight_MD, first = tile
    there_M = first + jnp.arange(TILE) < C
    near_NM = away_ND @ mean_MD.T - 0.5 * (mean_MD**2).sum(-1)
    scores = (x_ND @ weight_MD.T, near_NM)

    def better(old, score_NM):
      score_NM = jnp.where(there_M, score_NM, -jnp.inf)
      value_N, at_N = score_NM.max(-1), first + score_NM.argmax(-1).astype(jnp.int32)
      wins_N = value_N > old[0]
      return jnp.where(wins_N, value_N, old[0]), jnp.where(wins_N, at_N, old[1])

    return tuple(map(better, found, scores)), None

  none = (jnp.full(len(x_ND), -jnp.inf), jnp.zeros(len(x_ND), jnp.int32))
  with jax.default_matmul_precision("highest"):
    (linear, nearest), _ = jax.lax.scan(
      best, (none, none), (cut(mean_CD - center_D), cut(weight_CD.astype(jnp.float32)), jnp.arange(tiles) * TILE)
    )
  return linear[1], nearest[1]


def agree(found: jax.Array, mean_CD: jax.Array, weight_CD: jax.Array, x_ND: jax.Array, label_N: jax.Array) -> jax.Array:
  """Samples of each class, and those of them on which both rules of `decisions` agree: int32 [2, C], with N more."""
  linear_N, nearest_N = decisions(x_ND, mean_CD, weight_CD)
  kept_N2 = jnp.stack([label_N >= 0, (label_N >= 0) & (linear_N == nearest_N)], axis=-1).astype(jnp.int32)
  return found + jax.ops.segment_sum(kept_N2, jnp.maximum(label_N, 0), len(mean_CD)).T


# A model's states


def sites_of(config: ModelConfig, names: Sequence[str]) -> tuple[str, ...]:
  """Sites by their names, in the order of the layers: `head_input`, `layer_0` (the embeddings) to `layer_L` (behind the
  last block), `stack_out` (layer_L), or `all`. Raises UserError for another name."""
  known = [*(f"layer_{i}" for i in range(config.num_layers + 1)), HEAD]
  chosen = set()
  for name in names:
    name = {STACK_OUT: known[-2]}.get(name, name)
    if name != "all" and name not in known:
      raise UserError(f"there is no site `{name}`; {did_you_mean(name, [*known, STACK_OUT, 'all'])}")
    chosen |= set(known) if name == "all" else {name}
  return tuple(name for name in known if name in chosen)


def layers_of(sites: Sequence[str]) -> tuple[int, ...]:
  return tuple(int(name.removeprefix("layer_")) for name in sites if name != HEAD)


def states(module: Transformer, sites: tuple[str, ...], variables: Mapping, arrays: Mapping) -> dict[str, jax.Array]:
  """Of one forward pass, every site: {"layers": [K, B, T, D], "head": [1, B, T, D']}, those that are asked for."""
  last, layers = module.config.num_layers, layers_of(sites)
  capture = () if not layers else (STACK_OUT,) if layers == (last,) else ("residual_in", "residual_out")
  inputs = (arrays[name] for name in ("tokens", "segment", "position"))
  hidden_BTD, found = module.apply(variables, *inputs, capture=capture)
  out = {"head": hidden_BTD[None]} if HEAD in sites else {}
  if layers == (last,):
    out["layers"] = found[STACK_OUT][None]
  elif layers:
    stacked = jnp.concatenate([found["residual_in"][:1], found["residual_out"]])
    out["layers"] = stacked[np.array(layers)]
  return out


def pooled(x_KBTD: jax.Array, span_BT: jax.Array, pieces: int) -> jax.Array:
  """The mean of each state and those behind it, as many as `span` says, up to `pieces`."""
  if pieces == 1:
    return x_KBTD
  later = jax.vmap(ahead, in_axes=(0, None))
  total = sum(jnp.where((m < span_BT)[..., None], later(x_KBTD.astype(jnp.float32), m), 0.0) for m in range(pieces))
  return total / span_BT[..., None]


class Programs(NamedTuple):
  """Compiled once for a module, sites and shape; weights, adapters and statistics are arguments of all three."""

  add: Callable  # (variables, arrays, {kind: Moments of K sites}) -> the same with the batch's samples
  deviate: Callable  # (variables, arrays, {kind: Sum}, {kind: means}) -> Sum
  agree: Callable  # (variables, arrays, {kind: int32 [K, 2, C]}, {kind: means}, weights) -> int32 [K, 2, C]


@functools.lru_cache(maxsize=16)
def programs(module: Transformer, mesh: Mesh, sites: tuple[str, ...], pieces: int) -> Programs:
  whole = {"out_shardings": replicated(mesh)}

  def samples(variables, arrays):
    found = states(module, sites, variables, arrays)
    flat = {kind: pooled(x, arrays["span"], pieces).reshape(len(x), -1, x.shape[-1]) for kind, x in found.items()}
    return flat, arrays["label"].reshape(-1)

  @functools.partial(jax.jit, donate_argnums=2, **whole)
  def adding(variables, arrays, moments):
    x, label_N = samples(variables, arrays)
    return {kind: jax.vmap(add, in_axes=(0, 0, None))(moments[kind], x[kind], label_N) for kind in x}

  @functools.partial(jax.jit, donate_argnums=2, **whole)
  def deviating(variables, arrays, squares, means):
    x, label_N = samples(variables, arrays)
    each = jax.vmap(deviate, in_axes=(0, 0, 0, None))
    return {kind: each(squares[kind], means[kind], x[kind], label_N) for kind in x}

  @functools.partial(jax.jit, donate_argnums=2, **whole)
  def agreeing(variables, arrays, found, means, weight_CD):
    x, label_N = samples(variables, arrays)
    each = jax.vmap(agree, in_axes=(0, 0, None, 0, None))
    return {kind: each(found[kind], means[kind], weight_CD, x[kind], label_N) for kind in found}

  return Programs(adding, deviating, agreeing)


class Statistics(NamedTuple):
  """Of one site, on the host: int64 [C], float64 [C, D], [C]; samples and agreements of NC4, int64 [2, C] or None."""

  count: np.ndarray
  mean: np.ndarray
  variance: np.ndarray  # of all D together, biased: sum |x - mu|^2 / n; NaN for a class of fewer than two samples
  agreement: np.ndarray | None


Batches = Sequence[Mapping[str, np.ndarray]]


def collect(
  module: Transformer, mesh: Mesh, variables: Mapping, fit: Batches, held: Batches, classes: int, weight_CD, *,
  sites: tuple[str, ...], pieces: int = 1, passes: int = 1, advance: Callable[[int], None] = lambda batches: None,
) -> dict[str, Statistics]:  # fmt: skip
  """Statistics of every site from one forward pass a batch, on all devices of all processes.

  fit: batches for counts, means and variances; passes = 2 reads them again, for variances around final means. held:
  batches for NC4, for sites as wide as `weight_CD` [C, D]; none where it is None. All batches have one shape.
  """
  run, c = programs(module, mesh, sites, pieces), module.config
  widths = ({"layers": (len(layers_of(sites)), c.hidden_size)} if layers_of(sites) else {}) | (
    {"head": (1, c.table_size)} if HEAD in sites else {})  # fmt: skip
  put = functools.partial(to_devices, sharding=replicated(mesh))
  none = lambda K, make: put(jax.tree.map(lambda x: np.zeros((K, *x.shape), x.dtype), jax.eval_shape(make)))

  def over(batches: Batches, step: Callable, state, *more):
    for arrays in batches:
      state = step(variables, to_devices(arrays, batch_sharding(mesh)), state, *more)
      advance(1)
    return state

  empty = {kind: none(K, lambda D=D: Moments.zeros(classes, D)) for kind, (K, D) in widths.items()}
  moments = over(fit, run.add, empty)
  means = {kind: jax.vmap(Moments.mean)(one) for kind, one in moments.items()}
  squares = {kind: one.square for kind, one in moments.items()}
  if passes == 2:
    empty = {kind: none(K, lambda: Sum.zeros(classes)) for kind, (K, _) in widths.items()}
    squares = over(fit, run.deviate, empty, means)
  compared = [kind for kind, (_, D) in widths.items() if weight_CD is not None and D == weight_CD.shape[1]]
  agreed = over(held if compared else (), run.agree,
                {kind: none(widths[kind][0], lambda: jnp.zeros((2, classes), jnp.int32)) for kind in compared},
                {kind: means[kind] for kind in compared}, weight_CD)  # fmt: skip
  return _on_host(sites, moments, squares, agreed if held else {})


def _on_host(sites: Sequence[str], moments: Mapping, squares: Mapping, agreed: Mapping) -> dict[str, Statistics]:
  leaves, tree = jax.tree.flatten((moments, squares, agreed))
  moments, squares, agreed = jax.tree.unflatten(tree, on_host(leaves))
  exact = lambda total: total.high.astype(np.float64) + total.low
  out, layer = {}, 0
  for site in sites:
    kind, k = ("head", 0) if site == HEAD else ("layers", layer)
    layer += site != HEAD
    one = jax.tree.map(lambda x, k=k: x[k], moments[kind])
    count = one.count.astype(np.int64)
    mean = exact(one.total) / np.maximum(count, 1)[:, None]
    square = exact(jax.tree.map(lambda x, k=k: x[k], squares[kind]))
    variance = np.where(count > 1, square / np.maximum(count, 1), np.nan)
    agreement = agreed[kind][k].astype(np.int64) if kind in agreed else None
    out[site] = Statistics(count, mean, variance, agreement)
  return out
