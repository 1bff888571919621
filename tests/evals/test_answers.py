"""Answers of every kind against a loop that runs the model on one text alone, unpacked. The models are the oracles' of
a few layers, which other tests hold against Hugging Face."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from jaxbias.data.rows import MASK, OTHER, Choice, Cloze, Prompt, Running, Text
from jaxbias.errors import UserError
from jaxbias.evals import passes, task
from jaxbias.evals.answers import answer
from jaxbias.evals.questions import Reading, ask, rolling
from jaxbias.losses.logprobs import logits
from jaxbias.models import language_model
from jaxbias.models.transformer import head

pytestmark = pytest.mark.usefixtures("quick_compilation")

ORACLES = Path(__file__).parents[1] / "oracles" / "models"
CAUSAL, MASKED = ("gpt2", "llama"), ("bert", "roberta", "electra_generator")
WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "she", "he", "is", "nurse", "doc", "tor"]
NATS = 1e-4


def byte_level(special: list[str]) -> Tokenizer:
  """Words of lower-case letters, with their space, and single letters."""
  merges = []
  for word in WORDS:
    merges += [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
  vocabulary = dict.fromkeys([*special, "Ġ", *"abcdefghijklmnopqrstuvwxyz.,", *("".join(pair) for pair in merges)])
  backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(dict.fromkeys(merges))))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return backend


def word_piece() -> Tokenizer:
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
  vocabulary = dict.fromkeys([*special, ".", ",", *letters, *WORDS, *("##" + word for word in WORDS)])
  backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
  backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  backend.add_special_tokens(special)
  return backend


def write_model(name: str, folder: Path) -> Path:
  """An oracle's weights with a tokenizer of our own beside them."""
  shutil.copytree(ORACLES / name, folder)
  named = {}
  if name in CAUSAL:
    backend, named = byte_level(["<pad>", "<s>", "</s>"]), {"bos_token": "<s>", "eos_token": "</s>"}
  elif name == "roberta":
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
  else:
    backend = word_piece()
  assert backend.get_vocab_size() <= 199
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(named))
  return folder


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  @functools.cache
  def of(name: str) -> language_model.LanguageModel:
    return language_model.load(str(write_model(name, tmp_path_factory.mktemp("models") / name)), "float32")

  return of


@functools.cache
def _alone(module, size: int):
  def run(params, tokens, segment):
    capture = () if module.config.causal else ("residual_out",)
    position = jnp.arange(size)[None]
    out, captures = module.apply({"params": params}, tokens[None], segment[None], position, capture=capture)
    states = out if module.config.causal else captures["residual_out"][-1]
    return logits(out, head(params, module.config))[0], states[0]

  return jax.jit(run)


