"""Continuations: prompts are read into a cache at once, then one compiled loop writes token after token for all rows.

Rows are padded on the left, so that every row's next token goes into the same slot of the cache. A row's tokens depend
on its prompt, its settings, its id and the seed; neither on the rows beside it nor on the number of devices.

Axis letters: B rows, T prompt tokens but the last, N new tokens, V vocabulary.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbias.data.rows import Prompt
from jaxbias.data.tokens import Tokenizer
from jaxbias.distributed import on_host, to_devices
from jaxbias.errors import UserError
from jaxbias.evals.sampling import Rules, Sampling, choose
from jaxbias.losses.logprobs import logits
from jaxbias.mesh import BATCH, batch_sharding, batch_shards, replicated
from jaxbias.models.config import ModelConfig
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.layers import Cache
from jaxbias.models.transformer import Transformer, empty_cache, head

STEPS_BETWEEN_LOOKS = 16  # at the text, where there are stop strings: a row writes at most this much for nothing


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What follows a prompt. `tokens` reach up to the one that completes a stop string, which `text` leaves out; an
  end-of-text token is in neither. `dropped`: tokens cut from the prompt's left."""

  text: str
  tokens: tuple[int, ...]
  reason: str  # "eos", "stop" or "length"
  dropped: int = 0


@flax.struct.dataclass
class State:
  """Where the loop is. The cache holds every token but the last one."""

  cache: Cache
  token: jax.Array  # int32 [B]: the last one, not read yet
  position: jax.Array  # int32 [B]
  seen: jax.Array  # bool [B, V]: tokens of the prompt and those written
  out: jax.Array  # int32 [B, N], -1 where nothing was written
  done: jax.Array  # bool [B]
  step: jax.Array  # int32 []


@functools.lru_cache(maxsize=8)
def programs(module: Transformer, mesh: Mesh) -> tuple[Callable, Callable]:
  """fill(variables, arrays, room) -> State reads prompts; decode(variables, state, rules, stopped_B, until) -> State
  writes until every row is done or has `until` tokens. Compiled for each number of rows, slots and (fill) prompt
  tokens; `state` is donated."""
  config = module.config
  rows, whole = batch_sharding(mesh), replicated(mesh)
  kv_axis = "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None
  kv = NamedSharding(mesh, PartitionSpec(None, *BATCH, None, kv_axis))
  shardings = State(Cache(kv, kv, rows, rows, whole), rows, rows, rows, rows, rows, whole)

  @functools.partial(jax.jit, static_argnames="room", out_shardings=shardings)
  def fill(variables, arrays, room: int) -> State:
    (B, T), V = arrays["tokens"].shape, config.vocab_size
    cache = empty_cache(config, B, T + room)
    _, out = module.apply(variables, arrays["tokens"], arrays["segment"], arrays["position"], cache=cache)
    real = jnp.where(arrays["segment"] > 0, arrays["tokens"], V)  # padding falls outside of `seen`
    seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], real].set(True, mode="drop")
    seen |= arrays["last"][:, None] == jnp.arange(V)
    length_B = arrays["segment"].sum(-1)
    written = jnp.full((B, room), -1, jnp.int32)
    return State(out["cache"], arrays["last"], length_B, seen, written, jnp.zeros(B, bool), jnp.int32(0))

  @functools.partial(jax.jit, donate_argnames="state", out_shardings=shardings)
  def decode(variables, state: State, rules: Rules, stopped_B, until) -> State:
    eos = jnp.asarray(config.eos_ids, jnp.int32)

    def more(s: State) -> State:
      one = jnp.ones_like(s.token)[:, None]
      hidden, out = module.apply(variables, s.token[:, None], one, s.position[:, None], cache=s.cache)
      token = choose(logits(hidden[:, 0], head(variables["params"], config, mesh)), s.seen, rules, s.step)
      new = jnp.where(s.done, -1, token)[:, None]
      return State(
        out["cache"], token, s.position + 1, s.seen | (token[:, None] == jnp.arange(config.vocab_size)),
        jax.lax.dynamic_update_slice_in_dim(s.out, new, s.step, axis=1),
        s.done | jnp.isin(token, eos) | (s.step + 1 >= rules.limit), s.step + 1,
      )  # fmt: skip

    state = state.replace(done=state.done | stopped_B | (rules.limit == 0))
    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.done.all(), more, state)

  return fill, decode


