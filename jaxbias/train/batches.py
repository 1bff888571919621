"""Which texts a step reads, and the packed batch made of them. A pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxbias.data.groups import draw_members
from jaxbias.data.pipeline import (
  ANSWER,
  ENTITY,
  Segment,
  Shape,
  draw,
  draw_mixture,
  grown,
  member_segment,
  pack,
  place_in,
  plan,
  text_segment,
)  # fmt: skip
from jaxbias.data.rows import KINDS
from jaxbias.data.tokens import Tokenizer, answer_mask
from jaxbias.errors import UserError
from jaxbias.losses.registry import Objective
from jaxbias.methods.controllers import Phase
from jaxbias.methods.recipes import Recipe, Row
from jaxbias.train.reference import Reference, key_of
from jaxbias.types import ROLES, Batch

GROUP_ROLES = ("retain", "forget")  # of positives and of negatives
GROUP_STREAM = len(ROLES)  # the draw of groups, beside those of the roles
PLANNED_STEPS = 512  # the common shape is planned on the first steps; a later step that needs more gets its own
LARGE_AHEAD = 4  # batches, each tokenised by a thread of its own, where texts are read when a step asks for them


@dataclasses.dataclass(frozen=True)
class Texts:
  """The tokenised texts of each role that an objective reads: tuples, or for large sources Grain's MapDatasets, which
  read and tokenise a text when it is asked for."""

  rows: Mapping[str, Sequence[Row]]
  segments: Mapping[str, Sequence[Segment]]
  paired: bool
  alone: Texts | None = None  # as in a Recipe
  mixtures: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)  # as in a Recipe

  @functools.cached_property
  def grouped(self) -> bool:
    return any(row.group >= 0 for rows in self.rows.values() if isinstance(rows, tuple) for row in rows)

  @functools.cached_property
  def by_group(self) -> list[dict[str, list[int]]]:
    """For each group its texts' indices by role, in their order."""
    out: dict[int, dict[str, list[int]]] = {}
    for role in GROUP_ROLES:
      for i, row in enumerate(self.rows.get(role, ())):
        out.setdefault(row.group, {}).setdefault(role, []).append(i)
    return [out[number] for number in sorted(out)]

  def all_segments(self) -> list[Segment]:
    """Raises UserError where a role's texts are not in memory."""
    if large := self.large:
      raise UserError(f"data.roles.{large[0]} has {len(self.rows[large[0]]):,} texts, too many to ask the start model "
                      "about all of them; set train.reference to step.")
    mine = [segment for role in self.segments for segment in self.segments[role]]
    return mine + (self.alone.all_segments() if self.alone else [])

  @property
  def large(self) -> list[str]:
    """Roles whose texts are read when a step asks for them."""
    return [role for role, segments in self.segments.items() if not isinstance(segments, tuple)]

  def in_phase(self, phase: Phase) -> Texts:
    """The texts of the phase's bias type (or of all), forget and retain exchanged for the types that are swapped.

    Texts without a type stay as they are. Raises UserError for a role that would have no text left.
    """
    if phase.only and self.alone:
      return self.alone.in_phase(phase)
    if unable := [*self.large, *self.mixtures]:
      raise UserError(f"a controller exchanges texts by their bias type, which needs them in memory and of one source; "
                      f"data.roles.{unable[0]} has too many, or several sources.")
    both = {role: list(zip(self.rows[role], self.segments[role], strict=True)) for role in self.rows}
    if not {"forget", "retain"} <= both.keys():
      raise UserError("a controller exchanges the roles forget and retain; this objective does not read both.")
    moves = lambda row: row.domain in phase.swapped
    stays = {role: [pair for pair in members if not moves(pair[0])] for role, members in both.items()}
    if self.paired:  # a pair keeps its place in both lists
      exchange = [(r, f) if moves(f[0]) else (f, r) for f, r in zip(both["forget"], both["retain"], strict=True)]
      both["forget"], both["retain"] = (list(side) for side in zip(*exchange, strict=True))
    else:
      moved = {role: [pair for pair in both[role] if moves(pair[0])] for role in ("forget", "retain")}
      both["forget"], both["retain"] = stays["forget"] + moved["retain"], stays["retain"] + moved["forget"]
    for role, members in both.items():
      both[role] = [pair for pair in members if pair[0].domain in ("", phase.only or pair[0].domain)]
      if not both[role]:
        raise UserError(f"no text of the type `{phase.only}` can play the role `{role}`; the controller cannot go on.")
    sides = lambda i: {role: tuple(pair[i] for pair in members) for role, members in both.items()}
    return Texts(sides(0), sides(1), self.paired)


