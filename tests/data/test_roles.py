"""`data.roles`: every kind of source gives the same texts, what is wrong with one is named, and batches are pure."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from jaxbias.data import roles, sources
from jaxbias.data.pipeline import LENGTHS, Shape, draw, draw_mixture, grown
from jaxbias.data.roles import parse, with_roles
from jaxbias.data.tokens import Tokenizer, tokenizer_of_metadata
from jaxbias.errors import UserError
from jaxbias.losses.registry import parse as losses
from jaxbias.methods import recipe
from jaxbias.train.batches import Sampler, cut, plan_shape, tokenise
from tests.conftest import BYTE_LEVEL

ROWS = [{"id": f"r{i}", "text": f"the cat {i} sat", "prompt": "a cat" if i % 2 else "", "domain": "ab"[i % 2]}
        for i in range(40)]  # fmt: skip


@pytest.fixture(scope="module")
def builtin():
  return sources.load("builtin")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  return Tokenizer(tokenizer_of_metadata(metadata, "tiny"), 1, 2, 2, len(BYTE_LEVEL["tokens"]), "")


def lines(path, rows=ROWS):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def table(path, rows=ROWS, delimiter=","):
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
  return path


def parquet(path, rows=ROWS):
  arrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  written.write_table(arrow.Table.from_pylist(rows), path, row_group_size=7)
  return path


def write(kind, folder, rows=ROWS) -> str:
  """The rows as a source of some kind."""
  path = folder / f"rows.{kind}"
  if kind == "json":
    path.write_text(json.dumps(rows))
  elif kind in ("csv", "tsv"):
    table(path, rows, "," if kind == "csv" else "\t")
  elif kind == "jsonl":
    lines(path, rows)
  elif kind == "parquet":
    parquet(path, rows)
  else:
    datasets = pytest.importorskip("datasets")
    if kind == "saved":
      datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder / kind)
    else:
      (folder / kind).mkdir()
      parquet(folder / kind / "train.parquet", rows)
    return f"hf:{folder / kind}"
  return str(path)


KINDS = ("json", "jsonl", "csv", "tsv", "parquet", "saved", "folder")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_texts(builtin, tmp_path, monkeypatch, kind, large):
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False) if kind == "folder" else 0
  monkeypatch.setattr(roles, "IN_MEMORY", 0 if large else 100)
  role = with_roles(builtin, {"forget": write(kind, tmp_path)}).train.roles["forget"]
  assert isinstance(role.passages, tuple) != large
  found = [role.passages[i] for i in range(len(role.passages))]
  assert [(p.id, p.domain) for p in found] == [(row["id"], row["domain"]) for row in ROWS]
  assert found[1].text == "a cat the cat 1 sat" and found[1].prefix == 5 and found[0].text == "the cat 0 sat"
  (use,) = role.sources
  assert use.rows == 40 and not use.dropped
  assert use.fingerprint == with_roles(builtin, {"forget": str(lines(tmp_path / "a.jsonl"))}).train.roles[
    "forget"].sources[0].fingerprint  # fmt: skip


def test_columns_prompts_numbers_and_empty_texts(builtin, tmp_path):
  rows = [{"key": 7, "answer": "one", "q": "Why?"}, {"key": 8, "answer": " ", "q": "Why?"},
          {"key": 9, "answer": None, "q": "Why?"}, {"key": 10, "answer": " two", "q": "Why?\n"}]  # fmt: skip
  path = lines(tmp_path / "qa.jsonl", rows)
  role = with_roles(builtin, {"retain": f"{path}?text=answer&prompt=q&id=key"}).train.roles["retain"]
  assert [(p.id, p.text, p.prefix) for p in role.passages] == [("7", "Why? one", 4), ("10", "Why?\n two", 5)]
  assert role.sources[0].dropped == {"empty text": 2} and role.sources[0].rows == 4
  plain = with_roles(builtin, {"retain": f"{path}?text=q"}).train.roles["retain"]
  assert [p.id for p in plain.passages] == [f"{path} row {i}" for i in range(4)] and plain.passages[0].prefix == 0


BAD = [
  ("r.jsonl", '{"txt": "a"}\n', "", "has no column `text`; did you mean `txt`? Say which it is: SOURCE?text=COLUMN."),
  ("r.jsonl", '{"text": "a"}\n\n{"texts": "b"}\n', "", "r.jsonl line 3: `text` is missing (there is `texts`)."),
  ("r.jsonl", '{"text": "a"}\n{"text": 3}\n', "", "r.jsonl line 2: `text` has to be a string, it is 3."),
  ("r.jsonl", '{"text": "a"}\n{"text": \n', "", "r.jsonl line 2: not JSON"),
  ("r.jsonl", '{"text": "a"}\n[1]\n', "", "r.jsonl line 2: an object with `text` is needed."),
  ("r.jsonl", '{"text": "a", "id": "x"}\n{"text": "b", "id": "y"}\n{"text": "c", "id": "x"}\n', "",
   "r.jsonl line 3: id `x` was already used, see "),
  ("r.jsonl", '{"text": "a", "id": null}\n', "", "line 1: `id` has to be a string, it is None."),
  ("r.jsonl", "", "", "r.jsonl holds no rows."),
  ("r.jsonl", '{"text": " "}\n', "", "every text of "),
  ("r.jsonl", b'{"text": "\xff"}\n', "", "r.jsonl line 1: not UTF-8."),
  ("r.json", '{"text": "a"}', "", "a list of objects is needed"),
  ("r.csv", "id,text\n1\n", "", "r.csv line 2: `text` is missing."),
  ("r.csv", "id,body\n1,a\n", "?text=bdy", "has no column `bdy`; did you mean `body`?"),
  ("r.parquet", "PAR1 and then nothing", "", "r.parquet is not a whole Parquet file"),
  ("r.txt", "a", "", "is no source of texts; give a .jsonl"),
]


@pytest.mark.parametrize("name, content, columns, said", BAD)
def test_what_is_wrong_with_a_source_is_named(builtin, tmp_path, name, content, columns, said):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  if name.endswith("parquet"):
    pytest.importorskip("pyarrow")
  with pytest.raises(UserError, match=re.escape(said)):
    with_roles(builtin, {"general": f"{path}{columns}"})


def test_a_parquet_file_that_was_cut_or_changed(builtin, tmp_path):
  rows = [{"text": "the cat " * 50 + str(i)} for i in range(200)]
  whole = parquet(tmp_path / "r.parquet", rows).read_bytes()
  (tmp_path / "r.parquet").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match="is not a whole Parquet file"):
    with_roles(builtin, {"general": str(tmp_path / "r.parquet")})


@pytest.mark.parametrize("spec, said", [
  ("x * a.jsonl", "data.roles.forget: the weight `x` is no positive number."),
  ("-1 * a.jsonl", "the weight `-1` is no positive number."),
  ("a.jsonl?txt=b", "`txt=b` is no FIELD=COLUMN; did you mean `text`?"),
  ("?text=b", "`?text=b` is no source"),
  ("a.jsonl + ", "`` is no source"),
])  # fmt: skip
def test_what_is_no_source(spec, said):
  with pytest.raises(UserError, match=re.escape(said)):
    parse(spec, "data.roles.forget")


def test_sources_with_weights_and_columns():
  one, two = parse("0.8 * hf:org/name:en:train + 0.2 * b.csv?text=body&id=key", "k")
  assert (one.source, one.weight, one.columns) == ("hf:org/name:en:train", 0.8, {})
  assert (two.source, two.weight, two.columns) == ("b.csv", 0.2, {"text": "body", "id": "key"})


def test_roles_replace_a_methods_texts_and_pairs_come_from_one_source(builtin, tmp_path):
  rows = [{"id": str(i), "bad": f"bad {i}", "good": "" if i == 2 else f"good {i}"} for i in range(5)]
  path = lines(tmp_path / "pairs.jsonl", rows)
  given = {"forget": f"{path}?text=bad", "retain": f"{path}?text=good", "general": ""}
  data = with_roles(builtin, given)
  made = recipe("dpo", {})(data.train, 0)
  assert made.paired and [row.text for row in made.retain] == ["good 0", "good 1", "good 3", "good 4"]
  assert [row.text[4:] for row in made.forget] == [row.text[5:] for row in made.retain]
  assert made.general == recipe("dpo", {})(builtin.train, 0).general and data.fingerprint != builtin.fingerprint
  one = recipe("npo", {})(with_roles(builtin, {"forget": f"{path}?text=bad"}).train, 0)
  assert not one.paired and len(one.forget) == 5 and one.retain == recipe("npo", {})(builtin.train, 0).retain
  with pytest.raises(UserError, match="data.roles.forget has no groups"):
    recipe("contrastive", {})(data.train, 0)


def sampler(data, tokenizer, seed=3, counts=None, shards=1, max_tokens=24) -> Sampler:
  objective, _ = losses({"ga": {"on": "forget"}, "sft": {"on": "retain"}, "sft:g": {"on": "general"}})
  texts = tokenise(recipe("npo", {})(data.train, seed), objective, tokenizer, 200, max_tokens)
  return Sampler(texts, objective, counts or {"forget": 3, "retain": 3, "general": 6}, None, seed, shards)


@pytest.fixture
def given(tmp_path):
  general = [{"text": f"the cat {i} " * (i % 5 + 1)} for i in range(30)]
  return {"forget": str(lines(tmp_path / "forget.jsonl")),
          "retain": str(lines(tmp_path / "retain.jsonl", ROWS[::-1])),
          "general": f"3 * {lines(tmp_path / 'g.jsonl', general)} + {table(tmp_path / 'h.csv')}"}  # fmt: skip


def same(one, other) -> bool:
  (a, ids), (b, others) = one, other
  return ids == others and all(np.array_equal(x, y) for x, y in zip(_leaves(a), _leaves(b), strict=True))


def _leaves(batch):
  import jax

  return jax.tree.leaves(batch)


def test_texts_read_by_the_step_make_the_same_batches(builtin, tokenizer, given, monkeypatch):
  small = sampler(with_roles(builtin, given), tokenizer)
  monkeypatch.setattr(roles, "IN_MEMORY", 0)
  large = sampler(with_roles(builtin, given), tokenizer)
  assert large.texts.large == ["forget", "retain", "general"] and not small.texts.large
  shape = plan_shape([small], 5)
  assert plan_shape([large], 5) == shape
  assert all(same(small.batch(step, shape), large.batch(step, shape)) for step in range(6))
  with pytest.raises(UserError, match="set train.reference to step"):
    large.texts.all_segments()
  with pytest.raises(UserError, match="set data.max_tokens"):
    sampler(with_roles(builtin, given), tokenizer, max_tokens=0)


def test_the_global_batch_is_the_same_whatever_the_number_of_shards(builtin, tokenizer, given):
  texts = lambda shards: sampler(with_roles(builtin, given), tokenizer, shards=shards)
  one, eight, many = map(texts, (1, 8, 256))
  for step in range(3):
    assert one.members(step) == eight.members(step) == many.members(step)
  assert many.batch(0, plan_shape([many], 1))[0].tokens.shape[0] % 256 == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.7, 0.2)])
def test_a_mixture_keeps_its_shares_and_reads_every_text_of_an_epoch(weights):
  parts = tuple(zip((7, 50), weights, strict=True))
  drawn = np.concatenate([draw_mixture(parts, 6, step, (5, 2)) for step in range(80)])
  first = drawn < 7
  share = weights[0] / sum(weights)
  assert np.abs(np.cumsum(first) - share * np.arange(1, len(drawn) + 1)).max() <= 0.5 + 1e-9
  for epoch in range(int(first.sum()) // 7):
    assert sorted(drawn[first][7 * epoch : 7 * epoch + 7]) == list(range(7))
  assert sorted(drawn[~first][:50]) == list(range(7, 57))
  assert not np.array_equal(drawn[first][:7], drawn[first][7:14])
  again, other = (np.concatenate([draw_mixture(parts, 6, s, (seed, 2)) for s in range(80)]) for seed in (5, 6))
  assert np.array_equal(drawn, again) and not np.array_equal(drawn, other)


def test_an_epochs_order_is_numpys_permutation_whatever_was_drawn_before():
  for step in (9, 2, 5, 2):
    order = [np.random.default_rng((4, 1, epoch)).permutation(10) for epoch in range(4)]
    assert list(draw(10, 4, step, (4, 1))) == [order[t // 10][t % 10] for t in range(4 * step, 4 * step + 4)]


def test_a_text_is_cut_at_its_end_and_a_prompt_at_its_beginning():
  ids = list(range(20))
  assert cut(ids, 5, 20) == (ids, 5) and cut(ids, 0, 8) == (ids[:8], 0)
  assert cut(ids, 3, 8) == (ids[:8], 3)  # the prompt is short: the answer's end goes
  assert cut(ids, 15, 8) == (ids[11:19], 4)  # half of what is left stays the prompt's
  assert cut(ids, 19, 8) == (ids[12:], 7)  # all of an answer of one token, and what of the prompt fits


def test_a_step_that_needs_more_than_was_planned_gets_one_of_few_shapes(builtin, tokenizer, tmp_path):
  planned = Shape(16, 32, 64, 8, 4)
  assert grown(planned, Shape(3, 32, 64, 0, 4), 1) == planned
  sizes = {grown(planned, Shape(16, 32, need, 8, 4), 1).P for need in range(65, 129)}
  assert sizes == set(range(72, 129, 8)) and grown(planned, Shape(17, 32, 64, 8, 4), 8).B == 24
  rows = [{"text": "12"}] * 60 + [{"text": "the cat " * 30}]
  data = with_roles(builtin, {role: str(lines(tmp_path / "r.jsonl", rows)) for role in ("forget", "retain", "general")})
  drawer = sampler(data, tokenizer, counts={"forget": 1, "retain": 1, "general": 1}, max_tokens=0)
  short = next(s for s in range(60) if max(len(x.tokens) for x in drawer.segments(s)) < 40)
  long = next(s for s in range(60) if max(len(x.tokens) for x in drawer.segments(s)) > 40)
  planned = Shape(1, 64, 8, 8, 3)._replace(T=next(n for n in LENGTHS if n >= 40))
  assert drawer.batch(short, planned)[0].tokens.shape[1] == planned.T
  batch, _ = drawer.batch(long, planned)
  assert batch.tokens.shape[1] > planned.T and (batch.segment > 0).sum() == sum(
    len(x.tokens) for x in drawer.segments(long))  # fmt: skip
