"""A loaded model behind the generators: SmolLM2 writes; a made-up masked model fills."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxbias.data.generators import Draft, low_confidence, mask_and_refill, regenerate
from jaxbias.data.rows import MASK
from jaxbias.errors import UserError
from jaxbias.evals.refill import filler, rewriter, unsure
from jaxbias.evals.sampling import Sampling
from jaxbias.models import language_model
from jaxbias.models.transformer import Transformer, abstract_variables
from tests.models import tiny_config
from tests.train import tiny_model

DRAFT = Draft("d", "the cat", "the cat sat", ((4, 7),))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
  return language_model.load(str(tiny_model(tmp_path_factory.mktemp("tiny") / "model")))


def test_a_causal_model_fills_rewrites_and_says_how_sure_it_is(causal):
  fill = filler(causal, top=5, seed=1)
  made = fill([f"the {MASK} sat on {MASK}"])[0]
  assert len(made) == 2 and MASK not in "".join(made)
  assert filler(causal, top=5, seed=1)([f"the {MASK} sat on {MASK}"])[0] == made
  together = fill([f"the {MASK} sat on {MASK}", f"a {MASK}"])
  assert [len(made) for made in together] == [2, 1] and "" not in together[0]
  rewrite = rewriter(causal, Sampling(max_tokens=4, temperature=1.0))
  rng = np.random.default_rng(0)
  assert MASK not in mask_and_refill(fill)(DRAFT, rng)[0]
  assert len(regenerate(lambda *pair: rewrite([pair])[0])(DRAFT, rng)) == 1
  sampled, other = unsure(causal, samples=3, max_tokens=4)(["the cat", "a"])
  assert [text for text, _ in other] != [text for text, _ in sampled]
  assert sampled and all(0 < p <= 1 for _, p in sampled)
  assert low_confidence(lambda source: sampled, most=1.0)(DRAFT, rng)[0] == min(sampled, key=lambda pair: pair[1])[0]
  with pytest.raises(UserError, match="nothing to fill"):
    fill(["no mask"])


def test_a_masked_model_fills_every_mask_with_one_of_its_likeliest():
  words = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrs"]
  config = tiny_config(task="masked")
  module = Transformer(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
                        nn.unbox(abstract_variables(module)))  # fmt: skip
  tokenizer = SimpleNamespace(
    encode=lambda text: [words.index(w) for w in text.split()], decode=lambda ids: " ".join(words[i] for i in ids),
    special=lambda name: words.index(f"[{name.upper()}]"), pad_id=0)  # fmt: skip
  model = SimpleNamespace(config=config, module=module, params=params, tokenizer=tokenizer)
  seen = {tuple(filler(model, top=2, seed=s)([f"a {MASK} b {MASK}"])[0]) for s in range(12)}
  assert all(len(made) == 2 for made in seen) and 1 < len(seen) <= 4, "two choices for each of two masks"
