"""BiasUnlearn's published data, schedule and evaluator (tests/oracles/biasunlearn_oracle.json), and our corrections.

Its losses are in tests/losses/test_oracles.py, its controller in test_controllers.py. Its `type_weights_dead_code` has
no counterpart: nothing in the published code uses those weights, and their class cannot be run.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_allclose
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from jaxbias import methods
from jaxbias.data import sources
from jaxbias.data.rows import LABELS, Split, Triple
from jaxbias.data.tokens import Tokenizer, answer_mask
from jaxbias.evals.answers import answer
from jaxbias.evals.stereoset import TASKS
from jaxbias.losses.registry import parse
from jaxbias.methods.biasunlearn import GPT2_START
from jaxbias.methods.controllers import Phase, Published
from jaxbias.models import language_model
from jaxbias.train.batches import Sampler, tokenise
from jaxbias.train.optim import make_optimizer, schedule

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "biasunlearn_oracle.json").read_text())
TOY, EVALUATOR = ORACLE["data_construction_toy"], ORACLE["evaluator_toy"]
VOCABULARY = EVALUATOR["vocab"]
BATCHES = {"forget": 4, "retain": 28, "general": 28}


def characters() -> tokenizers.Tokenizer:
  """A token a character, as the oracle's tokenizer has it."""
  backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, []))
  backend.add_tokens([AddedToken(GPT2_START, special=True)])
  return backend


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("toy") / "toy.json"
  path.write_text(json.dumps(TOY["stereoset_json"]))
  return path


@pytest.fixture(scope="module")
def toy(toy_file) -> Split:
  continuations = map(sources.whole, sources.stereoset_continuations(toy_file))
  return Split((*sources.stereoset_triples(toy_file), *continuations), ())


@pytest.fixture(scope="module")
def published(toy) -> Sampler:
  """What the method published for GPT-2 reads of the toy, in the oracle's batches and with its seed."""
  method = methods.get("biasunlearn_published_gpt2")
  objective, _ = parse(method.losses)
  tokenizer = Tokenizer(characters(), 0, 0, 0, len(VOCABULARY), "")
  texts = tokenise(method.recipe(toy, 123), objective, tokenizer, max_positions=64)
  return Sampler(texts, objective, BATCHES, None, 0, 1)


# Data construction


def assert_loader(sampler: Sampler, role: str, loader: dict, adversarial: bool = True) -> None:
  """The role's texts are the loader's, in its order, with its answers and its batch size."""
  pairs = list(zip(sampler.texts.rows[role], sampler.texts.segments[role], strict=True))
  if not adversarial:
    kept = [(row, segment) for row, segment in pairs if row.id.endswith("/stereotype")]
    assert len(kept) < len(pairs), "there was something to leave out"
    pairs = kept
  assert len(pairs) == loader["size"] == len(loader["items"]) and sampler.counts[role] == loader["batch_size"]
  for (row, segment), item in zip(pairs, loader["items"], strict=True):
    assert GPT2_START + row.text == item["text"] and len(segment.tokens) + 1 == item["n_tokens"]
    assert row.domain == ("" if role == "general" else sources.DOMAINS[item["bias_type"]])
    if role != "general":  # whose distributions are compared everywhere
      start = item["n_tokens"] - len(segment.target)
      assert start == max(item["start_loc"], 1)  # the start token itself is never an answer
      answer_text = "".join(VOCABULARY[token] for token in segment.target)
      assert answer_text == item["answer_text_by_start_loc"].removeprefix(GPT2_START)


def test_the_published_loaders_of_all_types(published):
  loaders = TOY["result"]["mix_anti"]
  for role, name in (("forget", "ster"), ("retain", "anti"), ("general", "unrelate")):
    assert_loader(published, role, loaders[name])
  assert_loader(published, "forget", TOY["result"]["no_mix"]["ster"], adversarial=False)
  assert published.in_phase(Published().first()).texts.rows == published.texts.rows


@pytest.mark.parametrize("domain", sources.DOMAINS)
def test_the_published_loaders_of_one_type_and_their_exchange(published, domain):
  loaders = TOY["result"]["mix_anti"]
  forward, back = (published.in_phase(Phase(0, domain, swapped)) for swapped in ((), (domain,)))
  for sampler, sides in ((forward, ("forget", "retain")), (back, ("retain", "forget"))):
    for role, name in zip(sides, ("ster", "anti"), strict=True):
      assert_loader(sampler, role, loaders[f"{name}_{domain}"])
    assert_loader(sampler, "general", loaders["unrelate"])
  for step in range(3):  # batch sizes go with the texts
    drawn = collections.Counter(role for role, _ in back.members(step))
    assert drawn == {"forget": 28, "retain": 4, "general": 28}