def alone(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities [T, V], float64, and last hidden states [T, D] of one text in a row of its own."""
  size = model.config.max_positions
  tokens, segment = np.zeros((2, size), np.int32)
  tokens[: len(ids)], segment[: len(ids)] = ids, 1
  scores, states = map(np.asarray, _alone(model.module, size)(model.params, tokens, segment))
  scores = scores[: len(ids)].astype(np.float64)
  shifted = scores - scores.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), states[: len(ids)]


def after(model, ids: list[int], count: int) -> np.ndarray:
  """Log-probabilities of the last `count` tokens of a text, each given all before it."""
  log_p, _ = alone(model, ids[:-1])
  return np.array([log_p[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))])


def at_masks(model, ids: list[int], targets: dict[int, int]) -> np.ndarray:
  """Of an encoder: log-probabilities of `targets` {position in the text: token}; [CLS] and [SEP] are added."""
  t = model.tokenizer
  log_p, _ = alone(model, [t.cls_id, *ids, t.sep_id])
  return np.array([log_p[at + 1, token] for at, token in targets.items()])


def assert_same(found: dict, expected: dict):
  assert list(found) == list(expected)
  for row, pairs in expected.items():
    assert [n for _, n in found[row]] == [n for _, n in pairs], row
    assert_allclose([s for s, _ in found[row]], [s for s, _ in pairs], rtol=0, atol=NATS, err_msg=row)


CHOICES = [
  Choice("context", "the cat", (" sat on the mat", " sat on a mat.", " is")),
  Choice("none", "", ("the cat sat", "the dog sat", "she sat", "s")),
  Choice("letters", "xyz", ("a", "b", "ab")),
  Choice("twice", "the", (" cat", " cat", " dog")),
  Choice("single", "", ("the dog is on the mat, the cat is on the dog.",)),
  *(Choice(f"filler {n}", "the dog " * n, (" is" * (n + 1), " he sat")) for n in range(9)),
]


# Causal models


def sequential(model, row: Choice, bos: str) -> list[np.ndarray]:
  t, out = model.tokenizer, []
  for option in row.options:
    context, option = t.encode(row.context), t.encode(option)
    if bos == "prefixed_bos":
      out.append(after(model, [t.start_id, *context, *option], len(option)))
    elif context:
      out.append(after(model, [*context, *option], len(option)))
    else:
      first = after(model, [t.start_id, option[0]], 1)
      out.append(np.concatenate([first, after(model, option, len(option) - 1)]))
  return out


@pytest.mark.parametrize("bos", ["prefixed_bos", "split_bos"])
@pytest.mark.parametrize("name", CAUSAL)
def test_options_of_a_causal_model(load, name, bos):
  model = load(name)
  found = answer(model, CHOICES, bos=bos)
  assert_same(found.by_id, {r.id: [(v.sum(), len(v)) for v in sequential(model, r, bos)] for r in CHOICES})
  assert not found.failed and not found.truncated and 0 < found.padding < 1 and len(found.shapes) <= 4
  backwards = answer(model, CHOICES[::-1], bos=bos)
  assert list(backwards.by_id) == list(found.by_id)[::-1]
  assert_same(backwards.by_id, {row.id: found.by_id[row.id] for row in CHOICES[::-1]})


def test_the_two_rules_for_the_first_token_differ_everywhere(load):
  one, other = (answer(load("gpt2"), CHOICES, bos=bos).by_id for bos in ("prefixed_bos", "split_bos"))
  for row in CHOICES:  # but where there is one token and no context
    for (a, n), (b, _) in zip(one[row.id], other[row.id], strict=True):
      assert (abs(a - b) > NATS) == (n > 1 or row.context != ""), row


PAIRS = [
  Choice("word", "", ("the cat sat on the mat", "the dog sat on the mat")),
  Choice("inserted", "", ("the cat sat", "the cat is sat")),
  Choice("nothing shared", "", ("cat", "dog")),
  Choice("equal", "", ("the cat", "the cat")),
  Choice("context", "she is a", (" nurse on a mat", " doctor on the mat")),
]


def compared(texts: list[list[int]], span: str) -> list[list[int]]:
  """Places in two texts, as in CrowS-Pairs' metric.py: get_span."""
  out = [[], []]
  for tag, *bounds in difflib.SequenceMatcher(None, *([str(x) for x in text] for text in texts)).get_opcodes():
    if (span == "shared" and tag == "equal") or (span == "different" and tag != "equal"):
      out[0] += range(bounds[0], bounds[1])
      out[1] += range(bounds[2], bounds[3])
  return out


@pytest.mark.parametrize("span", ["shared", "different"])
def test_a_span_of_a_causal_model(load, span):
  model, rows = load("gpt2"), [dataclasses.replace(row, span=span) for row in PAIRS]
  t, expected = model.tokenizer, {}
  for row in rows:
    before = [t.start_id, *t.encode(row.context)]
    kept = compared([before + t.encode(option) for option in row.options], span)
    values = sequential(model, row, "prefixed_bos")
    kept = [[i - len(before) for i in places if i >= len(before)] for places in kept]
    expected[row.id] = [(v[places].sum(), len(places)) for v, places in zip(values, kept, strict=True)]
  assert_same(answer(model, rows).by_id, expected)
  counts = {row: [n for _, n in pairs] for row, pairs in expected.items()}
  if span == "different":
    assert counts["equal"] == [0, 0] and counts["inserted"] == [0, 1] and expected["equal"] == [(0.0, 0)] * 2
  else:
    assert counts["nothing shared"] == [0, 0] and counts["word"] == [5, 5]


def test_a_span_compares_two_options(load):
  bad = [Choice("three", "", ("a", "b", "c"), "shared"), Choice("?", "", ("a",), "some")]
  found = answer(load("gpt2"), [*bad, PAIRS[0]])
  assert "compares two options, the row has 3" in found.failed["three"]
  assert "`span` is `some`, not one of all, shared, different" in found.failed["?"]
  assert list(found.by_id) == ["word"]


@pytest.mark.parametrize("tokens,window,stride,expected", [
  # lm-evaluation-harness: get_rolling_token_windows(context_len=1), then make_disjoint_window; the start token is 0
  (4, 4, 4, [(0, 1, 4)]),
  (5, 4, 4, [(0, 1, 5)]),
  (9, 4, 4, [(0, 1, 5), (4, 5, 9)]),
  (11, 4, 4, [(0, 1, 5), (4, 5, 9), (6, 9, 11)]),
  (9, 4, 2, [(0, 1, 5), (2, 5, 7), (4, 7, 9)]),
  (1, 4, 4, []),
])  # fmt: skip
def test_rolling_windows_behind_a_start_token(tokens, window, stride, expected):
  assert rolling(tokens, window, stride, prefixed=True) == expected


@pytest.mark.parametrize("tokens,window,stride,expected", [
  (4, 4, 4, [(0, 1, 4)]),
  (8, 4, 4, [(0, 1, 4), (4, 5, 8)]),
  (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),  # the last window's only token has nothing before it
  (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),
  (8, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8)]),
  (7, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 7)]),
  (1, 4, 2, []),
])  # fmt: skip
def test_rolling_windows_of_text_alone(tokens, window, stride, expected):
  assert rolling(tokens, window, stride, prefixed=False) == expected


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("window,stride", [(0, 0), (20, 20), (20, 7)])
def test_running_text_of_a_causal_model(load, window, stride, prefixed):
  model = load("gpt2")
  text = "the cat sat on a mat, the nurse is a doctor. " * 12
  t, most = model.tokenizer, window or model.config.max_positions
  ids = t.encode(text)
  ids = [t.start_id, *ids] if prefixed else ids
  assert len(ids) > 128, "several windows"
  values = np.concatenate([after(model, ids[begin:end], end - first)
                           for begin, first, end in rolling(len(ids), most, stride or most, prefixed)])
  rows = [Running("long", text, window, stride, prefixed), Running("again", text, window, stride, prefixed),
          Running("short", "the cat sat", window, stride, prefixed)]
  found = answer(model, rows).by_id
  assert found["long"] == found["again"] and found["long"][0][1] == len(values)
  assert_allclose(found["long"][0][0], values.sum(), atol=NATS * len(values) / 10)
  if prefixed or stride == 7:
    assert len(values) == len(ids) - 1, "every token once"


