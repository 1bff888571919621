"""Texts are read once; what cannot be asked is set apart, and costs the others nothing."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.rows import MASK, Choice, Cloze, Prompt, Running, Text
from jaxbias.errors import UserError
from jaxbias.evals import task
from jaxbias.evals.answers import answer
from jaxbias.evals.questions import Reading, ask
from tests.evals.answering import CHOICES, CLOZES, NATS, after, at_masks, load


def reading(model, **how) -> Reading:
  return Reading(model.tokenizer, model.config.causal, model.config.max_positions, **how)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_identical_texts_are_read_once(name):
  model = load(name)
  rows = CHOICES[:3]
  again = [dataclasses.replace(row, id=row.id + " again") for row in rows]
  once, twice = (ask(asked, reading(model)) for asked in (rows, rows + again))
  assert twice.tokens == once.tokens and len(twice.segments) == len(once.segments)
  found = answer(model, rows + again).by_id
  assert all(found[row.id] == found[row.id + " again"] for row in rows)


def test_a_masked_copy_is_shared_by_the_options_that_differ_there():
  model = load("bert")
  asked = ask([Choice("pair", "", ("the cat sat", "the dog sat"))], reading(model))
  assert len(asked.segments) == 5, "three copies each, and that without the animal is one"
  assert sorted(len(segment.target) for segment in asked.segments) == [1, 1, 1, 1, 2]


def test_options_that_are_rotated_by_different_tables_are_read_apart():
  """LongRoPE turns a text by its length, so a long and a short option cannot share their context."""
  model = load("llama")
  row = Choice("row", "the cat", (" sat", " is", " sat on the mat"))
  together, apart, alike = (ask([row], reading(model, switch=n)) for n in (None, 5, 100))
  assert [len(asked.segments) for asked in (together, apart, alike)] == [1, 2, 1], "short ones are off the context"
  assert [len(where) for where in apart.wanted["row"]] == [len(where) for where in together.wanted["row"]]


def test_first_tokens_do_not_widen_every_row():
  model = load("gpt2")
  rows = [Choice(letter, "", (letter + "z",)) for letter in "abcdefghij"]
  asked = ask(rows, reading(model, bos="split_bos"))
  assert all(len(segment.target) <= len(segment.tokens) for segment in asked.segments)
  assert len(asked.segments) == 20
  more = ask([*rows, Choice("more", "", ("az", "bx"))], reading(model, bos="split_bos"))
  assert len(more.segments) == 21, "only x behind b is new"


def test_bad_rows_do_not_cost_the_others_their_answers():
  model = load("gpt2")
  long = "the cat " * 200
  rows = [Choice("empty", "the", (" cat", "")), CHOICES[0], Choice("long", long, (" cat",)), CHOICES[1],
          Running("nothing", "a", prefixed=False), Running("wide", "the cat", window=1000), Running("fine", "the cat"),
          Running("gaps", "the cat", window=10, stride=11)]
  seen = []
  found = answer(model, rows, advance=seen.append)
  assert list(found.by_id) == ["context", "none", "fine"] and list(found.failed) == ["empty", "long", "nothing", "wide",
                                                                                      "gaps"]
  assert found.failed["empty"] == "option 2 has no tokens; there is nothing to score."
  assert re.match(r"option 1 and its context take \d+ positions, the model has 128; shorten", found.failed["long"])
  assert found.failed["wide"] == "windows of 1000 tokens are asked for; the model has 128 positions."
  assert "leaves gaps" in found.failed["gaps"] and "nothing to score" in found.failed["nothing"]
  assert sum(seen) == len(rows)
  expected = answer(model, [CHOICES[0]]).by_id["context"]
  assert_allclose([s for s, _ in found.by_id["context"]], [s for s, _ in expected], atol=NATS)


def test_nothing_to_ask():
  found = answer(load("gpt2"), [])
  assert (found.by_id, found.failed, found.shapes) == ({}, {}, ())
  only = answer(load("gpt2"), [Choice("empty", "the", ("",))])
  assert only.by_id == {} and list(only.failed) == ["empty"]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_long_text_loses_its_left_on_request(name):
  model = load(name)
  t, long = model.tokenizer, "the cat sat on a mat, " * 40
  found = answer(model, [Choice("long", long, (" he is", " nurse")), CHOICES[0]], truncate="left")
  assert found.truncated == 1 and not found.failed
  before = [t.start_id] if model.config.causal else []
  longest = max(len(t.encode(option)) for option in (" he is", " nurse"))
  room = model.config.max_positions - longest - (0 if model.config.causal else 2)  # a last token has no position
  context = t.encode(long)[-room:]
  for option, (total, n) in zip((" he is", " nurse"), found.by_id["long"], strict=True):
    ids = t.encode(option)
    if model.config.causal:
      expected = after(model, [*before, *context, *ids], len(ids)).sum()
    else:
      text = context + ids
      expected = sum(at_masks(model, [*text[:i], t.mask_id, *text[i + 1 :]], {i: text[i]})[0]
                     for i in range(len(context), len(text)))
    assert n == len(ids)
    assert_allclose(total, expected, atol=NATS)


def test_a_cloze_loses_only_what_stands_before_its_mask():
  model = load("bert")
  t, long = model.tokenizer, "the cat sat on a mat. " * 30
  rows = [Cloze("cut", long + f"she is a {MASK}", (" nurse", " doctor")), Cloze("not", f"a {MASK} " + long, (" cat",))]
  assert list(answer(model, rows).failed) == ["cut", "not"]
  found = answer(model, rows, truncate="left")
  assert found.truncated == 1 and list(found.failed) == ["not"]
  text = t.encode(long + "she is a")[-(model.config.max_positions - 2 - len(t.encode(" doctor"))) :]
  doctor = t.encode(" doctor")
  expected = at_masks(model, text + [t.mask_id] * len(doctor), {len(text) + k: p for k, p in enumerate(doctor)}).sum()
  assert_allclose(found.by_id["cut"][1][0], expected, atol=NATS)


@pytest.mark.parametrize("name,row,asked,message", [
  ("gpt2", CLOZES[0], task.SCORES, "one piece is a Cloze; scores of it need a masked language model, and gpt2 is a"),
  ("bert", Running("r", "a cat"), task.SCORES, "a Running; scores of it need a causal language model, and bert is a"),
  ("bert", CHOICES[0], task.TOKENS, "tokens of it need a causal language model"),
  ("bert", Prompt("p", "the", 3), task.CONTINUATIONS, "need a causal language model"),
  ("gpt2", Text("t", "the"), task.SCORES, "row t is a Text, of which scores cannot be asked"),
  ("gpt2", CHOICES[0], "opinions", "`ask` is one of scores, tokens"),
])  # fmt: skip
def test_a_model_of_the_wrong_kind(name, row, asked, message):
  with pytest.raises(UserError, match=re.escape(message)):
    answer(load(name), [row], asked)


def test_arguments_that_mean_nothing_here():
  with pytest.raises(UserError, match="two rows have the id context"):
    answer(load("gpt2"), [CHOICES[0], CHOICES[0]])
  with pytest.raises(UserError, match="bos is one of prefixed_bos, split_bos and truncate left"):
    answer(load("gpt2"), CHOICES, bos="none")
  with pytest.raises(UserError, match="split_bos is for causal language models; bert is"):
    answer(load("bert"), CHOICES, bos="split_bos")
  endless = dataclasses.replace(load("gpt2"), tokenizer=dataclasses.replace(load("gpt2").tokenizer, eos_id=None))
  for model in (load("bert"), endless):
    failed = answer(model, [dataclasses.replace(CHOICES[0], ended=True)]).failed["context"]
    assert failed.startswith("the options are to end with the end-of-text token, which takes a causal model whose")
  without = dataclasses.replace(load("bert"), tokenizer=dataclasses.replace(load("bert").tokenizer, mask_id=None))
  with pytest.raises(UserError, match="the tokenizer names no mask token"):
    answer(without, CHOICES)
  bad = answer(load("bert"), [Cloze("no mask", "the cat", ("a",)), Cloze("?", f"{MASK}", ("a",), "some"), CLOZES[0]])
  assert answer(load("gpt2"), [Choice("no options", "the", ())]).failed == {"no options": "the row has no options."}
  assert "needs [MASK] at least once" in bad.failed["no mask"] and "`pieces` is `some`" in bad.failed["?"]
  assert list(bad.by_id) == ["one piece"]


def test_a_score_that_is_not_finite_is_told():
  model = load("gpt2")
  broken = jax.tree.map(lambda x: x * jnp.nan, model.params)
  found = answer(dataclasses.replace(model, params=broken), CHOICES[:2])
  assert found.by_id == {} and list(found.failed) == ["context", "none"] and "not finite" in found.failed["none"]


def test_choices_and_prompts_in_one_list():
  model = load("gpt2")
  rows = [CHOICES[0], Prompt("p", "the cat", 4), Prompt("too long", "the", 500)]
  found = answer(model, rows, task.TOKENS_AND_CONTINUATIONS)
  assert list(found.by_id) == ["context", "p"] and list(found.failed) == ["too long"]
  assert len(found.by_id["context"]) == 3 and isinstance(found.by_id["p"][0], str)
