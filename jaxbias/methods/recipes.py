"""From labelled data to the texts of each role. Nothing here knows about tokens or losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxbias.data.rows import Group, Member, Role, Split, Triple
from jaxbias.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
  """A text in a role. Tokens that end after `prefix` characters are its answer, the part that losses score.

  `domain`: its bias type, by which a controller may swap roles; "" for text that has none.
  """

  id: str
  text: str
  prefix: int
  domain: str = ""
  group: int = -1  # the number of its contrast group; what follows is of a group's members
  kind: str = ""
  entities: tuple[tuple[int, int], ...] = ()  # characters of `text`
  toxicity: float = 0.0
  labels: str = "answer"  # what is taught; "to_end": its end, too; "inside": all but the first, as published


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The texts of each role. With `paired`, forget[i] and retain[i] are the two fillings of one triple.

  `mismatched`: the prefix of one text with the answer of another, by which KTO estimates how far the model has moved.
  `alone`: what is read instead while a controller trains one bias type alone; None where that is the same texts.
  Rows are a tuple, or a Grain MapDataset that reads them when they are asked for. `mixtures`: as in `rows.Role`.
  """

  forget: Sequence[Row]
  retain: Sequence[Row]
  general: Sequence[Row]
  paired: bool
  mismatched: Sequence[Row] = ()
  alone: Recipe | None = None
  mixtures: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)

  def rows(self, role: str) -> Sequence[Row]:
    return getattr(self, role)


def grouped(groups: Sequence[Group], general: tuple[Row, ...] = (), labels: str = "to_end") -> Recipe:
  """Retain the positives, forget the negatives, each after its source; every row knows its group."""

  def row(number: int, group: Group, member: Member) -> Row:
    before = len(group.source)
    entities = tuple((before + start, before + end) for start, end in member.entities)
    return Row(member.id, group.source + member.text, before, "", number, member.kind, entities, member.toxicity,
               labels)  # fmt: skip

  side = lambda name: tuple(row(n, g, m) for n, g in enumerate(groups) for m in getattr(g, name))
  return Recipe(side("negatives"), side("positives"), general, paired=False)


def stereotype_row(triple: Triple) -> Row:
  return Row(f"{triple.id}/stereotype", triple.stereotype, triple.prefix, triple.domain)


def anti_stereotype_row(triple: Triple) -> Row:
  return Row(f"{triple.id}/anti-stereotype", triple.anti_stereotype, triple.prefix, triple.domain)


def unrelated_row(triple: Triple) -> Row:
  """As general text: all of it counts, and it has no bias type."""
  return Row(f"{triple.id}/unrelated", triple.unrelated, 0)


def general_rows(split: Split) -> Sequence[Row]:
  if "general" in split.roles:
    return own_rows(split.roles["general"])
  return tuple(Row(text.id, text.text, 0) for text in split.texts)


def own_rows(role: Role) -> Sequence[Row]:
  return role.rows(lambda found: Row(found.id, found.text, found.prefix, found.domain))


def with_roles(recipe: Recipe, split: Split, seed: int) -> Recipe:
  """The recipe with the split's own texts of a role in place of the method's; pairs where they come from one source.

  Raises UserError where groups would lose one of their sides.
  """
  if not split.roles:
    return recipe
  sides = split.roles.keys() & {"forget", "retain"}
  if sides and any(row.group >= 0 for row in recipe.retain):
    raise UserError(f"data.roles.{min(sides)} has no groups, which this method reads; give data.groups instead.")
  own = {role: own_rows(found) for role, found in split.roles.items()}
  mixtures = {role: found.mixture for role, found in split.roles.items() if found.mixture}
  changed = dataclasses.replace(recipe, alone=None, mixtures=mixtures, **own)
  if not sides:
    return changed
  used = [[use.source for use in split.roles[role].sources] for role in sorted(sides)]
  paired = len(used) == 2 and used[0] == used[1] and not mixtures.keys() & sides
  in_memory = [rows for rows in (changed.forget, changed.retain) if isinstance(rows, tuple)]
  other = tuple(row for rows in in_memory for row in mismatched(rows, seed))
  return dataclasses.replace(changed, paired=paired, mismatched=other)


def plain(split: Split, seed: int) -> Recipe:
  """Forget the stereotypes, retain the anti-stereotypes of the same triples, stay put on general text."""
  forget, retain = tuple(map(stereotype_row, split.triples)), tuple(map(anti_stereotype_row, split.triples))
  return Recipe(forget, retain, general_rows(split), True, (*mismatched(forget, seed), *mismatched(retain, seed)))


def mismatched(rows: Sequence[Row], seed: int) -> list[Row]:
  """Every row's prefix with the answer of the next one in a random round; none where there is no other row."""
  order = np.random.default_rng(seed).permutation(len(rows))
  following = dict(zip(order, np.roll(order, -1), strict=True))
  pairs = [(row, rows[following[i]]) for i, row in enumerate(rows)] if len(rows) > 1 else []
  return [Row(f"{x.id} with {y.id}", x.text[: x.prefix] + y.text[y.prefix :], x.prefix) for x, y in pairs]


def stratified_share(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
  """`share` of the triples of each domain, drawn without replacement, rounded to the nearest whole number."""
  rng = np.random.default_rng(seed)
  chosen = []
  for domain in sorted({triple.domain for triple in triples}):
    members = [triple for triple in triples if triple.domain == domain]
    take = rng.choice(len(members), size=round(share * len(members)), replace=False)
    chosen += [members[i] for i in sorted(take)]
  return chosen