def test_statistics_of_every_token(load):
  model = load("llama")
  found, t = answer(model, CHOICES, task.TOKENS).by_id, model.tokenizer
  greedy = []
  for row in CHOICES:
    for option, scores in zip(row.options, found[row.id], strict=True):
      ids = [t.start_id, *t.encode(row.context), *t.encode(option)]
      log_p = alone(model, ids[:-1])[0][-len(scores.logprob):]
      target = ids[-len(scores.logprob):]
      p = np.exp(log_p)
      mean = (p * log_p).sum(-1)
      assert_allclose(scores.logprob, log_p[np.arange(len(target)), target], atol=NATS)
      assert_allclose(scores.mean, mean, atol=NATS)
      assert_allclose(scores.std, np.sqrt((p * log_p**2).sum(-1) - mean**2), atol=NATS)
      assert_array_equal(scores.greedy, log_p.argmax(-1) == target)
      greedy.extend(scores.greedy)
  likeliest = [t.start_id]
  for _ in range(3):
    likeliest.append(int(alone(model, likeliest)[0][-1].argmax()))
  text = t.decode(likeliest[1:])
  if t.encode(text) == likeliest[1:]:
    assert answer(model, [Choice("greedy", "", (text,))], task.TOKENS).by_id["greedy"][0].greedy.all()
  assert not all(greedy)