def generate(
  model: LanguageModel,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling | Sequence[Sampling],
  adapters: Mapping | None = None,
  ids: Sequence[str] | None = None,
  truncate: bool = False,
  batch_size: int = 64,
  advance: Callable[[int], None] = lambda rows: None,
) -> list[Continuation]:
  """A continuation of every prompt (token ids, the start token included), in order.

  sampling: one for all or one a prompt. ids: what a row's random stream is named after, its place by default.
  truncate: a prompt that leaves no room in the model's window loses tokens on its left. adapters, advance: as in
  `scoring.score`. batch_size: rows on each shard of the batch at one time.
  Raises UserError for a masked model, an empty prompt and one that does not fit.
  """
  settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
  ids = [str(i) for i in range(len(prompts))] if ids is None else ids
  if not model.config.causal:
    raise UserError(f"{model.name} is a masked language model; only a causal one continues a text.")
  fitted = [_fit(model.config, *row, truncate) for row in zip(ids, prompts, settings, strict=True)]
  rows = [_Row(list(p[dropped:]), s, _number(i), dropped) for i, p, s, dropped in zip(ids, prompts, settings, fitted,
                                                                                      strict=True)]
  variables = {"params": model.params, **(adapters or {})}
  found: dict[int, Continuation] = {}
  for indices, shape in _batches(rows, batch_size, batch_shards(model.mesh)):
    found |= zip(indices, _continue(model, variables, [rows[i] for i in indices], shape), strict=True)
    advance(len(indices))
  return [found[i] for i in range(len(rows))]


def answers(
  model: LanguageModel,
  rows: Sequence[Prompt],
  adapters: Mapping | None = None,
  seed: int = 0,
  truncate: bool = False,
  advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, list[str]]:
  """{id: the row's `samples` continuations}; the start token stands before every prompt, as in scoring."""
  encoded = model.tokenizer.encode_batch([row.text for row in rows])
  every = [(row, [model.tokenizer.start_id, *ids], n) for row, ids in zip(rows, encoded, strict=True)
           for n in range(row.samples)]
  sampling = [Sampling(row.max_tokens, row.temperature, top_p=row.top_p, stop=row.stop, seed=seed) for row, *_ in every]
  ids = [f"{row.id} sample {n}" if n else row.id for row, _, n in every]
  texts = generate(model, [ids for _, ids, _ in every], sampling, adapters, ids, truncate, advance=advance)
  out: dict[str, list[str]] = {row.id: [] for row in rows}
  for (row, *_), text in zip(every, texts, strict=True):
    out[row.id].append(text.text)
  return out


@dataclasses.dataclass(frozen=True)
class _Row:
  prompt: list[int]
  sampling: Sampling
  number: int
  dropped: int


def _number(identity: str) -> int:
  return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "little")


def _fit(config: ModelConfig, identity: str, prompt: Sequence[int], sampling: Sampling, truncate: bool) -> int:
  """How many tokens the prompt has to lose. Raises UserError where it is empty or may not."""
  if not len(prompt):
    raise UserError(f"prompt {identity} has no tokens; begin it with the model's start token.")
  read = len(prompt) + sampling.max_tokens - 1  # the last new token is not read any more
  over = max(0, read - config.max_positions)
  if over and (not truncate or over >= len(prompt)):
    raise UserError(f"prompt {identity} has {len(prompt)} tokens and is to get {sampling.max_tokens} more; the model "
                    f"has {config.max_positions} positions. Shorten it, lower max_tokens, or have it truncated.")
  for rope in config.ropes:
    if rope.long_inverse is not None and len(prompt) - over <= rope.original_positions < read - over:
      raise UserError(
        f"prompt {identity} would grow past {rope.original_positions} tokens, where this model (LongRoPE) turns all "
        "keys anew and a cache cannot follow; keep prompt and max_tokens on one side of it."
      )
  return over