def tokenise(
  recipe: Recipe, objective: Objective, tokenizer: Tokenizer, max_positions: int, max_tokens: int = 0
) -> Texts:
  """Texts of more than `max_tokens` tokens (0: the model's window) are cut, see `cut`.

  Raises UserError for an empty role, a text past the model's window, an answer of no tokens, or missing pairs, and for
  a large source where `max_tokens` is 0: a text that is too long would only be found by the step that reads it.
  """
  if "pairs" in objective.needs and not recipe.paired:
    names = " and ".join(f"`{term.loss}`" for term in objective.terms)
    raise UserError(f"{names} need paired texts, which this method's data recipe has not; use one such as dpo's.")
  if "groups" in objective.needs and not recipe.paired and not any(row.group >= 0 for row in recipe.retain):
    raise UserError("a loss needs groups of positives and negatives, which this method's data recipe has not; use one "
                    "such as contrastive's.")
  rows = {role: recipe.rows(role) for role in ROLES if role in objective.roles}
  for role, members in rows.items():
    if not members:
      raise UserError(f"the training split has no text for the role `{role}`, which the losses read.")
    if not max_tokens and not isinstance(members, tuple):
      raise UserError(f"data.roles.{role} has {len(members):,} texts, which are read when a step asks for them; set "
                      "data.max_tokens to say where a longer one is cut.")
  segments = {}
  for role, members in rows.items():
    segment = functools.partial(_segment, tokenizer, max_positions, max_tokens, role, objective)
    segments[role] = tuple(map(segment, members)) if isinstance(members, tuple) else members.map(segment)
  alone = tokenise(recipe.alone, objective, tokenizer, max_positions, max_tokens) if recipe.alone else None
  return Texts(rows, segments, recipe.paired, alone, recipe.mixtures)