# Masked models


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("span", ["all", "shared", "different"])
def test_pseudo_log_likelihood(load, name, span):
  model = load(name)
  t, expected = model.tokenizer, {}
  rows = [dataclasses.replace(row, span=span) for row in (PAIRS if span != "all" else CHOICES[:5])]
  for row in rows:
    context, options = t.encode(row.context), [t.encode(option) for option in row.options]
    texts = [context + option for option in options]
    kept = [range(len(context), len(text)) for text in texts]
    if span != "all":  # metric.py compares texts with [CLS] and [SEP] and drops the first and last shared token
      whole = compared([[t.cls_id, *text, t.sep_id] for text in texts], span)
      kept = [[i - 1 for i in (places[1:-1] if span == "shared" else places) if i > len(context)] for places in whole]
    expected[row.id] = []
    for text, places in zip(texts, kept, strict=True):
      values = [at_masks(model, [*text[:i], t.mask_id, *text[i + 1 :]], {i: text[i]})[0] for i in places]
      expected[row.id].append((sum(values), len(values)))
  assert_same(answer(model, rows).by_id, expected)


CLOZES = [
  Cloze("one piece", f"the {MASK} sat on the mat.", (" cat", " dog")),
  Cloze("pieces", f"she is a {MASK}.", (" nurse", " doctor", " catdog")),
  Cloze("first", f"{MASK} is a nurse", ("he", "she")),
  Cloze("last", f"the nurse is {MASK}", (" he", " on")),
  Cloze("others", f"the {OTHER} {OTHER} is a {MASK}, {OTHER}", (" nurse", " doctor")),
  Cloze("twice", f"the {MASK} is a {MASK}.", (" cat", " doctor")),
]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("pieces", ["one", "each", "growing"])
def test_fillings(load, name, pieces):
  model = load(name)
  t, expected = model.tokenizer, {}
  mask = t.backend.id_to_token(t.mask_id)
  rows = [dataclasses.replace(row, pieces=pieces) for row in CLOZES]
  for row in rows:
    kinds = re.findall(r"\[MASK\]|\[OTHER\]", row.text)
    text = t.encode(row.text.replace(MASK, mask).replace(OTHER, mask))
    places = [i for i, token in enumerate(text) if token == t.mask_id]
    asked = [i for i, kind in zip(places, kinds, strict=True) if kind == MASK]
    expected[row.id] = []
    for option in map(t.encode, row.options):

      def filled(pieces, asked=asked, text=text):
        out, begin = list(text), []
        for done, at in enumerate(asked):
          at += done * (len(pieces) - 1)
          out[at : at + 1] = pieces
          begin.append(at)
        return out, begin

      if pieces == "growing":
        steps = []
        for k in range(len(option)):
          ids, begin = filled([*option[:k], t.mask_id])
          steps.append(at_masks(model, ids, {begin[0] + k: option[k]})[0])
        expected[row.id].append((np.log(np.exp(steps).mean()), len(option)))
      else:
        wanted = option[:1] if pieces == "one" else option
        ids, begin = filled([t.mask_id] * len(wanted))
        values = at_masks(model, ids, {at + k: wanted[k] for at in begin for k in range(len(wanted))})
        expected[row.id].append((values.sum(), len(values)))
  found = answer(model, rows)
  assert not found.failed
  assert_same(found.by_id, expected)
  doctor = len(t.encode(" doctor"))
  assert doctor > 1 and found.by_id["pieces"][1][1] == (1 if pieces == "one" else doctor)


def test_the_space_before_a_filling_is_the_masks_own(load):
  """RoBERTa's mask eats the space before it, so an option brings its own: the benchmarks' business."""
  t = load("roberta").tokenizer
  assert t.encode("the<mask> sat") == t.encode("the <mask> sat")
  assert t.encode(" cat") != t.encode("cat")


# Embeddings


@pytest.mark.parametrize("name", ["gpt2", *MASKED])
@pytest.mark.parametrize("pooling", passes.POOLINGS)
def test_embeddings(load, name, pooling):
  model = load(name)
  t = model.tokenizer
  rows = [Text(text, text) for text in ("the cat", "she is a nurse.", "a", "the dog sat on the mat " * 5)]
  found = answer(model, [*rows, Text("again", "the cat")], task.EMBEDDINGS, pooling=pooling)
  for row in rows:
    ids = t.encode(row.text) if model.config.causal else [t.cls_id, *t.encode(row.text), t.sep_id]
    states = alone(model, ids)[1]
    expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
    assert_allclose(found.by_id[row.id], expected, atol=1e-5)
  assert_array_equal(found.by_id["again"], found.by_id["the cat"])


