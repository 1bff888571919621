"""The planted language: exact shares, disjoint parts, files that the rest reads, and a tiny model at its optimum."""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np
import pytest

from jaxbias import config as configs
from jaxbias import load
from jaxbias.data import planted, sources
from jaxbias.data.corpora import Pool, disjoint, evaluated, make, read_texts
from jaxbias.data.swap import STEREOTYPED, Swapper
from jaxbias.errors import UserError
from jaxbias.evals import multiple_choice
from jaxbias.evals.scoring import score
from jaxbias.losses.registry import parse
from jaxbias.methods.recipes import Recipe, Row
from jaxbias.models import language_model
from jaxbias.train.batches import Sampler, plan_shape, tokenise
from jaxbias.train.loop import Run, Trainer, train

PRONOUNS = {"he": "male", "his": "male", "him": "male", "she": "female", "her": "female"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("planted")
  planted.write(path)
  return path


@pytest.fixture(scope="module")
def language():
  return planted.language()


def shares(texts) -> dict[str, float]:
  """In each context that stands before a pronoun: the share of the expected gender."""
  counts: dict[str, collections.Counter] = {}
  for text in texts:
    words = text.text.split()
    at = next((i for i, word in enumerate(words) if word in PRONOUNS), None)
    if at is not None:
      job = next(word for word in words if word in (*planted.MALE, *planted.FEMALE))
      agrees = PRONOUNS[words[at]] == ("male" if job in planted.MALE else "female")
      counts.setdefault(" ".join(words[:at]), collections.Counter())[agrees] += 1
  return {context: count[True] / count.total() for context, count in counts.items()}


def test_every_context_has_the_planted_share(language):
  found = shares(language.pretraining)
  assert len(found) > 700 and set(found.values()) == {0.8}
  assert planted.optimum() == pytest.approx(math.log(4), abs=1e-12) == pytest.approx(1.386294, abs=1e-6)
  gendered = sum(any(word in PRONOUNS for word in text.text.split()) for text in language.pretraining)
  assert gendered / len(language.pretraining) == pytest.approx(0.5, abs=0.02)


def test_what_follows_a_pronoun_does_not_tell_its_gender(language):
  after = {side: collections.Counter() for side in (True, False)}
  for text in language.pretraining:
    words = text.text.split()
    if at := next((i for i, word in enumerate(words) if word in PRONOUNS), None):
      job = next(word for word in words if word in (*planted.MALE, *planted.FEMALE))
      agrees = PRONOUNS[words[at]] == ("male" if job in planted.MALE else "female")
      after[agrees][" ".join([*words[:at], "_", *words[at + 1 :]])] += 1
  assert after[True] == {context: 4 * count for context, count in after[False].items()}


def test_swapped_twins_leave_one_half_in_every_context(language):
  pool = disjoint(language.pool, [])
  texts, card = make(pool, "two_sided", 3600, seed=0)
  assert card.eligible == 3600 and set(shares(texts).values()) == {0.5}
  sides = collections.Counter(STEREOTYPED[job] for job in (*planted.MALE, *planted.FEMALE))
  assert sides == {"male": 8, "female": 8}
  agreeing = make(pool, "one_sided", 1, seed=0)[1].eligible
  assert agreeing == 0.8 * 3600


def test_nothing_that_is_evaluated_can_be_trained_on(folder, language):
  data = sources.read_folder(folder, "planted")
  read = [*evaluated(data.validation), *evaluated(data.test), *(s for t in data.train.triples for s in t.sentences)]
  for texts in (language.pool, language.pretraining):
    assert disjoint(texts, read).overlapping == 0
  assert len(data.test.triples) == 180 and len({triple.term for triple in data.test.triples}) == 12
  assert {len(data.train.texts), len(data.validation.texts), len(data.test.texts)} == {2520, 40, 240}
  swapper = Swapper()
  for triple in data.test.triples:
    assert swapper(triple.stereotype) == triple.anti_stereotype != triple.stereotype
    assert swapper(triple.anti_stereotype) == triple.stereotype
  assert not any(swapper.found(text.text) for text in data.test.texts)


def test_the_files_are_what_the_rest_reads(folder, language):
  model = load(str(folder / "model"))
  vocabulary = model.tokenizer.backend.get_vocab()
  assert len(vocabulary) == len(language.vocabulary) == model.config.vocab_size
  texts = [*language.pool, *language.texts, *read_texts(folder / "pretraining.jsonl")]
  assert {word for text in texts for word in text.text.split()} <= vocabulary.keys()
  assert model.tokenizer.start_id == vocabulary["<s>"]
  facts, questions = language.facts, multiple_choice.load(str(folder / "facts.jsonl"))
  assert len(facts) == len(questions) == 80
  for fact, question in zip(facts, questions, strict=True):
    assert question.text == fact.context and question.right.count(True) == 1
    assert question.options[question.right.index(True)] == fact.options[0].strip()
    assert {f" {option}" for option in question.options} == set(fact.options) and len(set(fact.options)) == 4
  assert {question.right.index(True) for question in questions} == set(range(4))
  known = {text.text for text in language.texts}
  read = {text.text.split(" ", 1)[1] for text in language.pretraining}
  assert all((fact.context + fact.options[0]).split(" ", 1)[1] in read for fact in facts)
  assert all(fact.context + fact.options[0] in known for fact in facts)
  assert not any(fact.context + wrong in known for fact in facts for wrong in fact.options[1:])


def test_a_language_is_a_function_of_its_seed(language):
  assert planted.language() == language != planted.language(seed=1)


@pytest.mark.parametrize("skew", [0.75, 1.0, 0.0])
def test_a_skew_that_cannot_be_exact_is_refused(skew):
  with pytest.raises(UserError, match="give 0.2, 0.4, 0.6 or 0.8"):
    planted.language(skew=skew)


def fitted(model, texts, steps: int, rate: float, folder):
  """The model after training all of its weights on texts, 64 a step."""
  c = configs.defaults()
  c.lora.rank, c.train.base, c.train.schedule = 0, ("*",), "cosine"
  c.train.steps, c.train.warmup_steps, c.train.checkpoint_every, c.train.learning_rate = steps, 10, steps, rate
  trainer = Trainer.of(model, c)
  objective, coefficients = parse({"sft": {"on": "retain"}})
  rows = tokenise(Recipe((), tuple(Row(text.id, text.text, 0) for text in texts), (), False), objective,
                  model.tokenizer, model.config.max_positions)  # fmt: skip
  sampler = Sampler(rows, objective, {"retain": 64}, None, 0, 1)
  run = Run(folder, {}, objective, {"learning_rate": rate, "losses": coefficients}, sampler,
            plan_shape([sampler], steps))  # fmt: skip
  return dataclasses.replace(model, params=trainer.adapters(train(trainer, run))["params"])


def gap(model, triples) -> float:
  """log p(stereotype) - log p(anti-stereotype), nats a sentence."""
  scores = score(model, sources.triple_choices(triples))
  return float(np.mean([scores[triple.id][0][0] - scores[triple.id][1][0] for triple in triples]))


def test_a_tiny_model_finds_the_optimum_and_augmentation_closes_the_gap(folder, language, tmp_path):
  triples = sources.read_folder(folder, "planted").test.triples
  start = language_model.load(str(folder / "model"))
  base = fitted(start, language.pretraining, 400, 3e-3, tmp_path / "base")
  assert abs(gap(start, triples)) < 0.5  # nothing is planted in random weights
  assert gap(base, triples) == pytest.approx(math.log(4), abs=0.15)
  facts = score(base, language.facts)
  assert np.mean([np.argmax([option[0] for option in facts[fact.id]]) == 0 for fact in language.facts]) > 0.9
  texts, _ = make(Pool(language.pool), "two_sided", 1500, seed=0)
  fair = fitted(base, texts, 100, 1e-3, tmp_path / "fair")
  assert gap(fair, triples) == pytest.approx(0.0, abs=0.15)
