"""What a causal model says about options, spans, running text and tokens, against one text at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.rows import Choice, Running
from jaxbias.evals import task
from jaxbias.evals.answers import answer
from jaxbias.evals.questions import rolling
from tests.evals.answering import CAUSAL, CHOICES, NATS, PAIRS, after, alone, assert_same, compared, load


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
def test_options_of_a_causal_model(name, bos):
  model = load(name)
  found = answer(model, CHOICES, bos=bos)
  assert_same(found.by_id, {r.id: [(v.sum(), len(v)) for v in sequential(model, r, bos)] for r in CHOICES})
  assert not found.failed and not found.truncated and 0 < found.padding < 1 and len(found.shapes) <= 4
  backwards = answer(model, CHOICES[::-1], bos=bos)
  assert list(backwards.by_id) == list(found.by_id)[::-1]
  assert_same(backwards.by_id, {row.id: found.by_id[row.id] for row in CHOICES[::-1]})


def test_the_end_of_text_token_is_the_last_of_an_ended_option():
  """Of options one of which begins the other, too; and its end is what a text of its tokens would have."""
  model = load("llama")
  t, row = model.tokenizer, Choice("row", "the cat", (" sat", " sat on", " is"))
  ended = dataclasses.replace(row, id="ended", ended=True)
  found = answer(model, [row, ended], task.TOKENS).by_id
  for option, plain, whole in zip(row.options, found["row"], found["ended"], strict=True):
    ids = [t.start_id, *t.encode(row.context), *t.encode(option), t.eos_id]
    assert_allclose(whole.logprob, after(model, ids, len(plain.logprob) + 1), atol=NATS)
    assert_allclose(whole.logprob[:-1], plain.logprob, atol=NATS)
  sums = answer(model, [ended]).by_id["ended"]
  assert_allclose([s for s, _ in sums], [option.logprob.sum() for option in found["ended"]], atol=NATS)


def test_the_two_rules_for_the_first_token_differ_everywhere():
  one, other = (answer(load("gpt2"), CHOICES, bos=bos).by_id for bos in ("prefixed_bos", "split_bos"))
  for row in CHOICES:  # but where there is one token and no context
    for (a, n), (b, _) in zip(one[row.id], other[row.id], strict=True):
      assert (abs(a - b) > NATS) == (n > 1 or row.context != ""), row


@pytest.mark.parametrize("span", ["shared", "different"])
def test_a_span_of_a_causal_model(span):
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


def test_a_span_compares_two_options():
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
def test_running_text_of_a_causal_model(window, stride, prefixed):
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


def test_statistics_of_every_token():
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
