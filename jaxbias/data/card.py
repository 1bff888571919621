"""What a run reads, for people and for programs: counts, hashes, what was left out and why, tokens, and overlap between
the texts that are trained on and those that are evaluated."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxbias.data.corpora import GRAM, evaluated, overlaps_with
from jaxbias.data.rows import DataSet, Split
from jaxbias.data.tokens import Tokenizer

CHECKED = 20_000  # texts of a role that are tokenised and looked for among the evaluated ones; of more, evenly many
SHOWN = 5  # ids of overlapping texts


class Read(Protocol):
  """A text in a role."""

  id: str
  text: str
  domain: str


def make(
  data: DataSet, split: str, read: Mapping[str, Mapping[str, Sequence[Read]]], tokenizer: Tokenizer, max_tokens: int
) -> dict[str, Any]:
  """The card as plain JSON; variants that read the same texts share an entry.

  split: what is evaluated; read: {variant: {role: its texts}}; max_tokens: where they are cut, 0 = nowhere.
  """
  overlaps = overlaps_with(evaluated(getattr(data, split)))
  entries: list[tuple[list[str], str, Sequence[Read]]] = []
  for variant, roles in read.items():
    for role, texts in roles.items():
      same = next((names for names, other, found in entries if other == role and _same(found, texts)), None)
      if same:
        same.append(variant)
      else:
        entries.append(([variant], role, texts))
  return {
    "name": data.name, "fingerprint": data.fingerprint, "files": dict(data.files), "evaluated": split, "gram": GRAM,
    "splits": {name: _counts(getattr(data, name)) for name in ("train", "validation", "test")},
    "sources": {role: [
      {"source": use.source, "weight": use.weight, "rows": use.rows, "used": use.rows - sum(use.dropped.values()),
       "dropped": dict(use.dropped), "fingerprint": use.fingerprint} for use in found.sources
    ] for role, found in data.train.roles.items()},
    "texts": [{"variants": names, "role": role, **_about(texts, tokenizer, max_tokens, overlaps)}
              for names, role, texts in entries],
  }  # fmt: skip


def _same(one: Sequence[Read], other: Sequence[Read]) -> bool:
  """Large roles are read by no method but as the config says, so that two of them are the same."""
  return one == other if isinstance(one, tuple) and isinstance(other, tuple) else type(one) is type(other)


def _counts(split: Split) -> dict[str, Any]:
  dropped = {**split.dropped, **({"overlap with evaluation": split.overlapping} if split.overlapping else {})}
  domains = collections.Counter(triple.domain for triple in split.triples)
  return {"triples": len(split.triples), "terms": len({triple.term for triple in split.triples}),
          "texts": len(split.texts), "groups": len(split.groups), "pool": len(split.pool),
          "domains": dict(sorted(domains.items())), "dropped": dropped}  # fmt: skip


def _about(texts: Sequence[Read], tokenizer: Tokenizer, max_tokens: int, overlaps) -> dict[str, Any]:
  at = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), CHECKED)).astype(int))
  checked = [texts[int(i)] for i in at]
  lengths = np.array([len(ids) for ids in tokenizer.encode_batch([row.text for row in checked])])
  p50, p95 = np.percentile(lengths, (50, 95))
  both = [row.id for row in checked if overlaps(row.text)]
  return {
    "texts": len(texts), "checked": len(checked),
    "domains": dict(sorted(collections.Counter(row.domain for row in checked if row.domain).items())),
    "tokens": {"sum": int(lengths.sum()), "mean": float(lengths.mean()), "p50": float(p50), "p95": float(p95),
               "max": int(lengths.max()), "cut": int((lengths > max_tokens).sum()) if max_tokens else 0},
    "overlapping": len(both), "overlapping_ids": both[:SHOWN],
  }  # fmt: skip


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(card: Mapping[str, Any]) -> list[Table]:
  """(title, head, rows) of what a reader asks first, as strings."""
  said = lambda counts: ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
  parts = [(name, *(f"{c[key]:,}" for key in ("triples", "terms", "texts", "groups", "pool")), said(c["domains"]),
            said(c["dropped"])) for name, c in card["splits"].items()]  # fmt: skip
  out = [("Splits", ("split", "triples", "terms", "texts", "groups", "pool", "bias types", "left out"), parts)]
  used = [(role, s["source"], f"{s['weight']:g}", f"{s['rows']:,}", f"{s['used']:,}", said(s["dropped"]))
          for role, found in card["sources"].items() for s in found]  # fmt: skip
  if used:
    out.append(("Sources", ("role", "source", "weight", "rows", "used", "left out"), used))
  rows = []
  for entry in card["texts"]:
    tokens, share = entry["tokens"], "" if entry["checked"] == entry["texts"] else f" of {entry['checked']:,} checked"
    shown = f" ({', '.join(entry['overlapping_ids'])}{', ...' if entry['overlapping'] > SHOWN else ''})"
    rows.append((entry["role"], ", ".join(entry["variants"]), f"{entry['texts']:,}", f"{tokens['mean']:.1f}",
                 *(f"{tokens[key]:,.0f}" for key in ("p50", "p95", "max", "cut")),
                 f"{entry['overlapping']:,}{share}{shown if entry['overlapping'] else ''}"))  # fmt: skip
  head = ("role", "variants", "texts", "tokens: mean", "median", "95 %", "longest", "texts cut",
          f"overlap with {card['evaluated']}")  # fmt: skip
  return [*out, ("Texts that are trained on", head, rows)]


def notes(card: Mapping[str, Any]) -> str:
  return (f"Overlap: {card['gram']} words in a row that an evaluated text of the {card['evaluated']} split has, too, "
          "or all of its words where it has fewer. Tokens are counted before texts are cut.")  # fmt: skip


def markdown(card: Mapping[str, Any]) -> str:
  line = lambda cells: f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
  out = [f"# Data: {card['name']}", "", f"sha256 of the content: `{card['fingerprint']}`", ""]
  for title, head, rows in tables(card):
    out += [f"## {title}", "", line(head), line(["---"] * len(head)), *map(line, rows), ""]
  return "\n".join([*out, notes(card), "", *_files(card["files"].items())])


def _files(files: Iterable[tuple[str, str]]) -> list[str]:
  return ["## Files (sha256)", "", *(f"- `{path}`: `{digest}`" for path, digest in files), ""]
