"""Contrast groups: the file, the draw, the packed marks, and what a batch of them says to a loss."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.groups import FAMILY, draw_members, read_groups, write_groups
from jaxbias.data.rows import FAMILIES, KINDS, Group, Member
from jaxbias.data.tokens import Tokenizer, tokenizer_of_metadata
from jaxbias.errors import UserError
from jaxbias.losses.registry import parse
from jaxbias.methods.recipes import grouped
from jaxbias.train.batches import Sampler, plan_shape, tokenise
from jaxbias.types import ROLES
from tests.conftest import BYTE_LEVEL

ROW = {"id": "a", "source": "A post.", "text": " He saw Rome.", "polarity": "positive", "kind": "original",
       "entities": [[8, 12]]}  # fmt: skip


def write(path, rows) -> str:
  path.write_text("\n".join(map(json.dumps, rows)) + "\n")
  return str(path)


def test_rows_of_one_source_are_a_group(tmp_path):
  rows = [ROW, ROW | {"id": "b", "source": " a  POST.", "kind": "back_translation"},
          ROW | {"id": "c", "polarity": "negative", "kind": "toxic", "toxicity": 0.9},
          ROW | {"id": "d", "source": "Another."}, ROW | {"id": "e", "group": "named", "source": ""}]  # fmt: skip
  groups = read_groups(write(tmp_path / "g.jsonl", rows))
  assert [(len(g.positives), len(g.negatives)) for g in groups] == [(2, 1), (1, 0), (1, 0)]
  assert groups[0].positives[0].text[8:12] == "Rome" and groups[0].negatives[0].toxicity == 0.9
  write_groups(tmp_path / "again.jsonl", groups)
  assert read_groups(tmp_path / "again.jsonl") == groups


@pytest.mark.parametrize("change,message", [
  ({"kind": "swap"}, "`kind` = `swap` is not known; did you mean `swap_ent`?"),
  ({"polarity": "good"}, "`polarity` = `good` is not known"),
  ({"entities": [[8, 99]]}, "the entity [8, 99] is no [start, end] within the 13 characters of `text`"),
  ({"entities": "Rome"}, "`entities`"),
  ({"toxicity": 2}, "`toxicity` = 2; it has to be a number from 0 to 1"),
  ({"source": ""}, "`source` is empty and no `group` is named"),
  ({"text": ""}, "`text`"),
])  # fmt: skip
def test_what_a_row_may_not_be(tmp_path, change, message):
  with pytest.raises(UserError) as error:
    read_groups(write(tmp_path / "g.jsonl", [ROW, ROW | {"id": "b"} | change]))
  assert "g.jsonl line 2" in str(error.value) and message in str(error.value)


# The draw


def test_a_draw_takes_families_in_turn_and_keeps_the_original():
  kinds = ["original", *["framing"] * 5]
  assert all(0 in draw_members(kinds, 3, (s,), first=1) and len(draw_members(kinds, 3, (s,), first=1)) == 3
             for s in range(20))  # fmt: skip
  negatives = ["swap_ent"] * 6 + ["mask_ent"] * 6 + ["toxic", "low_confidence"]
  for seed in range(20):
    drawn = collections.Counter(FAMILY[negatives[i]] for i in draw_members(negatives, 4, (seed,)))
    assert drawn == {"entity": 2, "toxic": 1, "low_confidence": 1}
  assert draw_members(negatives, 4, (1, 2)) == draw_members(negatives, 4, (1, 2))
  assert len({tuple(draw_members(negatives, 4, (s,))) for s in range(20)}) > 10
  assert draw_members([], 4, (0,)) == [] and draw_members(["toxic"], 4, (0,)) == [0]


def test_every_kind_has_one_family():
  assert len(KINDS) == len(set(KINDS)) == len(FAMILY) and "original" in FAMILIES["positive"]


# Through the collator


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  return Tokenizer(tokenizer_of_metadata(metadata, "tiny"), 1, 2, 2, len(BYTE_LEVEL["tokens"]), "")


def groups(count: int, toxic: bool = True) -> list[Group]:
  def member(g, name, kind, toxicity=0.0):
    return Member(f"{g}/{name}", f" the cat {g} sat", kind, ((5, 8),), toxicity)

  make = lambda g: Group(f"g{g}", "a b", (member(g, "p0", "original"), member(g, "p1", "framing")),
                         (member(g, "n0", "swap_ent"), *([member(g, "n1", "toxic", 0.75)] if toxic else ())))
  return [make(g) for g in range(count)]


def sampler(tokenizer, made, losses=("contrast", "group_ce"), shards=1, labels="to_end", **counts) -> Sampler:
  objective, _ = parse({name: {} for name in losses})
  texts = tokenise(grouped(made, labels=labels), objective, tokenizer, 64)
  return Sampler(texts, objective, {"groups": 2, "positives": 2, "negatives": 2, "retain": 2, "forget": 2} | counts,
                 None, 0, shards)  # fmt: skip


@pytest.mark.parametrize("shards", [1, 8])
def test_a_batch_knows_groups_polarity_kinds_and_entities(tokenizer, shards):
  drawer = sampler(tokenizer, groups(5), shards=shards)
  batch, ids = drawer.batch(0, plan_shape([drawer], 3))
  assert len(ids) == 8 and batch.tokens.shape[0] % shards == 0
  used = batch.role >= 0
  assert len(np.unique(batch.group[used])) == 2 and (batch.group[~used] == -1).all()
  for b, s in zip(*np.nonzero(used), strict=True):
    name = ids[batch.row[b, s]]
    positive, mine = "/p" in name, batch.segment[b] == s + 1
    assert f"{batch.group[b, s]}/" == name.split("p")[0].split("n")[0]
    assert batch.polarity[b, s] == positive and batch.role[b, s] == ROLES.index("retain" if positive else "forget")
    assert_allclose(batch.toxicity[b, s], 0.75 * (name[-2:] == "n1"))
    ids_here = batch.tokens[b, mine]
    assert tokenizer.decode(ids_here[batch.entity[b, mine]]) == " cat"
    assert tokenizer.decode(ids_here[batch.answer[b, mine]]) == f" the cat {batch.group[b, s]} sat"
    taught = batch.target[b, batch.score_segment[b] == s + 1]
    assert tokenizer.decode(taught) == (f" the cat {batch.group[b, s]} sat<|im_end|>" if positive else "")
  assert not (batch.entity & ~batch.answer).any() and not batch.answer[batch.segment == 0].any()


def test_published_labels_leave_out_the_first_token_and_the_end(tokenizer):
  drawer = sampler(tokenizer, groups(2), labels="inside")
  batch, _ = drawer.batch(0, plan_shape([drawer], 1))
  taught = {tokenizer.decode(batch.target[b, batch.score_segment[b] == s + 1])
            for b, s in zip(*np.nonzero(batch.role == ROLES.index("retain")), strict=True)}  # fmt: skip
  assert taught == {" cat 0 sat", " cat 1 sat"}
  assert batch.tokens[0, 0] == tokenizer.start_id and batch.segment[0, 0] == 1  # BOS is read, whatever its id


def test_steps_are_a_function_of_seed_and_step_and_visit_every_group(tokenizer):
  drawer = sampler(tokenizer, groups(6))
  assert drawer.members(3) == drawer.members(3)
  epoch = [drawer.texts.rows[role][i].group for step in range(3) for role, i in drawer.members(step)]
  assert set(epoch) == set(range(6))
  assert drawer.members(0) != dataclasses.replace(drawer, seed=1).members(0)


@pytest.mark.parametrize("toxic,expected", [(True, 1.5), (False, 1.0)])
def test_a_toxic_negative_reaches_the_loss_through_the_collator(tokenizer, toxic, expected):
  """The regression test that the released code lacks: there the weight never came into play."""
  import jax
  import jax.numpy as jnp

  from jaxbias.losses.context import LossContext
  from jaxbias.losses.registry import evaluate
  from tests.models import tiny_config

  drawer = sampler(tokenizer, groups(3, toxic), losses=("contrast",))
  batch = jax.tree.map(jnp.asarray, drawer.batch(0, plan_shape([drawer], 1))[0])
  hidden = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 16))
  objective, coefficients = parse({"contrast": {}})
  params = objective.init_params(jax.random.key(1), tiny_config())
  out = evaluate(objective, LossContext(batch, jnp.zeros(batch.target.shape), hidden_BTD=hidden), coefficients, params)
  assert_allclose(out.notes["contrast/w"].value(), expected)
  assert np.isfinite(out.total) and out.parts["contrast"].weight == 4


def test_groups_serve_other_losses_and_pairs_serve_supcon(tokenizer):
  drawer = sampler(tokenizer, groups(3), losses=("sft", "npo"))
  batch, ids = drawer.batch(0, plan_shape([drawer], 1))
  assert len(ids) == 8 and batch.group is None and batch.entity is None
  with pytest.raises(UserError, match="a loss needs groups of positives and negatives"):
    recipe = dataclasses.replace(grouped(groups(2)), retain=tuple(
      dataclasses.replace(row, group=-1) for row in grouped(groups(2)).retain))  # fmt: skip
    tokenise(recipe, parse({"contrast": {}})[0], tokenizer, 64)
  paired = dataclasses.replace(recipe, forget=recipe.retain, paired=True)
  objective, _ = parse({"supcon": {}, "infonce": {}})
  texts = tokenise(paired, objective, tokenizer, 64)
  drawer = Sampler(texts, objective, {"retain": 2, "forget": 2}, None, 0, 1)
  batch, _ = drawer.batch(0, plan_shape([drawer], 1))
  assert_array_equal(np.unique(batch.polarity), [-1])
  twins = batch.group.reshape(-1)[np.maximum(batch.pair, 0)]
  assert (twins == batch.group)[batch.pair >= 0].all() and (batch.pair >= 0).sum() == 4
