"""Files -> rows: the built-in data, StereoSet's own JSON, rows to be scored.

Whatever is wrong with a file is a `UserError` of one line that names the file, the place in it and the field.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from jaxbias.data.fields import File, a_row, field, json_file, json_lines, string, unique
from jaxbias.data.rows import LABELS, Choice, DataSet, Split, Text, Triple
from jaxbias.errors import UserError, did_you_mean

BLANK = "BLANK"
DOMAINS = ("gender", "profession", "race", "religion")
SPLITS = ("train", "validation", "test")
TASKS = ("intrasentence", "intersentence")  # StereoSet's

TermSplit = dict[str, dict[str, list[str]]]  # domain -> split -> target terms
Row = TypeVar("Row")


def load(
  name_or_path: str | os.PathLike[str], split_file: str | os.PathLike[str] | None = None,
  tasks: Sequence[str] = TASKS[:1],
) -> DataSet:  # fmt: skip
  """`builtin`, a folder in its layout (`read_folder`), or the path of a StereoSet JSON file, whose intrasentence
  triples are split by target term.

  `split_file` holds {"domains": {domain: {"train": [terms], "valid": [...], "test": [...]}}}; without one the terms
  are split by `hash_split`. Triples that `usable_for_training` refuses leave the train split, and only that one. The
  general text of a StereoSet run is the built-in one.

  `tasks`: those of `TASKS` whose triples are trained on; validation and test are intrasentence whatever is trained on.
  Intersentence triples go by the same terms and are read as `whole` texts.
  """
  if unknown := next((task for task in tasks if task not in TASKS), ""):
    raise UserError(f"StereoSet has no task `{unknown}`; {did_you_mean(unknown, TASKS)}")
  if not tasks:
    raise UserError(f"data.tasks is empty; name at least one of {', '.join(TASKS)}.")
  if name_or_path == "builtin":
    if split_file:
      raise UserError(f"the built-in data has a split of its own: leave out `{split_file}`.")
    if tuple(tasks) != TASKS[:1]:
      raise UserError("the built-in data has no intersentence triples; give StereoSet's JSON.")
    return read_folder(resources.files("jaxbias.data.builtin"), name="builtin")
  path = Path(name_or_path).expanduser()
  if not path.exists():
    raise UserError(f"`{name_or_path}` is neither a file nor a built-in data set; "
                    f"{did_you_mean(str(name_or_path), ['builtin'])}")
  if path.is_dir():
    if split_file or tuple(tasks) != TASKS[:1]:
      raise UserError(f"{path} has splits of its own and intrasentence triples alone: leave out data.split_file, "
                      "and data.tasks as it is.")
    return read_folder(path, path.name)
  triples = stereoset_triples(path)
  terms = read_split(split_file) if split_file else hash_split(triples)
  parts = _partition_triples(triples, terms, where=split_file or path)
  usable = tuple(filter(usable_for_training, parts["train"]))
  if refused := len(parts["train"]) - len(usable):
    logging.getLogger(__name__).warning(
      "%s: %d of %d train triples are left out, their blank is doubled or has no space before it.",
      path.name, refused, len(parts["train"]))
  train = usable if TASKS[0] in tasks else ()
  if TASKS[1] in tasks:
    continuations = map(whole, stereoset_continuations(path))
    train += _partition_triples(tuple(continuations), terms, where=split_file or path)["train"]
  general = load("builtin")
  data = _data_set(path.name, parts | {"train": train}, {name: getattr(general, name).texts for name in SPLITS})
  dropped = {"doubled or glued blank": refused} if refused else {}
  return dataclasses.replace(data, train=dataclasses.replace(data.train, dropped=dropped))


def of_domains(data: DataSet, domains: Sequence[str]) -> DataSet:
  """The data set with the triples of these bias types alone; its general texts stay.

  Raises UserError for one that is none, or that leaves a split without triples.
  """
  for domain in domains:
    _domain(domain, "data.domains")
  kept = {name: tuple(t for t in getattr(data, name).triples if t.domain in domains) for name in SPLITS}
  if empty := next((name for name, triples in kept.items() if not triples), ""):
    raise UserError(f"data.domains: the {empty} split has no triple about {' or '.join(domains)}.")
  found = _data_set(data.name, kept, {name: getattr(data, name).texts for name in SPLITS})
  return dataclasses.replace(found, train=dataclasses.replace(found.train, dropped=data.train.dropped))


def read_folder(folder: Traversable, name: str) -> DataSet:
  """A data set in the layout of the built-in one.

  triples.jsonl: {"id", "domain", "term", "context" with BLANK once, and a filling for each of `LABELS`};
  texts.jsonl: {"id", "text"}; splits.json: {"triples": {domain: {split: [terms]}}, "texts": {split: [ids]}}.
  """
  triples = unique(json_lines(folder / "triples.jsonl"), _filled_triple)
  texts = unique(json_lines(folder / "texts.jsonl"),
                 lambda row, where: Text(string(row, "id", where), string(row, "text", where)))
  where = folder / "splits.json"
  splits = json_file(where)
  terms = _term_split(field(splits, "triples", dict, where), where)
  ids = _names(field(splits, "texts", dict, where), f"{where}, `texts`")
  return _data_set(name, _partition_triples(triples, terms, where), _partition(texts, "id", ids, where))


def stereoset_triples(path: File) -> list[Triple]:
  """The intrasentence triples of StereoSet's JSON, all of them, in the file's order."""
  return _stereoset(path, "intrasentence", _stereoset_triple)


def stereoset_continuations(path: File) -> list[Triple]:
  """The intersentence triples: three sentences that may follow `context`, which has no BLANK; all of each is answer."""
  return _stereoset(path, "intersentence", _stereoset_continuation)


def whole(triple: Triple) -> Triple:
  """An intersentence triple as texts to be trained on: its sentences behind their context, which is no answer."""
  texts = tuple(f"{triple.context} {sentence}" for sentence in triple.sentences)
  return dataclasses.replace(triple, sentences=texts, prefix=len(triple.context))


def usable_for_training(triple: Triple) -> bool:
  """Whether the answer span is one clean filling: one BLANK, no "." or "`" glued before it (BiasUnlearn's rule)."""
  return triple.context.count(BLANK) == 1 and not re.search(r"[.`]" + BLANK, triple.context)


def hash_split(triples: Iterable[Triple]) -> TermSplit:
  """A split by target term that depends on the terms' names only.

  In each domain the terms are sorted by sha256("ss-term-v1|domain|term"): the first ceil(n/2) are for training, the
  next ceil(rest/2) for validation, the rest for testing; with n < 6, n-1 for training, none for validation, one test.
  """
  terms = collections.defaultdict(set)
  for triple in triples:
    terms[triple.domain].add(triple.term)
  split = {}
  for domain, names in sorted(terms.items()):
    order = sorted(names, key=lambda term: hashlib.sha256(f"ss-term-v1|{domain}|{term}".encode()).hexdigest())
    train = math.ceil(len(order) / 2) if len(order) >= 6 else len(order) - 1
    validation = math.ceil((len(order) - train) / 2) if len(order) >= 6 else 0
    split[domain] = {"train": order[:train], "validation": order[train:train + validation],
                     "test": order[train + validation:]}
  return split


def read_split(path: File) -> TermSplit:
  """A split file: {"domains": {domain: {"train": [terms], "valid" or "validation": [...], "test": [...]}}}."""
  return _term_split(field(json_file(path), "domains", dict, path), path)


def read_choices(path: File) -> list[Choice]:
  """Rows to be scored, one JSON object a line: {"id", "context" (may be empty), "options": [strings]}."""
  rows = unique(json_lines(path), _choice)
  if not rows:
    raise UserError(f"{path} holds no rows.")
  return rows


def triple_choices(triples: Iterable[Triple]) -> list[Choice]:
  """Each triple as three whole sentences to be scored, in the order of `LABELS`, after no context."""
  return [Choice(triple.id, "", triple.sentences) for triple in triples]


def prefix_length(context: str, sentences: Sequence[str]) -> int:
  """Characters of every sentence that come before the filling, without the space before it.

  This is the context up to BLANK with one space taken off, letter case aside (StereoSet's sentences were capitalised
  anew). Where a sentence strays from its context earlier, it is the whole words that all of them share.
  """
  head = context.split(BLANK, 1)[0]
  shared = 0
  for characters in zip(head, *sentences, strict=False):
    if len({character.lower() for character in characters}) > 1:
      break
    shared += 1
  if shared == len(head) < min(map(len, sentences)):
    return len(re.sub(r"\s$", "", head))
  return max(head.rfind(" ", 0, shared), 0)


# One record -> one row. `where` names the file and the place in it.


def _stereoset(path: File, task: str, make: Callable[[Any, str], Triple]) -> list[Triple]:
  if str(path).endswith(".jsonl"):
    return _stereoset_lines(path, task, make)
  data = field(json_file(path), "data", dict, f"{path} is not StereoSet's JSON")
  records = field(data, task, list, f"{path} is not StereoSet's JSON, `data`")
  if not records:
    raise UserError(f"{path}: `data.{task}` is empty.")
  return unique(((f"{path}, data.{task}[{i}]", record) for i, record in enumerate(records)), make)


def _stereoset_lines(path: File, task: str, make: Callable[[Any, str], Triple]) -> list[Triple]:
  """Records of either task, one a line; `sentences` may be an object of lists, as Hugging Face's data set has it."""
  records = []
  for where, record in json_lines(path):
    with a_row():
      if (BLANK in string(record, "context", where)) == (task == "intrasentence"):
        sentences = record.get("sentences")
        if isinstance(sentences, dict):
          apart = zip(*(field(sentences, key, list, where) for key in ("sentence", "gold_label")), strict=False)
          record = record | {"sentences": [{"sentence": text, "gold_label": label} for text, label in apart]}
        records.append((where, record))
  if not records:
    raise UserError(f"{path} holds no {task} records.")
  return unique(records, make)


def _stereoset_triple(record: Any, where: str) -> Triple:
  triple = _stereoset_continuation(record, where)
  context = _context(record, f"{where} (id {triple.id})")
  return dataclasses.replace(triple, prefix=prefix_length(context, triple.sentences))


def _stereoset_continuation(record: Any, where: str) -> Triple:
  identity = string(record, "id", where)
  where = f"{where} (id {identity})"
  sentences = field(record, "sentences", list, where)
  labels = [string(sentence, "gold_label", where) for sentence in sentences]
  for label in LABELS:
    if labels.count(label) != 1:
      raise UserError(f"{where} has {labels.count(label) or 'no'} sentences labelled `{label}`, one is needed.")
  texts = tuple(string(sentences[labels.index(label)], "sentence", where) for label in LABELS)
  return Triple(identity, _domain(string(record, "bias_type", where), where), string(record, "target", where),
                string(record, "context", where), texts, prefix=0)


def _filled_triple(row: Any, where: str) -> Triple:
  context = _context(row, where)
  if context.count(BLANK) != 1:
    raise UserError(f"{where}: `context` holds {BLANK} {context.count(BLANK)} times, once is needed.")
  texts = tuple(context.replace(BLANK, string(row, label, where)) for label in LABELS)
  return Triple(string(row, "id", where), _domain(string(row, "domain", where), where), string(row, "term", where),
                context, texts, prefix_length(context, texts))


def _choice(row: Any, where: str) -> Choice:
  options = field(row, "options", list, where)
  if not options or not all(isinstance(option, str) and option for option in options):
    raise UserError(f"{where}: `options` has to be a list of strings, none of them empty.")
  return Choice(string(row, "id", where), field(row, "context", str, where), tuple(options))


def _context(row: Any, where: str) -> str:
  context = string(row, "context", where)
  if BLANK not in context:
    raise UserError(f"{where}: `context` holds no {BLANK}.")
  return context


def _domain(name: str, where: object) -> str:
  if name not in DOMAINS:
    raise UserError(f"{where}: `{name}` is no domain; {did_you_mean(name, DOMAINS)}")
  return name


# Splits.


def _term_split(domains: dict[str, Any], where: object) -> TermSplit:
  return {_domain(domain, where): _names(splits, f"{where}, `{domain}`") for domain, splits in domains.items()}


def _names(splits: Any, where: object) -> dict[str, list[str]]:
  """{split: names}; `valid` is read as `validation`."""
  if isinstance(splits, dict) and "valid" in splits:
    splits = splits | {"validation": splits["valid"]}
  return {split: field(splits, split, list, where) for split in SPLITS}


def _partition_triples(triples: Sequence[Triple], terms: TermSplit, where: object) -> dict[str, tuple[Triple, ...]]:
  members = {split: [term for splits in terms.values() for term in splits[split]] for split in SPLITS}
  parts = _partition(triples, "term", members, where)
  for domain in {triple.domain for triple in triples} & terms.keys():
    for split, names in terms[domain].items():
      if names and not any(triple.domain == domain for triple in parts[split]):
        raise UserError(
          f"{where}: the {split} split of {domain} is empty: none of its {len(names)} terms is in the data.")
  return parts


def _partition(rows: Sequence[Row], key: str, members: dict[str, list[str]], where: object
               ) -> dict[str, tuple[Row, ...]]:
  """Each row goes to the split that lists its `key`; every row has one, and only one."""
  split_of: dict[str, str] = {}
  for split, names in members.items():
    for name in names:
      if split_of.setdefault(name, split) != split:
        raise UserError(f"{where}: {key} `{name}` is in two splits, {split_of[name]} and {split}.")
  parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
  for row in rows:
    name = getattr(row, key)
    if name not in split_of:
      raise UserError(f"{where}: {key} `{name}` is in no split.")
    parts[split_of[name]].append(row)
  for split, part in parts.items():
    if not part:
      raise UserError(f"{where}: the {split} split is empty.")
  return {split: tuple(part) for split, part in parts.items()}


def _data_set(name: str, triples: dict[str, tuple[Triple, ...]], texts: dict[str, tuple[Text, ...]]) -> DataSet:
  splits = {split: Split(triples[split], texts[split]) for split in SPLITS}
  asdict = lambda rows: [dataclasses.asdict(row) for row in rows]
  content = {split: {"triples": asdict(rows.triples), "texts": asdict(rows.texts)} for split, rows in splits.items()}
  canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return DataSet(name=name, fingerprint=hashlib.sha256(canonical.encode()).hexdigest(), **splits)