def _bucket(size: int, least: int) -> int:
  """The next of 2^n and 3 * 2^n: few shapes, so few programs, at most a half too large."""
  return next(s for n in range(40) for s in (least << n, 3 * (least << n) // 2) if s >= size)


def _batches(rows: Sequence[_Row], per_shard: int, shards: int) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
  """Row numbers of a batch and its shape (B, T, N); rows of similar length and task together."""
  sizes = [(_bucket(len(row.prompt) - 1, 16), _bucket(row.sampling.max_tokens, 16), bool(row.sampling.stop))
           for row in rows]
  order = sorted(range(len(rows)), key=lambda i: (sizes[i], i))
  while order:
    most = per_shard * shards
    batch = [i for i in order[:most] if sizes[i] == sizes[order[0]]]
    order = order[len(batch) :]
    T, N, _ = sizes[batch[0]]
    yield batch, (shards * _bucket(-(-len(batch) // shards), 1), T, N)


def _continue(model: LanguageModel, variables, rows: Sequence[_Row], shape: tuple[int, int, int]) -> list[Continuation]:
  """One batch: fill, decode, and between times a look at the texts that have stop strings."""
  B, _, N = shape
  fill, decode = programs(model.module, model.mesh)
  sharding = batch_sharding(model.mesh)
  arrays, rules = to_devices(_arrays(rows, shape), sharding)
  state = fill(variables, arrays, N)
  eos, stopped, longest = model.config.eos_ids, np.zeros(B, bool), max(row.sampling.max_tokens for row in rows)
  look = STEPS_BETWEEN_LOOKS if any(row.sampling.stop for row in rows) else longest
  for until in range(look, longest + look, look):
    state = decode(variables, state, rules, to_devices(stopped, sharding), min(until, longest))
    written, done = on_host((state.out, state.done))
    texts = zip(rows, written[: len(rows)], strict=True)
    found = [_ending(model.tokenizer, row, tokens[tokens >= 0].tolist(), eos) for row, tokens in texts]
    stopped[: len(rows)] = [continuation.reason == "stop" for continuation in found]
    if (done | stopped).all():
      break
  return found


def _arrays(rows: Sequence[_Row], shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], Rules]:
  B, T, _ = shape
  ints = lambda *size: np.zeros(size, np.int32)
  arrays = {"tokens": ints(B, T), "segment": ints(B, T), "position": ints(B, T), "last": ints(B)}
  for b, row in enumerate(rows):
    *before, arrays["last"][b] = row.prompt
    at = T - len(before)
    arrays["tokens"][b, at:], arrays["segment"][b, at:], arrays["position"][b, at:] = before, 1, range(len(before))
  padding = _Row([], Sampling(), 0, 0)
  of = lambda dtype, read: np.array([read(row) for row in (*rows, *[padding] * (B - len(rows)))], dtype)
  return arrays, Rules(
    of(np.float32, lambda row: row.sampling.temperature), of(np.int32, lambda row: row.sampling.top_k),
    of(np.float32, lambda row: row.sampling.top_p), of(np.float32, lambda row: row.sampling.repetition_penalty),
    of(np.int32, lambda row: row.sampling.max_tokens if row.prompt else 0),
    of(np.uint32, lambda row: row.sampling.seed), of(np.uint32, lambda row: row.number),
  )  # fmt: skip


def _ending(tokenizer: Tokenizer, row: _Row, tokens: list[int], eos: Sequence[int]) -> Continuation:
  """What the tokens say so far, up to end-of-text or the stop string that is complete first."""
  ended = bool(tokens) and tokens[-1] in eos
  tokens = tokens[:-1] if ended else tokens
  text, end, length = _text(tokenizer, row.prompt, tokens), None, len(tokens)
  hits = [(at + len(stop), at) for stop in row.sampling.stop if (at := text.find(stop)) >= 0]
  if hits:
    end = min(hits)[1]
    complete = lambda n: any(stop in _text(tokenizer, row.prompt, tokens[:n]) for stop in row.sampling.stop)
    length = bisect.bisect_left(range(length), True, key=complete)
  reason = "stop" if hits else "eos" if ended else "length"
  return Continuation(text[:end], tuple(tokens[:length]), reason, row.dropped)


def _text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
  """The text that tokens add to a prompt; decoded behind its last token, or SentencePiece would eat a first space."""
  return tokenizer.decode([prompt[-1], *tokens]).removeprefix(tokenizer.decode(prompt[-1:]))
