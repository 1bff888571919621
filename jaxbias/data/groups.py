"""Contrast groups: read from a file, written to one, and drawn from for a step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbias.data.fields import File, field, json_lines, string, unique
from jaxbias.data.rows import FAMILIES, KINDS, Group, Member
from jaxbias.errors import UserError, did_you_mean

POLARITIES = ("negative", "positive")
FAMILY = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}


def read_groups(path: File) -> tuple[Group, ...]:
  """Groups of a JSONL file, one text a line; those with the same source (letter case and spaces aside) are a group:

  {"id", "source" (may be empty with a "group"), "text", "polarity": "positive" | "negative", "kind": one of KINDS,
   "entities": [[start, end], ...] characters of `text`, "toxicity": 0 to 1 (optional), "group": a name (optional)}

  A group's first positive is its original. Raises UserError for a malformed line and for a file without groups.
  """
  rows = unique(json_lines(path), _row)
  by_name: dict[str, list[Row]] = {}
  for row in rows:
    by_name.setdefault(row.group, []).append(row)
  groups = []
  for name, members in by_name.items():
    side = lambda polarity, members=members: tuple(row.member for row in members if row.polarity == polarity)
    groups.append(Group(name, members[0].source, side("positive"), side("negative")))
  if not groups:
    raise UserError(f"{path} holds no rows.")
  return tuple(groups)


def write_groups(path: Path, groups: Iterable[Group]) -> None:
  """What `read_groups` reads."""
  lines = []
  for group in groups:
    for polarity, members in (("positive", group.positives), ("negative", group.negatives)):
      lines += [json.dumps({
        "id": member.id, "group": group.id, "source": group.source, "text": member.text, "polarity": polarity,
        "kind": member.kind, "entities": member.entities, "toxicity": member.toxicity,
      }) for member in members]  # fmt: skip
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
  temporary.replace(path)  # whole, or not there


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the file."""

  id: str
  member: Member
  source: str
  group: str
  polarity: str


def _row(row: Any, where: str) -> Row:
  text, source = string(row, "text", where), field(row, "source", str, where)
  polarity, kind = string(row, "polarity", where), string(row, "kind", where)
  for name, value, known in (("polarity", polarity, POLARITIES), ("kind", kind, KINDS)):
    if value not in known:
      raise UserError(f"{where}: `{name}` = `{value}` is not known; {did_you_mean(value, known)}")
  group = row.get("group", " ".join(source.lower().split()))
  if not isinstance(group, str) or not group:
    raise UserError(f"{where}: `source` is empty and no `group` is named.")
  entities = field(row, "entities", list, where)
  for span in entities:
    whole = isinstance(span, list) and len(span) == 2 and all(isinstance(at, int) for at in span)
    if not whole or not 0 <= span[0] < span[1] <= len(text):
      raise UserError(f"{where}: the entity {span} is no [start, end] within the {len(text)} characters of `text`.")
  toxicity = row.get("toxicity", 0.0)
  if not isinstance(toxicity, int | float) or not 0 <= toxicity <= 1:
    raise UserError(f"{where}: `toxicity` = {toxicity!r}; it has to be a number from 0 to 1.")
  member = Member(string(row, "id", where), text, kind, tuple(map(tuple, entities)), float(toxicity))
  return Row(member.id, member, source, group, polarity)


def draw_members(kinds: Sequence[str], most: int, key: Sequence[int], first: int = 0) -> list[int]:
  """Which of a group's texts a step reads, in their order: the `first` ones always, of the others a draw that takes a
  kind's family in turn, so that a family of many texts does not crowd out the others."""
  rng = np.random.default_rng(key)
  families: dict[str, list[int]] = {}
  for i in rng.permutation(np.arange(first, len(kinds))):
    families.setdefault(FAMILY[kinds[i]], []).append(int(i))
  queues = [families[name] for name in rng.permutation(sorted(families))] if families else []
  in_turn = [queue[n] for n in range(max(map(len, queues), default=0)) for queue in queues if n < len(queue)]
  return sorted([*range(min(first, len(kinds))), *in_turn][:most])