def test_embeddings_are_hugging_faces_last_hidden_state(load):
  """From the oracle's file: the mean over a whole text of `hidden_states[-1]`."""
  model = load("bert")
  with np.load(ORACLES / "bert" / "io.npz") as stored:
    ids, mask, states = stored["input_ids"], stored["mask"], stored[f"hidden_{model.config.num_layers}"]
  run = passes.program(model.module, model.mesh, "mean")
  B, T = ids.shape
  arrays = {"tokens": ids.astype(np.int32), "segment": mask.astype(np.int32),
            "position": np.tile(np.arange(T, dtype=np.int32), (B, 1)), "branch": np.zeros((B, T), np.int32)}
  found = np.asarray(run({"params": model.params}, arrays, 1))[:, 0]
  assert_allclose(found, (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True), atol=2e-5)


# Texts are read once; what cannot be asked is set apart


def reading(model, **how) -> Reading:
  return Reading(model.tokenizer, model.config.causal, model.config.max_positions, **how)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_identical_texts_are_read_once(load, name):
  model = load(name)
  rows = CHOICES[:3]
  again = [dataclasses.replace(row, id=row.id + " again") for row in rows]
  once, twice = (ask(asked, reading(model)) for asked in (rows, rows + again))
  assert twice.tokens == once.tokens and len(twice.segments) == len(once.segments)
  found = answer(model, rows + again).by_id
  assert all(found[row.id] == found[row.id + " again"] for row in rows)


def test_a_masked_copy_is_shared_by_the_options_that_differ_there(load):
  model = load("bert")
  asked = ask([Choice("pair", "", ("the cat sat", "the dog sat"))], reading(model))
  assert len(asked.segments) == 5, "three copies each, and that without the animal is one"
  assert sorted(len(segment.target) for segment in asked.segments) == [1, 1, 1, 1, 2]


def test_options_that_are_rotated_by_different_tables_are_read_apart(load):
  """LongRoPE turns a text by its length, so a long and a short option cannot share their context."""
  model = load("llama")
  row = Choice("row", "the cat", (" sat", " is", " sat on the mat"))
  together, apart, alike = (ask([row], reading(model, switch=n)) for n in (None, 5, 100))
  assert [len(asked.segments) for asked in (together, apart, alike)] == [1, 2, 1], "short ones are off the context"
  assert [len(where) for where in apart.wanted["row"]] == [len(where) for where in together.wanted["row"]]


def test_first_tokens_do_not_widen_every_row(load):
  model = load("gpt2")
  rows = [Choice(letter, "", (letter + "z",)) for letter in "abcdefghij"]
  asked = ask(rows, reading(model, bos="split_bos"))
  assert all(len(segment.target) <= len(segment.tokens) for segment in asked.segments)
  assert len(asked.segments) == 20
  more = ask([*rows, Choice("more", "", ("az", "bx"))], reading(model, bos="split_bos"))
  assert len(more.segments) == 21, "only x behind b is new"


def test_bad_rows_do_not_cost_the_others_their_answers(load):
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


def test_nothing_to_ask(load):
  found = answer(load("gpt2"), [])
  assert (found.by_id, found.failed, found.shapes) == ({}, {}, ())
  only = answer(load("gpt2"), [Choice("empty", "the", ("",))])
  assert only.by_id == {} and list(only.failed) == ["empty"]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_long_text_loses_its_left_on_request(load, name):
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


def test_a_cloze_loses_only_what_stands_before_its_mask(load):
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
def test_a_model_of_the_wrong_kind(load, name, row, asked, message):
  with pytest.raises(UserError, match=re.escape(message)):
    answer(load(name), [row], asked)


