"""Every family against Hugging Face's numbers (tests/oracles/README.md), and its config read key by key.

`pytest tests/models/test_families.py -k table -s` prints the table of errors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.losses.logprobs import logits as all_logits
from jaxbias.losses.logprobs import token_logprobs
from jaxbias.mesh import Layout, make_mesh
from jaxbias.models.checkpoints import load_params, read_config
from jaxbias.models.config import LayerKind
from jaxbias.models.families import FAMILIES, family_of, model_config
from jaxbias.models.families.layout import Rows
from jaxbias.models.keys import HARMLESS, rope_table
from jaxbias.models.transformer import Transformer, abstract_variables, head

FOLDERS = Path(__file__).parents[1] / "oracles" / "models"
NAMES = sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir())
EVERY = pytest.mark.parametrize("name", NAMES)


def hf(name: str, **changes) -> dict:
  """The config.json of an oracle with keys changed; a value of ... takes the key away."""
  merged = read_config(FOLDERS / name) | changes
  return {key: value for key, value in merged.items() if value is not ...}


@dataclasses.dataclass(frozen=True)
class Errors:
  """Largest differences from Hugging Face at real positions; gradient norm relative."""

  logits: float
  hidden: float
  loss: float
  gradient_norm: float
  excess: float  # largest |difference| - (2e-5 or 1e-4 of the value, whichever is more), must not be positive


@functools.cache
def errors(name: str) -> Errors:
  folder, config = FOLDERS / name, model_config(hf(name))
  module = Transformer(config)
  boxed = abstract_variables(module)
  abstract = nn.unbox(boxed)
  shardings = Layout(make_mesh({"data": -1})).shardings(abstract, nn.get_partition_spec(boxed))
  params = load_params(folder, config, abstract, shardings, "float32")
  with np.load(folder / "io.npz") as stored:
    io = dict(stored)
  tokens, segment = (jnp.asarray(io[key], jnp.int32) for key in ("input_ids", "mask"))
  position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  def loss(params):
    sites = ("residual_in", "residual_out")
    hidden, captures = module.apply({"params": params}, tokens, segment, position, capture=sites)
    scored, label = (hidden[:, :-1], io["labels"][:, 1:]) if config.causal else (hidden, io["labels"])
    logprob = token_logprobs(scored, head(params, config), jnp.asarray(np.maximum(label, 0), jnp.int32))
    states = [captures["residual_in"][0], *captures["residual_out"]]
    if config.causal:  # Hugging Face shows a decoder's last state behind the final norm
      states[-1] = hidden
    total = -jnp.where(label >= 0, logprob, 0.0).sum() / (label >= 0).sum()
    return total, (all_logits(hidden, head(params, config)), states)

  (value, (logits, states)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  norm = math.sqrt(sum(float(np.square(np.asarray(g), dtype=np.float64).sum()) for g in jax.tree.leaves(grads)))
  real = io["mask"].astype(bool)
  pairs = [(logits, io["logits"]), *((state, io[f"hidden_{i}"]) for i, state in enumerate(states))]
  assert len(states) == sum(key.startswith("hidden_") for key in io)
  gaps = [np.abs(np.asarray(ours) - theirs)[real] for ours, theirs in pairs]
  excess = max((gap - np.maximum(2e-5, 1e-4 * np.abs(theirs[real]))).max()
               for gap, (_, theirs) in zip(gaps, pairs, strict=True))  # fmt: skip
  return Errors(gaps[0].max(), max(gap.max() for gap in gaps[1:]), abs(float(value) - float(io["loss"])),
                abs(norm / float(io["grad_norm"]) - 1), excess)  # fmt: skip


@EVERY
def test_logits_hidden_states_loss_and_gradient_are_hugging_faces(name):
  found = errors(name)
  assert found.excess <= 0
  assert found.loss < 1e-5 and found.gradient_norm < 1e-4


def test_table_of_errors():
  print(f"\n{'family':18s} {'logits':>9s} {'hidden':>9s} {'loss':>9s} {'gradient norm':>14s}")
  for name in NAMES:
    e = errors(name)
    print(f"{name:18s} {e.logits:9.1e} {e.hidden:9.1e} {e.loss:9.1e} {e.gradient_norm:14.1e}")
  assert len(NAMES) == 16


# config.json: everything is honoured or refused


@EVERY
def test_no_key_is_ignored_unless_it_is_known_to_be_harmless(name):
  with pytest.raises(UserError, match="`mystery_scale`.*supported: .*vocab_size"):
    model_config(hf(name, mystery_scale=2.0))
  assert model_config(hf(name, mystery_scale=None)) == model_config(hf(name))


@EVERY
@pytest.mark.parametrize("key,value", [
  ("is_encoder_decoder", True), ("add_cross_attention", True), ("quantization_config", {"bits": 4}),
  ("pruned_heads", {"0": [1]}), ("is_decoder", True), ("position_embedding_type", "relative_key"),
])  # fmt: skip
def test_another_kind_of_model_is_refused_by_the_keys_name(name, key, value):
  with pytest.raises(UserError, match=key):
    model_config(hf(name, **{key: value}))


@EVERY
def test_an_activation_is_honoured_or_refused(name):
  key = next(k for k in ("hidden_activation", "activation_function", "activation", "hidden_act") if k in hf(name))
  assert model_config(hf(name, **{key: "relu"})).activation == "relu"
  with pytest.raises(UserError, match=f"{key} `mish`, which is not supported; `silu`"):
    model_config(hf(name, **{key: "mish"}))


@EVERY
def test_a_missing_size_is_named(name):
  key = next(k for k in ("num_hidden_layers", "n_layer", "n_layers") if k in hf(name))
  with pytest.raises(UserError, match=f"whole number for `{key}`"):
    model_config(hf(name, **{key: ...}))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3"])
def test_the_older_layout_of_a_config_means_the_same(name):
  theta = hf(name)["rope_parameters"]["rope_theta"]
  old = hf(name, rope_parameters=..., layer_types=..., dtype=...,
           rope_theta=theta, rope_scaling=None, torch_dtype="float16")  # fmt: skip
  assert model_config(old) == model_config(hf(name))
  scaled = {"rope_type": "linear", "factor": 4.0}
  new = model_config(hf(name, rope_parameters={**hf(name)["rope_parameters"], **scaled}))
  assert model_config(old | {"rope_scaling": {"type": "linear", "factor": 4.0}}) == new
  assert model_config(old | {"rope_scaling": scaled}) == new != model_config(hf(name))


def test_the_older_layouts_of_gemma_3_and_gpt_neox():
  old = hf("gemma3", rope_parameters=..., layer_types=..., _sliding_window_pattern=..., rope_theta=1e6,
           rope_local_base_freq=1e4, sliding_window_pattern=6, rope_scaling=None)  # fmt: skip
  assert model_config(old) == model_config(hf("gemma3"))
  far, near = model_config(old | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}).ropes
  plain = model_config(old).ropes
  assert_allclose(far.inverse, np.array(plain[0].inverse) / 8)  # the scaling is about full attention only
  assert near == plain[1]
  old = hf("gpt_neox", rope_parameters=..., rotary_pct=0.25, rotary_emb_base=10_000)
  assert model_config(old) == model_config(hf("gpt_neox"))


def test_windows_and_kinds_of_layers():
  full, near = LayerKind(None, 0), LayerKind(4, 0)
  assert model_config(hf("mistral", sliding_window=4)).kinds == (near,)
  assert model_config(hf("phi3", sliding_window=4)).kinds == (near,)
  qwen = model_config(hf("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=...))
  assert [qwen.kinds[k] for k in qwen.layer_kinds] == [full, near, near]
  assert model_config(hf("qwen2", sliding_window=4)).kinds == (full,)  # use_sliding_window is false
  gemma = model_config(hf("gemma2", sliding_window=4, layer_types=...))
  assert [gemma.kinds[k] for k in gemma.layer_kinds] == [near, full, near]
  assert model_config(hf("gemma3", num_hidden_layers=6, layer_types=...)).layer_kinds == (0, 0, 0, 0, 0, 1)
  with pytest.raises(UserError, match="layer_types"):
    model_config(hf("qwen2", layer_types=["full_attention", "chunked_attention", "full_attention"]))


def test_an_architecture_that_is_not_supported_is_named_with_those_that_are():
  with pytest.raises(UserError, match="MambaForCausalLM, which is not supported; supported: .*LlamaForCausalLM"):
    family_of({"architectures": ["MambaForCausalLM"]})
  with pytest.raises(UserError, match="(none)"):
    family_of({})
  assert len({name for family in FAMILIES for name in family.ARCHITECTURES}) >= 16


def test_harmless_keys_are_not_read_by_anybody():
  """A key that a family reads changes the model; one in HARMLESS must not, except for what is read as a token."""
  tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
  for name in NAMES:
    plain = model_config(hf(name))
    for key in HARMLESS - tokens - {"architectures"}:
      assert model_config(hf(name, **{key: ...})) == plain, (name, key)


# Rotary tables in closed form


def test_llama3_scaling_leaves_short_waves_divides_long_ones_and_blends_between():
  theta, dim, factor, original = 5e5, 128, 8.0, 8192
  values = {"rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original}  # fmt: skip
  plain, found = (np.array(rope_table(kind, v, dim, 131_072).inverse)
                  for kind, v in (("default", {"rope_theta": theta}), ("llama3", values)))  # fmt: skip
  wave = 2 * np.pi / plain
  assert_allclose(found[wave < original / 4], plain[wave < original / 4])
  assert_allclose(found[wave > original], plain[wave > original] / factor)
  between = (wave >= original / 4) & (wave <= original)
  assert between.any() and np.all((found < plain) & (found > plain / factor), where=between)


def test_yarn_turns_fast_pairs_as_before_and_slow_ones_by_the_factor():
  found = rope_table("yarn", {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}, 64, 8192)
  plain = np.array(rope_table("default", {"rope_theta": 1e4}, 64, 8192).inverse)
  turns = 2048 * plain / (2 * np.pi)
  assert_allclose(np.array(found.inverse)[turns > 40], plain[turns > 40])
  assert_allclose(np.array(found.inverse)[turns < 0.7], plain[turns < 0.7] / 4)
  assert_allclose(found.scale, 0.1 * math.log(4.0) + 1)


def test_a_text_past_the_original_window_turns_by_the_long_table():
  """LongRoPE: each text by its own length, so that packing cannot change it."""
  values = {"rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0],
            "original_max_position_embeddings": 4}  # fmt: skip
  rope = rope_table("longrope", values, 4, 16)
  assert_allclose(rope.scale, math.sqrt(1 + math.log(4) / math.log(4)))
  from jaxbias.models.layers import rotary_tables

  segment = jnp.array([[1] * 3 + [2] * 6])
  position = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
  cos, _ = rotary_tables(rope, position, segment)
  inverse = np.array(rope.inverse)
  assert_allclose(cos[0, 2, 0, :2], np.cos(2 * inverse) * rope.scale, rtol=1e-6)
  assert_allclose(cos[0, 5, 0, :2], np.cos(2 * inverse / [2, 4]) * rope.scale, rtol=1e-6)


@pytest.mark.parametrize("kind,values,said", [
  ("dynamic", {"factor": 2.0}, "rope scaling `dynamic`, which is not supported; supported: default, linear"),
  ("llama3", {"factor": 8.0}, "needs a number for `low_freq_factor`"),
  ("linear", {"factor": 2.0, "sharpness": 1.0}, "has the parameter `sharpness`"),
  ("longrope", {"short_factor": [1.0]}, "needs 4 numbers in `short_factor` and `long_factor`"),
])  # fmt: skip
def test_what_a_rotary_scaling_cannot_be_is_refused(kind, values, said):
  for config in ({"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}},
                 {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": kind, **values}}):  # fmt: skip
    with pytest.raises(UserError, match=said):
      model_config(hf("llama", **config))


# Where tensors lie


def test_rows_of_fused_tensors():
  """[q; k; v] one after the other, and by head as GPT-NeoX has them."""
  ours = np.arange(4)
  assert Rows(1, (8, 4, 4)).at(ours).tolist() == [8, 9, 10, 11]
  assert Rows(0, (4, 4, 4), groups=2).at(ours).tolist() == [0, 1, 6, 7]
  assert Rows(2, (4, 4, 4), groups=2).at(ours).tolist() == [4, 5, 10, 11]


def test_first_releases_names_and_missing_prefixes_are_understood(tmp_path):
  """BERT's layer norms were once saved with gamma and beta, GPT-2 without `transformer.`."""
  from safetensors.numpy import load_file, save_file

  for name, rename in {
    "bert": lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    "gpt2": lambda n: n.removeprefix("transformer."),
  }.items():
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf(name)))
    tensors = load_file(FOLDERS / name / "model.safetensors")
    save_file({rename(n): t for n, t in tensors.items()}, folder / "model.safetensors")
    module = Transformer(model_config(hf(name)))
    boxed = abstract_variables(module)
    abstract = nn.unbox(boxed)
    shardings = Layout(make_mesh({"data": -1})).shardings(abstract, nn.get_partition_spec(boxed))
    renamed, plain = (load_params(f, module.config, abstract, shardings, "float32") for f in (folder, FOLDERS / name))
    jax.tree.map(np.testing.assert_array_equal, renamed, plain)


@EVERY
def test_weights_that_are_not_finite_are_refused_by_name(name, tmp_path):
  from safetensors.numpy import load_file, save_file

  tensors = load_file(FOLDERS / name / "model.safetensors")
  spoiled = sorted(tensors)[len(tensors) // 2]
  tensors[spoiled] = tensors[spoiled].copy()
  tensors[spoiled].flat[-1] = np.nan
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(hf(name)))
  module = Transformer(model_config(hf(name)))
  boxed = abstract_variables(module)
  abstract = nn.unbox(boxed)
  shardings = Layout(make_mesh({"data": -1})).shardings(abstract, nn.get_partition_spec(boxed))
  with pytest.raises(UserError, match=f"tensor {spoiled} holds NaN or infinity"):
    load_params(tmp_path, module.config, abstract, shardings, "float32")