def test_the_first_adversarial_quarter_is_all_of_gender_and_ours_is_of_every_type():
  """On lists as uneven as StereoSet's: 40 texts of gender, 60 of profession, 100 of race, 20 of religion."""
  sizes = dict(zip(sources.DOMAINS, (40, 60, 100, 20), strict=True))
  sentences = lambda n: tuple(f"They are {label} {n}." for label in LABELS)
  make = lambda domain, n: Triple(f"{domain}{n}", domain, "t", "They are BLANK.", sentences(n), 8)
  split = Split(tuple(make(domain, n) for domain, size in sizes.items() for n in range(size)), ())
  types = lambda recipe: collections.Counter(r.domain for r in recipe.forget if r.id.endswith("anti-stereotype"))
  theirs, ours = (methods.get(name).recipe(split, 0) for name in ("biasunlearn_published", "biasunlearn"))
  assert types(theirs) == {"gender": 40, "profession": 15}
  assert types(ours) == types(theirs.alone) == {domain: size // 4 for domain, size in sizes.items()}
  assert ours.alone is None


def test_correct_answers_are_fillings_and_continuations(toy):
  assert "13 chars early" in TOY["trap"] and len(GPT2_START) == 13
  for name in ("biasunlearn", "biasunlearn_published"):
    answers = {row.id: row.text[row.prefix :] for row in methods.get(name).recipe(toy, 0).retain}
    assert answers["i0/anti-stereotype"] == " tougher than boys." and answers["x1/anti-stereotype"] == " He was calm."
  retained = methods.get("biasunlearn_published_gpt2").recipe(toy, 0).retain
  early = next(row for row in retained if row.id == "x1/anti-stereotype")
  assert early.text[early.prefix :] == "he chef came. He was calm."


def test_the_worked_example_of_an_answers_start():
  """Tokens are counted with the start token, which the published code writes into the text."""
  given = ORACLE["start_loc_example"]
  text = given["text"].removeprefix(GPT2_START)
  backend = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(given["tokens"])}, "."))
  backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\."), "isolated")
  tokenizer = Tokenizer(backend, 0, 0, 0, 10, "")
  ids, offsets = tokenizer.encode_with_offsets(text)
  assert [[start + 13, end + 13] for start, end in offsets] == given["token_offsets"][1:]
  triple = Triple("a", "gender", "girl", f"{given['context']} BLANK than boys.", (text,) * 3, len(given["context"]))
  for name, expected in (("biasunlearn_published_gpt2", "repo_start_loc"), ("biasunlearn", "correct_start_loc")):
    row = methods.get(name).recipe(Split((triple,), ()), 0).retain[0]
    assert answer_mask(tokenizer, row.text, row.prefix)[1] + 1 == given[expected]


# The learning rate


@pytest.mark.parametrize("key,processes", [
  ("first_phase_single_process", 1), ("first_phase_4proc(scheduler ticks = 4*opt_steps, total=4800)", 4),
])  # fmt: skip
def test_the_first_phases_learning_rate(key, processes):
  first = Published("train", max_steps=1000, processes=processes).first()
  share = schedule("from_zero", first.schedule_steps, first.warmup_steps)
  for step, rate in ORACLE["lr_schedule"][key].items():
    assert_allclose(4e-5 * first.rate * share(jnp.int32(step)), rate, rtol=2e-6, atol=1e-11, err_msg=step)


def test_a_phase_that_brings_its_schedule_does_not_move_at_its_first_step():
  train = SimpleNamespace(schedule="cosine", steps=7, warmup_steps=0, clip_norm=1.0, weight_decay=0.0,
                          rules=())  # fmt: skip
  slopes, sizes = {"w": jnp.ones(2)}, []
  for settings in ((), (1200.0, 2.5)):
    tx = make_optimizer(train, *settings)
    state = tx.init(slopes)
    for _ in range(4):
      updates, state = tx.update(slopes, state, slopes)
      sizes.append(float(updates["w"][0]))
  cosine = [(1 + np.cos(np.pi * step / 7)) / 2 for step in range(4)]
  assert_allclose(sizes, [*cosine, 0.0, 0.4, 0.8, 1197 / 1197.5], rtol=1e-4)


def test_the_7b_script_keeps_the_schedule_and_the_moments_that_it_began_with():
  control = Published("train_7b", processes=4)
  first = control.first()
  later = control.next(first, 50, dict(zip(sources.DOMAINS, (70.0, 60.0, 55.0, 50.0), strict=True)))
  kept = ("schedule_steps", "warmup_steps", "began", "rate")
  assert [getattr(later, name) for name in kept] == [getattr(first, name) for name in kept] == [1200, 2.5, 0, 1.0]


# The evaluator


@pytest.fixture(scope="module")
def bigrams(tmp_path_factory) -> language_model.LanguageModel:
  """The oracle's bigrams as a Llama: embeddings are unit vectors, the block adds nothing, the head holds the logits."""
  folder, V, D = tmp_path_factory.mktemp("bigrams"), len(VOCABULARY), 72
  layer, zeros = "model.layers.0.", np.zeros((D, D), np.float32)
  head = np.zeros((V, D), np.float32)
  head[:, :V] = np.array(EVALUATOR["bigram_logits_row_is_current_token"]).T / D**0.5  # the norm makes lengths sqrt(D)
  tensors = {f"{layer}{name}.weight": zeros for name in (
    *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
  norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
  tensors |= {f"{name}.weight": np.ones(D, np.float32) for name in norms}
  save_file(tensors | {"model.embed_tokens.weight": np.eye(V, D, dtype=np.float32), "lm_head.weight": head},
            folder / "model.safetensors")  # fmt: skip
  (folder / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D, "intermediate_size": D,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-12,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
  }))  # fmt: skip
  characters().save(str(folder / "tokenizer.json"))
  return language_model.load(str(folder))


def test_the_published_evaluator_on_its_toy(bigrams, toy_file):
  task = next(task for task in TASKS if task.name == "stereoset_intrasentence_official")
  examples = task.load(str(toy_file))
  found = answer(bigrams, task.rows(examples), bos=task.bos).by_id
  expected = {row["id"]: row["score"] for row in EVALUATOR["predictions"]}
  for identity, options in found.items():
    each = [np.exp(total / tokens) for total, tokens in options]
    assert_allclose(each, [expected[f"{identity}_{label[0]}"] for label in LABELS], rtol=1e-5)
  assert 3 * len(found) == len(expected)
  estimates = task.reduce(examples, found, draws=2).estimates
  for group, theirs in EVALUATOR["results"].items():
    ours = [estimates[group][name].value for name in ("ss", "lms", "icat")]
    assert_allclose(ours, [theirs[f"{name} Score"] for name in ("SS", "LM", "ICAT")], atol=1e-9)
