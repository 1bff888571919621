"""The Llama family against Hugging Face's own numbers, and what edits, packing and checkpoints promise."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from jaxbias.errors import UserError
from jaxbias.losses import logprobs
from jaxbias.mesh import Layout, make_mesh
from jaxbias.models.checkpoints import load_params, read_config
from jaxbias.models.families import model_config
from jaxbias.models.layers import SITES, Edit, Projection, visible
from jaxbias.models.transformer import Transformer, abstract_variables, head

FOLDER = Path(__file__).parents[1] / "oracles" / "models" / "llama"
CONFIG = model_config(read_config(FOLDER))
MODULE = Transformer(CONFIG)
L, D = CONFIG.num_layers, CONFIG.hidden_size
B, T = 3, 13  # the oracle's batch
ATOL, RTOL = 2e-5, 1e-4  # oracles/README.md




def load(folder: Path, dtype: str = "float32") -> dict:
  config = model_config(read_config(folder))
  boxed = abstract_variables(Transformer(config))
  abstract = nn.unbox(boxed)
  shardings = Layout(make_mesh({"data": -1})).shardings(abstract, nn.get_partition_spec(boxed))
  return load_params(folder, config, abstract, shardings, dtype)


@pytest.fixture(scope="module")
def params() -> dict:
  return load(FOLDER)


@pytest.fixture(scope="module")
def io() -> dict[str, np.ndarray]:
  with np.load(FOLDER / "io.npz") as stored:
    return dict(stored)


@jax.jit
def program(params, tokens, segment, position, branch, edits):
  return MODULE.apply({"params": params}, tokens, segment, position, branch, edits, capture=SITES)


def run(params, tokens, segment=None, position=None, branch=None, edits=None):
  """Last hidden state and every capture; rows are padded to one shape, so that all tests share two programs."""
  b, t = np.shape(tokens)
  segment = np.ones((b, t), int) if segment is None else segment
  position = np.broadcast_to(np.arange(t), (b, t)) if position is None else position
  branch = np.zeros((b, t), int) if branch is None else branch
  pad = lambda x: np.pad(x, ((0, B - b), (0, T - t)))
  edits = edits and {name: edits.get(name, edit(1.0, 0.0)) for name in SITES}
  hidden, captures = program(params, *map(pad, (tokens, segment, position, branch)), edits)
  return np.asarray(hidden[:b, :t]), {name: np.asarray(x[:, :b, :t]) for name, x in captures.items()}


def edit(keep: np.ndarray | float, value: np.ndarray | float) -> Edit:
  return Edit(*(np.broadcast_to(np.float32(x), (L, B, T, D)) for x in (keep, value)))


def random_tokens(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(seed).integers(4, CONFIG.vocab_size, shape)


# Hugging Face's numbers


def test_logits_and_every_hidden_state_are_hugging_faces(params, io):
  real = io["mask"].astype(bool)
  hidden, captures = run(params, io["input_ids"], io["mask"])
  ours = {i: captures["residual_in"][i] for i in range(L)} | {L: hidden}
  for i, states in ours.items():
    assert_allclose(states[real], io[f"hidden_{i}"][real], rtol=RTOL, atol=ATOL, err_msg=f"hidden_{i}")
  for i in range(L - 1):
    assert_allclose(captures["residual_out"][i][real], io[f"hidden_{i + 1}"][real], rtol=RTOL, atol=ATOL)
  logits = np.asarray(hidden) @ np.asarray(head(params, CONFIG).matrix).T
  assert_allclose(logits[real], io["logits"][real], rtol=RTOL, atol=ATOL)


def test_captures_add_up_to_the_residual_stream(params, io):
  _, c = run(params, io["input_ids"], io["mask"])
  assert_allclose(c["residual_in"] + c["attention_out"] + c["mlp_out"], c["residual_out"], atol=1e-6)
  assert_array_equal(c["residual_in"][1:], c["residual_out"][:-1])


def test_loss_and_the_gradient_of_every_parameter_are_hugging_faces(params, io, monkeypatch):
  monkeypatch.setattr(logprobs, "CHUNK", 6)  # chunks of two positions of each row
  tokens, segment = io["input_ids"], io["mask"]
  scored = segment[:, 1:].astype(bool)

  def loss(params):
    hidden, _ = MODULE.apply({"params": params}, tokens, segment, jnp.broadcast_to(jnp.arange(T), (B, T)))
    each = logprobs.token_logprobs(hidden[:, :-1], head(params, CONFIG), jnp.asarray(tokens[:, 1:]))
    return -jnp.where(scored, each, 0.0).sum() / scored.sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert_allclose(value, io["loss"], rtol=0, atol=1e-5)
  squares = [np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(jax.device_get(grads))]
  assert_allclose(np.sqrt(sum(squares)), io["grad_norm"], rtol=1e-4)
  assert min(squares) > 0


# Edits


def test_an_edit_that_keeps_everything_changes_nothing(params, io):
  plain = run(params, io["input_ids"], io["mask"])
  edited = run(params, io["input_ids"], io["mask"], edits={name: edit(1.0, 0.0) for name in SITES})
  jax.tree.map(assert_array_equal, plain, edited)


@pytest.mark.parametrize("layer", range(L))
def test_patching_a_layer_with_another_runs_values_continues_that_run(params, layer):
  theirs, ours = random_tokens(0, (B, T)), random_tokens(1, (B, T))
  (their_hidden, their_captures), (_, our_captures) = (run(params, tokens) for tokens in (theirs, ours))
  keep, value = np.ones((L, 1, 1, 1)), np.zeros((L, B, T, D))
  keep[layer], value[layer] = 0.0, their_captures["residual_out"][layer]
  hidden, captures = run(params, ours, edits={"residual_out": edit(keep, value)})
  for site in SITES:
    assert np.abs(our_captures[site] - their_captures[site]).max() > 0.1, "the two runs must differ to begin with"
    assert_allclose(captures[site][layer + 1 :], their_captures[site][layer + 1 :], atol=1e-6)
    until = layer if site == "residual_out" else layer + 1
    assert_allclose(captures[site][:until], our_captures[site][:until], atol=1e-6)
  assert_allclose(hidden, their_hidden, atol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_steering_one_position_adds_there_and_moves_nothing_before_it(params, site):
  tokens, value = random_tokens(2, (B, T)), np.zeros((L, B, T, D))
  value[1, :, 4] = 1.0
  plain, before = run(params, tokens)
  steered, after = run(params, tokens, edits={site: edit(1.0, value)})
  assert_allclose(after[site][1], before[site][1] + value[1], atol=1e-6)
  assert_allclose(steered[:, :4], plain[:, :4], atol=1e-6)
  assert np.abs(steered[:, 4:] - plain[:, 4:]).max(axis=(0, 2)).min() > 1e-4
  assert_array_equal(after["residual_out"][1], after["residual_in"][2])


@pytest.mark.parametrize("what", ["edits", "capture"])
def test_an_unknown_site_is_an_error_that_lists_the_sites(params, what):
  wrong = {"edits": {"mlp_in": edit(1.0, 0.0)}} if what == "edits" else {"capture": ("mlp_in",)}
  with pytest.raises(ValueError, match="'mlp_in'.*residual_in, attention_out, mlp_out, residual_out"):
    MODULE.apply({"params": params}, *[np.zeros((1, 2), int)] * 3, **wrong)


# The stack


def test_layers_are_stacked_and_compiled_once_whatever_the_depth(params):
  for path, leaf in flatten_dict(params).items():
    assert (leaf.shape[0] == L) == (path[0] == "layers"), path

  def program(depth):
    config = dataclasses.replace(CONFIG, num_layers=depth)
    module = Transformer(config)
    abstract = nn.unbox(abstract_variables(module))
    one = jnp.zeros((1, 8), jnp.int32)
    return jax.jit(lambda p: module.apply({"params": p}, one, one, one)[0]).lower(abstract).as_text()

  two, nine = program(2), program(9)
  assert two.count("dot_general") == nine.count("dot_general") > 0
  assert two.count("\n") == nine.count("\n")


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_is_a_matrix_product_and_its_bias(bias):
  rng = np.random.default_rng(0)
  x, w, b = (rng.standard_normal(shape, np.float32) for shape in ((2, 3, 4), (4, 5), (5,)))
  variables = {"params": {"kernel": w} | ({"bias": b} if bias else {})}
  y = Projection(5, ("embed", "mlp"), bias).apply(variables, x, None)
  assert_allclose(y, x @ w + bias * b, rtol=1e-5)


# What a position may see


@pytest.mark.parametrize("causal,window", [(True, None), (True, 2), (False, None)])
def test_what_a_position_sees_is_its_definition(causal, window):
  segment = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
  branch = np.array([[0, 0, 1, 1, 2, 0, 1, 0], [0, 1, 2, 2, 1, 3, 0, 0]])
  position = np.array([[0, 1, 2, 3, 2, 0, 1, 0], [0, 1, 1, 2, 2, 1, 0, 0]])
  rows = tuple(map(jnp.asarray, (segment, position, branch)))
  mask = np.asarray(visible(rows, rows, causal, window))[:, 0]
  for b, t, s in np.ndindex(mask.shape):
    same_segment, shared = segment[b, t] == segment[b, s], branch[b, s] in (0, branch[b, t])
    near = window is None or abs(position[b, t] - position[b, s]) < window
    earlier = position[b, s] <= position[b, t] or not causal
    assert mask[b, t, s] == (earlier and same_segment and shared and near), (b, t, s)
  assert mask.any(axis=-1).all(), "no softmax row may be empty"


def test_branches_equal_sequences_on_their_own(params):
  tokens = np.array([[7, 8, 9, 10, 20, 21, 22, 30, 31]])  # four of context, then options of three and of two
  position = np.array([[0, 1, 2, 3, 4, 5, 6, 4, 5]])
  branch = np.array([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
  together, _ = run(params, tokens, None, position, branch)
  for number in (1, 2):
    mine = np.isin(branch[0], (0, number))
    alone, _ = run(params, tokens[:, mine])
    assert_allclose(together[0, mine], alone[0], atol=1e-5)


def test_packed_segments_are_read_as_if_alone(params):
  texts = [random_tokens(seed, n) for seed, n in enumerate((5, 3, 4))]
  segment = np.repeat([1, 2, 3, 0], [5, 3, 4, 1])[None]
  position = np.concatenate([*map(np.arange, (5, 3, 4, 1))])[None]
  packed, _ = run(params, np.concatenate([*texts, [0]])[None], segment, position)
  for number, text in enumerate(texts, start=1):
    alone, _ = run(params, text[None])
    assert_allclose(packed[segment == number], alone[0], atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(params, io):
  real = io["mask"].astype(bool)
  clean, _ = run(params, io["input_ids"], io["mask"])
  noise = np.where(real, io["input_ids"], random_tokens(3, (B, T)))
  noisy, _ = run(params, noise, io["mask"], np.where(real, np.arange(T), 77))
  assert_array_equal(clean[real], noisy[real])


def test_only_distances_between_positions_matter(params):
  """Rotary embedding: q_m . k_n is a function of m - n (Su et al. 2021, eq. 11)."""
  tokens, position = random_tokens(4, (B, T)), np.broadcast_to(np.arange(T), (B, T))
  here, there, stretched = (run(params, tokens, None, p)[0] for p in (position, position + 50, 2 * position))
  assert_allclose(here, there, atol=1e-4)
  assert np.abs(here - stretched).max() > 1e-2


# Checkpoints and configs


@pytest.fixture
def folder(tmp_path) -> Path:
  return Path(shutil.copytree(FOLDER, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_listed_together(folder):
  def change(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((56, 32), np.float32)
    tensors["model.norm.weight"] = np.zeros((33,), np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 16), np.float32)  # transposed

  rewrite(folder, change)
  with pytest.raises(UserError) as error:
    load(folder)
  for line in (
    "model.layers.1.mlp.up_proj.weight is missing",
    "model.layers.3.mlp.up_proj.weight is not part of this architecture",
    "model.norm.weight has shape (33,), (32,) is needed",
    "model.layers.0.self_attn.k_proj.weight has shape (32, 16), (16, 32) is needed",
  ):
    assert line in str(error.value)


def test_a_long_list_of_problems_is_cut(folder):
  rewrite(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:11]])
  with pytest.raises(UserError, match="and 3 more"):
    load(folder)


def test_what_a_checkpoint_may_carry_besides(folder, params):
  """Old checkpoints hold rotary tables, and some the tied head a second time; both are ignored."""

  def change(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

  rewrite(folder, change)
  jax.tree.map(assert_array_equal, load(folder), params)


def test_an_untied_head_is_needed_and_read(folder):
  hf = read_config(folder) | {"tie_word_embeddings": False}
  (folder / "config.json").write_text(json.dumps(hf))
  with pytest.raises(UserError, match="lm_head.weight is missing"):
    load(folder)
  rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
  params = load(folder)
  assert_array_equal(head(params, model_config(hf)).matrix, np.asarray(params["embedding"]) + 1)


@pytest.mark.parametrize("kept", [0.6, 0.999])
def test_a_truncated_file_names_the_tensor_that_it_lost(folder, kept):
  path = folder / "model.safetensors"
  whole_file = path.read_bytes()
  header_bytes = int.from_bytes(whole_file[:8], "little")
  header = json.loads(whole_file[8 : 8 + header_bytes])
  header.pop("__metadata__", None)
  cut = int(len(whole_file) * kept)
  ends = {name: 8 + header_bytes + tensor["data_offsets"][1] for name, tensor in header.items()}
  lost = min((name for name, end in ends.items() if end > cut), key=ends.get)
  path.write_bytes(whole_file[:cut])
  with pytest.raises(UserError, match=f"cut short: tensor {lost} ends at byte {ends[lost]:,} of {cut:,}"):
    load(folder)


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_file_cut_inside_its_header_is_cut_short_too(folder, kept):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(UserError, match=f"model.safetensors cannot be read.*cut short: {kept} bytes"):
    load(folder)


def test_weights_in_several_files_and_in_bfloat16(folder, params):
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
  for file in set(where.values()):
    save_file({n: t.astype(jnp.bfloat16) for n, t in tensors.items() if where[n] == file}, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  for dtype in ("float32", "bfloat16"):
    loaded = load(folder, dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {dtype}
    jax.tree.map(assert_array_equal, loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params))
  (folder / "model-1.safetensors").unlink()
  with pytest.raises(UserError, match="model-1.safetensors is missing"):
    load(folder)