def cut(ids: list[int], start: int, most: int) -> tuple[list[int], int]:
  """At most `most` of a text's tokens, and where its answer begins among them: of a prompt its last `most` // 2 stay
  at least, of the answer its beginning."""
  ahead = max(0, min(start - most // 2, len(ids) - most))
  return ids[ahead : ahead + most], start - ahead


def _segment(
  tokenizer: Tokenizer, max_positions: int, max_tokens: int, role: str, objective: Objective, row: Row
) -> Segment:
  if row.group >= 0:
    return _member(row, tokenizer, max_positions, role, objective)
  ids, start = answer_mask(tokenizer, row.text, row.prefix)
  if max_tokens:
    ids, start = cut(ids, start, min(max_tokens, max_positions - 1))
  if start >= len(ids):
    raise UserError(f"text {row.id}: no token ends after its first {row.prefix} characters; there is nothing to learn.")
  if len(ids) > max_positions:
    raise UserError(f"text {row.id} takes {len(ids)} positions with its start token, the model has {max_positions}; "
                    "shorten the text.")
  tokens = [tokenizer.start_id, *ids]
  return text_segment(tokens, start + 1, score=role in objective.scored_roles, kl=role in objective.kl_roles)


def _member(row: Row, tokenizer: Tokenizer, max_positions: int, role: str, objective: Objective) -> Segment:
  """A member of a group: its answer, the entities in it, and which tokens are taught (`Row.labels`)."""
  ids, offsets = tokenizer.encode_with_offsets(row.text)
  if len(ids) + 1 > max_positions:
    raise UserError(f"text {row.id} takes {len(ids) + 1} positions with its start token, the model has "
                    f"{max_positions}; shorten its source.")
  within = lambda span, token: token[0] < span[1] and token[1] > span[0]
  mark = lambda at: (at[1] > row.prefix) * (ENTITY if any(within(span, at) for span in row.entities) else ANSWER)
  marks = np.array([0, *map(mark, offsets)], np.int32)
  answer = np.flatnonzero(marks)
  if not len(answer):
    raise UserError(f"text {row.id}: no token ends after its source of {row.prefix} characters.")
  tokens = np.array([tokenizer.start_id, *ids], np.int32)
  taught = answer[1:] if row.labels == "inside" else answer
  score_at, target = taught - 1, tokens[taught]
  if row.labels == "to_end" and tokenizer.eos_id is not None:
    score_at, target = np.append(score_at, len(tokens) - 1), np.append(target, tokenizer.eos_id)
  if role not in objective.scored_roles:
    score_at, target = score_at[:0], target[:0]
  return member_segment(tokens, marks, score_at, target, kl=role in objective.kl_roles)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """batch(step) for one seed. `counts` is the number of texts of each role in a step (of mismatched ones as many as of
  retain, unless it says). Without a `reference` the step itself asks the start model."""

  texts: Texts
  objective: Objective
  counts: Mapping[str, int]
  reference: Reference | None
  seed: int
  shards: int
  accumulate: int = 1  # parts of a step's texts, each packed alone; a batch of several has them as a leading axis

  @property
  def ahead(self) -> int:
    """How many steps before its own a batch is begun."""
    return LARGE_AHEAD if self.texts.large else 1

  def in_phase(self, phase: Phase) -> Sampler:
    """Where the only type is swapped, forget and retain exchange their counts, too, as in BiasUnlearn's scripts."""
    counts = dict(self.counts)
    if phase.only in phase.swapped:
      counts |= {"forget": self.counts["retain"], "retain": self.counts["forget"]}
    return dataclasses.replace(self, texts=self.texts.in_phase(phase), counts=counts)

  def members(self, step: int) -> list[tuple[str, int]]:
    """(role, index of the text) of every segment of a step; the twins of a pair are drawn together."""
    paired = "pairs" in self.objective.needs
    out = self._drawn_groups(step) if self.texts.grouped else []
    for role in (role for role in self.texts.rows if not (self.texts.grouped and role in GROUP_ROLES)):
      stream = "retain" if paired and role == "forget" else role
      per_step, key = self.counts.get(stream, self.counts["retain"]), (self.seed, ROLES.index(stream))
      parts = self.texts.mixtures.get(stream)
      chosen = (draw_mixture(parts, per_step, step, key) if parts
                else draw(len(self.texts.rows[stream]), per_step, step, key))
      out += [(role, int(i)) for i in chosen]
    return out

  def _drawn_groups(self, step: int) -> list[tuple[str, int]]:
    """The members of `groups` groups, at most so many `positives`, the original among them, and `negatives` of each;
    all members where they are pairs."""
    by_group = self.texts.by_group
    chosen = draw(len(by_group), min(self.counts["groups"], len(by_group)), step, (self.seed, GROUP_STREAM))
    out = []
    for number in chosen:
      for stream, (role, most) in enumerate(zip(GROUP_ROLES, (self.counts["positives"], self.counts["negatives"]),
                                                strict=True)):  # fmt: skip
        members = by_group[number].get(role, [])
        kinds = [self.texts.rows[role][i].kind for i in members]
        most = len(members) if "pairs" in self.objective.needs else most
        key = (self.seed, GROUP_STREAM, step, int(number), stream)
        out += [(role, members[i]) for i in draw_members(kinds, most, key, first=1 - stream)]
    return out

  def segments(self, step: int) -> list[Segment]:
    return [self.texts.segments[role][i] for role, i in self.members(step)]

  def parts(self, members: Sequence[tuple[str, int]]) -> list[list[int]]:
    """Indices of the members in each of `accumulate` parts, dealt out in turns; twins and groups stay together."""
    units: dict[tuple, list[int]] = {}
    for number, (role, i) in enumerate(members):
      if self.texts.grouped and role in GROUP_ROLES:
        unit = "group", self.texts.rows[role][i].group
      elif "pairs" in self.objective.needs and role in ROLES[:2]:
        unit = "pair", i
      else:
        unit = role, number
      units.setdefault(unit, []).append(number)
    if len(units) < self.accumulate:
      raise UserError(f"train.accumulate = {self.accumulate} is more than the {len(units)} texts, pairs or groups of a "
                      "step.")  # fmt: skip
    dealt = list(units.values())
    return [sorted(sum(dealt[part :: self.accumulate], [])) for part in range(self.accumulate)]

  def batch(self, step: int, planned: Shape) -> tuple[Batch, list[str]]:
    """The packed batch in numpy, and the id of every text in it by `batch.row`."""
    members = self.members(step)
    parts = self.parts(members)
    placed = [place_in([self.texts.segments[role][i] for role, i in map(members.__getitem__, part)], planned)
              for part in parts]  # fmt: skip
    shape = functools.reduce(lambda shape, found: grown(shape, found[1], self.shards), placed, planned)
    packed = [self._packed([members[n] for n in part], part, places, shape)
              for part, (places, _) in zip(parts, placed, strict=True)]  # fmt: skip
    whole = packed[0] if self.accumulate == 1 else jax.tree.map(lambda *of_parts: np.stack(of_parts), *packed)
    return whole, [self.texts.rows[role][i].id for role, i in members]

  def _packed(self, members: Sequence[tuple[str, int]], numbers: Sequence[int], places, shape: Shape) -> Batch:
    """Some texts of a step, whose numbers in it are `numbers`, in their places."""
    segments = [self.texts.segments[role][i] for role, i in members]
    arrays = pack(segments, places, shape)
    arrays.pop("branch")
    groups = "groups" in self.objective.needs
    names = ("role", "row", "pair", *(("group", "polarity", "kind") if groups else ()))
    per_segment = {name: np.full((shape.B, shape.S), -1, np.int32) for name in names}
    per_segment |= {"toxicity": np.zeros((shape.B, shape.S), np.float32)} if groups else {}
    slot = {member: at.b * shape.S + at.s for member, at in zip(members, places, strict=True)}
    for number, (role, i), at in zip(numbers, members, places, strict=True):
      per_segment["role"][at.b, at.s] = ROLES.index(role)
      per_segment["row"][at.b, at.s] = number
      if "pairs" in self.objective.needs and role in ROLES[:2]:
        per_segment["pair"][at.b, at.s] = slot["forget" if role == "retain" else "retain", i]
      if groups and role in GROUP_ROLES:
        row = self.texts.rows[role][i]
        per_segment["group"][at.b, at.s] = row.group if self.texts.grouped else i
        if self.texts.grouped:
          per_segment["polarity"][at.b, at.s] = role == "retain"
          per_segment["kind"][at.b, at.s], per_segment["toxicity"][at.b, at.s] = KINDS.index(row.kind), row.toxicity
    if not groups:
      arrays = {name: array for name, array in arrays.items() if name not in ("answer", "entity")}
    return Batch(**arrays, **per_segment, **self._reference(segments, places, shape))

  def _reference(self, segments: Sequence[Segment], places, shape: Shape) -> dict[str, np.ndarray]:
    out = {}
    if self.reference is None:
      return out
    if "ref_logprob" in self.objective.needs:
      out["ref_logprob"] = np.zeros((shape.B, shape.P), np.float32)
    if self.objective.kl_roles:
      width = next(iter(self.reference.hidden.values())).shape[-1]
      out["ref_hidden"] = np.zeros((shape.B, shape.K, width), np.float32)
    for segment, at in zip(segments, places, strict=True):
      key = key_of(segment)
      if "ref_logprob" in out:
        out["ref_logprob"][at.b, at.p : at.p + len(segment.target)] = self.reference.logprob[key]
      if "ref_hidden" in out:
        out["ref_hidden"][at.b, at.k : at.k + len(segment.kl_at)] = self.reference.hidden[key]
    return out


def plan_shape(samplers: Sequence[Sampler], steps: int) -> Shape:
  """One shape for the first steps of several runs (seeds), so that they share one compiled program."""
  first = []
  for sampler in samplers:
    for step in range(min(steps, PLANNED_STEPS)):
      segments, members = sampler.segments(step), sampler.members(step)
      first += [[segments[number] for number in part] for part in sampler.parts(members)]
  return plan(first, samplers[0].shards)
