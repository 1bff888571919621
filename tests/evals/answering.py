"""Models, rows and the slow way to answer them, for the tests of answers: one text alone in a row, unpacked.

The models are the oracles' of a few layers, which other tests hold against Hugging Face.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from jaxbias.data.rows import MASK, OTHER, Choice, Cloze
from jaxbias.losses.logprobs import logits
from jaxbias.models import language_model
from jaxbias.models.transformer import head

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


@functools.cache
def load(name: str) -> language_model.LanguageModel:
  """The model, float32, in a folder that lasts as long as this process."""
  folder = Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, folder)
  return language_model.load(str(write_model(name, folder / name)), "float32")


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


CLOZES = [
  Cloze("one piece", f"the {MASK} sat on the mat.", (" cat", " dog")),
  Cloze("pieces", f"she is a {MASK}.", (" nurse", " doctor", " catdog")),
  Cloze("first", f"{MASK} is a nurse", ("he", "she")),
  Cloze("last", f"the nurse is {MASK}", (" he", " on")),
  Cloze("others", f"the {OTHER} {OTHER} is a {MASK}, {OTHER}", (" nurse", " doctor")),
  Cloze("twice", f"the {MASK} is a {MASK}.", (" cat", " doctor")),
]
