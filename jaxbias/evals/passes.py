"""One forward pass over many segments: packed into a few static shapes, on every device of every process.

Axis letters: B packed rows, T tokens, S segments of a row, P scored positions, V vocabulary, D model; N what is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbias.data.pipeline import PASS_TOKENS, Place, Segment, Shape, pack, packed_batches
from jaxbias.distributed import on_host, to_devices
from jaxbias.losses.logprobs import gather_positions, token_logprobs, token_statistics
from jaxbias.mesh import batch_sharding, batch_shards
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.transformer import Transformer, head

LOGPROB, STATISTICS, STATES = "logprob", "statistics", "states"  # what is read of every target
POOLINGS = ("mean", "first", "last")  # over a segment's last hidden states
ON_ACCELERATORS = 16  # times as many tokens in a call as on a CPU


@functools.lru_cache(maxsize=16)
def program(module: Transformer, mesh: Mesh, read: str) -> Callable:
  """(variables, arrays, S) -> float32 [B, P] for LOGPROB; `token_statistics`, four of [B, P], for STATISTICS; the log-
  probabilities and what the head read for them, float32 [B, P, D], for STATES; a segment's vector, float32 [B, S, D],
  for one of POOLINGS. Compiled once a shape."""
  inputs = ("tokens", "segment", "position", "branch")

  @jax.jit
  def targets(variables, arrays):
    hidden, _ = module.apply(variables, *(arrays[name] for name in inputs))
    scored = gather_positions(hidden, arrays["score_at"])
    of = token_statistics if read == STATISTICS else token_logprobs
    found = of(scored, head(variables["params"], module.config, module.mesh), arrays["target"])
    return (found, scored.astype(jnp.float32)) if read == STATES else found

  @functools.partial(jax.jit, static_argnames="slots")
  def vectors(variables, arrays, slots: int):
    causal = module.config.causal  # an encoder's output has been through the head's dense layer: take what came before
    out, captures = module.apply(variables, *(arrays[n] for n in inputs), capture=() if causal else ("residual_out",))
    hidden_BTD = out if causal else captures["residual_out"][-1]
    member_BST = arrays["segment"][:, None] == jnp.arange(1, slots + 1)[:, None]
    length_BS1 = member_BST.sum(-1, keepdims=True)
    position_B1T = arrays["position"][:, None]
    chosen_BST = member_BST & {"mean": True, "first": position_B1T == 0, "last": position_B1T == length_BS1 - 1}[read]
    weight_BST = chosen_BST / jnp.maximum(chosen_BST.sum(-1, keepdims=True), 1)
    return jnp.einsum("bst,btd->bsd", weight_BST, hidden_BTD.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

  sharding = batch_sharding(mesh)

  def run(variables, arrays, slots):
    arrays = to_devices(arrays, sharding)
    return vectors(variables, arrays, slots) if read in POOLINGS else targets(variables, arrays)

  return run


def planned(segments: Sequence[Segment], shards: int) -> list[tuple[list[int], list[Place], Shape]]:
  """The batches of a pass on this backend."""
  return packed_batches(segments, shards, PASS_TOKENS * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS))


def padding(segments: Sequence[Segment], shapes: Sequence[Shape]) -> float:
  """The share of token positions that hold nothing."""
  return 1.0 - sum(len(segment.tokens) for segment in segments) / max(1, sum(shape.B * shape.T for shape in shapes))


def read(
  model: LanguageModel,
  segments: Sequence[Segment],
  what: str = LOGPROB,
  adapters: Mapping | None = None,
  advance: Callable[[int], None] = lambda segments: None,
) -> tuple[tuple[np.ndarray, ...], list[Shape]]:
  """What the model says about every segment, on every process, and the shape of each batch.

  LOGPROB (one array) and STATISTICS (four): the values of all targets, segment after segment, [N]. STATES: [N]
  and [N, D]. POOLINGS: one array [N, D], a row a segment. adapters: collections beside `params`. `advance(n)` is called
  after n more segments.
  """
  variables = {"params": model.params, **(adapters or {})}
  run, batches = program(model.module, model.mesh, what), planned(segments, batch_shards(model.mesh))
  sizes = [1 if what in POOLINGS else len(segment.target) for segment in segments]
  first, out, pending = np.cumsum([0, *sizes]), None, []

  def collect(indices, places, values):
    nonlocal out
    values = on_host(jax.tree.leaves(values))
    out = out or tuple(np.empty((first[-1], *leaf.shape[2:]), leaf.dtype) for leaf in values)
    for i, at in zip(indices, places, strict=True):
      begin = at.s if what in POOLINGS else at.p
      for whole, leaf in zip(out, values, strict=True):
        whole[first[i] : first[i + 1]] = leaf[at.b, begin : begin + sizes[i]]
    advance(len(indices))

  for indices, places, shape in batches:  # one batch is packed while the devices work on the one before
    arrays = pack([segments[i] for i in indices], places, shape)
    pending.append((indices, places, run(variables, arrays, shape.S)))
    if len(pending) > 1:
      collect(*pending.pop(0))
  for batch in pending:
    collect(*batch)
  return out or (np.zeros(0, np.float32),), [shape for *_, shape in batches]


def in_rows(rows: int, segments: int, advance: Callable[[int], None]) -> Callable[[int], None]:
  """For `read`'s progress in segments to be told as progress in rows."""
  done = 0

  def after(more: int) -> None:
    nonlocal done
    advance(rows * (done + more) // segments - rows * done // segments)
    done += more

  return after