def test_arguments_that_mean_nothing_here(load):
  with pytest.raises(UserError, match="two rows have the id context"):
    answer(load("gpt2"), [CHOICES[0], CHOICES[0]])
  with pytest.raises(UserError, match="bos is one of prefixed_bos, split_bos and truncate left"):
    answer(load("gpt2"), CHOICES, bos="none")
  with pytest.raises(UserError, match="split_bos is for causal language models; bert is"):
    answer(load("bert"), CHOICES, bos="split_bos")
  without = dataclasses.replace(load("bert"), tokenizer=dataclasses.replace(load("bert").tokenizer, mask_id=None))
  with pytest.raises(UserError, match="the tokenizer names no mask token"):
    answer(without, CHOICES)
  bad = answer(load("bert"), [Cloze("no mask", "the cat", ("a",)), Cloze("?", f"{MASK}", ("a",), "some"), CLOZES[0]])
  assert answer(load("gpt2"), [Choice("no options", "the", ())]).failed == {"no options": "the row has no options."}
  assert "needs [MASK] at least once" in bad.failed["no mask"] and "`pieces` is `some`" in bad.failed["?"]
  assert list(bad.by_id) == ["one piece"]


def test_a_score_that_is_not_finite_is_told(load):
  model = load("gpt2")
  broken = jax.tree.map(lambda x: x * jnp.nan, model.params)
  found = answer(dataclasses.replace(model, params=broken), CHOICES[:2])
  assert found.by_id == {} and list(found.failed) == ["context", "none"] and "not finite" in found.failed["none"]


def test_choices_and_prompts_in_one_list(load):
  model = load("gpt2")
  rows = [CHOICES[0], Prompt("p", "the cat", 4), Prompt("too long", "the", 500)]
  found = answer(model, rows, task.TOKENS_AND_CONTINUATIONS)
  assert list(found.by_id) == ["context", "p"] and list(found.failed) == ["too long"]
  assert len(found.by_id["context"]) == 3 and isinstance(found.by_id["p"][0], str)


# The same on every mesh and from every process


TEXTS = [Text("a", "the cat"), Text("b", "she is a nurse")]


def told(model) -> list:
  """Ids in order, scores and vectors."""
  scores, vectors = answer(model, CHOICES).by_id, answer(model, TEXTS, task.EMBEDDINGS).by_id
  return [list(scores), [s for pairs in scores.values() for s, _ in pairs], [v.tolist() for v in vectors.values()]]


def assert_told(found: list, expected: list):
  assert found[0] == expected[0]
  assert_allclose(found[1], expected[1], rtol=0, atol=NATS)
  assert_allclose(found[2], expected[2], rtol=0, atol=1e-5)


def on_meshes(folder: Path) -> None:
  from jax.sharding import AxisType

  from jaxbias.mesh import AXES, make_mesh

  assert jax.device_count() == 8
  one = jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
  meshes = [one, make_mesh({"data": 8}), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})]
  for name in ("gpt2", "bert"):
    found = [told(language_model.load(str(folder / name), "float32", mesh)) for mesh in meshes]
    (folder / f"{name}.json").write_text(json.dumps(found))


def in_processes(folder: Path, port: str, number: str) -> None:
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
  assert jax.process_count() == 2 and jax.device_count() == 4
  (folder / f"process {number}.json").write_text(json.dumps(told(language_model.load(str(folder / "gpt2"), "float32"))))


def start(folder: Path, devices: int, *arguments: str) -> subprocess.Popen:
  flags = f"--xla_force_host_platform_device_count={devices}"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                 "JAXBIAS_CACHE": str(folder / "cache")}
  return subprocess.Popen([sys.executable, "-m", "tests.evals.test_answers", str(folder), *arguments], text=True,
                          env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
  try:
    _, errors = process.communicate(timeout=600)
  finally:
    process.kill()
  assert process.returncode == 0, errors[-3000:]


def test_eight_devices_answer_as_one(tmp_path):
  for name in ("gpt2", "bert"):
    write_model(name, tmp_path / name)
  finish(start(tmp_path, 8))
  for name in ("gpt2", "bert"):
    expected, *others = json.loads((tmp_path / f"{name}.json").read_text())
    for found in others:
      assert_told(found, expected)


def test_two_processes_answer_as_one(load, tmp_path):
  write_model("gpt2", tmp_path / "gpt2")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  for process in [start(tmp_path, 2, port, number) for number in "01"]:
    finish(process)
  for number in "01":
    assert_told(json.loads((tmp_path / f"process {number}.json").read_text()), told(load("gpt2")))


if __name__ == "__main__":
  folder, *process = sys.argv[1:]
  in_processes(Path(folder), *process) if process else on_meshes(Path(folder))
