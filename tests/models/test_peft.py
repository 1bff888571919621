"""Adapters in PEFT's format: out and in again bit for bit, read as peft's rules say, refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from jaxbias.errors import UserError
from jaxbias.models import peft
from jaxbias.models.checkpoints import read_config
from jaxbias.models.families import model_config
from jaxbias.models.lora import merge
from jaxbias.models.transformer import Transformer, head
from tests.models.test_export import FAMILIES, ORACLES, load, random_adapters, same

# What peft 0.21 writes for a plain LoRA, besides what the tests change.
THEIRS = {
  "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": {"base_model_class": "X"},
  "base_model_name_or_path": "org/name", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
  "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
  "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
  "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
  "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
  "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
  "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"], "target_parameters": None, "task_type": None,
  "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
  "velora_config": None,
}  # fmt: skip


def adapted(family: str, targets=None, scale=None) -> tuple:
  config, params = load(ORACLES / family)
  have = {path[-2] for path in flatten_dict(params) if path[0] == "layers" and path[-1] == "kernel"}
  return config, params, random_adapters(config, params, targets or tuple(sorted(have)), scale)


def written(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
  return json.loads((folder / peft.CONFIG).read_text()), load_file(folder / peft.WEIGHTS)


def made_by_peft(folder: Path, modules: dict[str, tuple[np.ndarray, np.ndarray]], **changes) -> Path:
  """An adapter folder as peft leaves it: {module: (A, B)}."""
  folder.mkdir()
  (folder / peft.CONFIG).write_text(json.dumps(THEIRS | changes))
  save_file({f"base_model.model.{name}.lora_{kind}.weight": x
             for name, pair in modules.items() for kind, x in zip("AB", pair, strict=True)},
            folder / peft.WEIGHTS, {"format": "pt"})  # fmt: skip
  return folder


def drawn(rank: int, fan_in: int, fan_out: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((rank, fan_in), (fan_out, rank)))


def update(adapters: dict, name: str, layer: int, room: str = "attention") -> np.ndarray:
  """scale * A B of one projection, [in, out]."""
  a, b = (np.asarray(adapters["lora"]["layers"][room][name][factor][layer]) for factor in "ab")
  return float(adapters["lora_scale"]["scale"][layer]) * a @ b


# There and back


@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_again_is_the_same_bit_for_bit(family, tmp_path):
  config, _, adapters = adapted(family)
  peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  same(peft.load_adapters(tmp_path / "out", config), adapters)


@pytest.mark.parametrize("family,targets", [
  ("llama", ("q", "down")), ("gpt2", ("q",)), ("gpt_neox", ("k", "v", "up")), ("phi3", ("up", "v")),
  ("bert", ("down",)),
])  # fmt: skip
def test_layers_with_a_scale_of_zero_are_left_out(family, targets, tmp_path):
  config, _, adapters = adapted(family, targets, scale=[0.75, 0.0, 0.75])
  peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  hf, tensors = written(tmp_path / "out")
  assert {int(re.search(r"\.(\d+)\.", name)[1]) for name in tensors} == {0, 2}
  assert hf["layers_to_transform"] == ([0, 2] if family != "bert" else None)
  back = peft.load_adapters(tmp_path / "out", config)
  assert_array_equal(back["lora_scale"]["scale"], adapters["lora_scale"]["scale"])
  kept = jax.tree.map(lambda leaf: leaf.at[1].set(0), adapters["lora"])
  same(back["lora"], kept)


@pytest.mark.parametrize("scale", [[0.5, 1.0, 1.37], [2 / 3, 2 / 3, 1e-3]])
def test_scales_that_differ_become_alphas_that_do_exactly(scale, tmp_path):
  config, _, adapters = adapted("llama", ("q", "v"), scale)
  peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  same(peft.load_adapters(tmp_path / "out", config), adapters)


def test_a_fresh_adapter_survives_too(tmp_path):
  """Its b is zero: what block belongs to whom cannot be seen in the tensors."""
  config, _, adapters = adapted("gpt2", ("q", "v"))
  for name in ("q", "v"):
    adapters["lora"]["layers"]["attention"][name]["b"] *= 0
  peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  same(peft.load_adapters(tmp_path / "out", config), adapters)


# What is in the folder


def test_the_config_is_short_where_short_is_exact(tmp_path):
  config, _, adapters = adapted("llama", ("q", "down"))
  peft.save_adapters(tmp_path / "out", "hf:org/name@v1", config, adapters)
  hf, tensors = written(tmp_path / "out")
  assert hf["target_modules"] == ["mlp.down_proj", "self_attn.q_proj"] and hf["layers_to_transform"] is None
  assert (hf["r"], hf["lora_alpha"], hf["rank_pattern"], hf["alpha_pattern"]) == (2, 3, {}, {})
  assert (hf["base_model_name_or_path"], hf["revision"], hf["task_type"]) == ("org/name", "v1", "CAUSAL_LM")
  assert not hf["fan_in_fan_out"] and peft.base_of(tmp_path / "out") == "org/name@v1"
  a, b = (tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{kind}.weight"] for kind in "AB")
  assert (a.shape, b.shape) == ((2, config.mlp_size), (config.hidden_size, 2))
  assert_allclose(1.5 * (b @ a).T, update(adapters, "down", 1, "mlp"), atol=1e-6)


def test_a_name_that_would_match_another_module_is_written_whole(tmp_path):
  """BERT's output.dense is the end of attention.output.dense as well."""
  config, _, adapters = adapted("bert", ("down",))
  peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  whole = [f"bert.encoder.layer.{i}.output.dense" for i in range(3)]
  assert written(tmp_path / "out")[0]["target_modules"] == whole
  config, _, adapters = adapted("bert", ("down", "o"))
  peft.save_adapters(tmp_path / "both", "org/name", config, adapters)
  assert written(tmp_path / "both")[0]["target_modules"] == ["attention.output.dense", "output.dense"]


@pytest.mark.parametrize("family,module", [
  ("gpt2", "transformer.h.1.attn.c_attn"), ("phi3", "model.layers.1.self_attn.qkv_proj"),
  ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
])  # fmt: skip
def test_a_fused_module_gets_one_adapter_of_the_sum_of_ranks(family, module, tmp_path):
  config, params, adapters = adapted(family, ("q", "v"))
  peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  hf, tensors = written(tmp_path / "out")
  a, b = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
  assert (hf["r"], hf["lora_alpha"], hf["fan_in_fan_out"]) == (4, 6, family == "gpt2") and len(a) == 4
  fused = 6 / 4 * (b @ a).T  # [in, out]
  for part in peft.modules(config)[module.replace(".1.", ".{}.")]:
    at = part.rows.at(np.arange(part.rows.sizes[part.rows.part]))
    expected = update(adapters, part.path[-1], 1) if part.path[-1] != "k" else 0
    assert_allclose(fused[:, at], np.broadcast_to(expected, fused[:, at].shape), atol=1e-6)


def test_what_cannot_be_written(tmp_path):
  config, _, adapters = adapted("llama", ("q",), scale=[0, 0, 0])
  with pytest.raises(UserError, match="no layer has an adapter"):
    peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  config, _, adapters = adapted("llama", ("q",))
  q = adapters["lora"]["layers"]["attention"]["q"]
  q["b"] = q["b"].at[2, 0, 0].set(np.nan)
  with pytest.raises(UserError, match="model.layers.2.self_attn.q_proj holds NaN"):
    peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  config, _, adapters = adapted("albert", ("q",), scale=[1, 2, 1])
  with pytest.raises(UserError, match="layers that share their weights"):
    peft.save_adapters(tmp_path / "out", "org/name", config, adapters)
  assert not list(tmp_path.iterdir())


# What peft made


def test_patterns_of_rank_and_alpha_are_read_by_pefts_rule(tmp_path):
  config, _ = load(ORACLES / "llama")
  D, F = config.hidden_size, config.mlp_size
  q0, q1, up = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"))
  made = {q0: drawn(4, D, D, 0), q1: drawn(2, D, D, 1), up: drawn(4, D, F, 2)}
  patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"up_proj": 3}}
  adapters = peft.load_adapters(made_by_peft(tmp_path / "a", made, **patterns), config)
  for where, module, scale in ((("q", 0), q0, 8 / 4), (("q", 1), q1, 8 / 2), (("up", 0, "mlp"), up, 3 / 4)):
    a, b = made[module]
    assert_allclose(update(adapters, *where), scale * (b @ a).T, rtol=1e-5, atol=1e-5)
  assert float(adapters["lora_scale"]["scale"][2]) == 0
  assert adapters["lora"]["layers"]["attention"]["q"]["a"].shape == (3, D, 4)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(tmp_path):
  config, _ = load(ORACLES / "llama")
  made = {"model.layers.0.self_attn.q_proj": drawn(4, 32, 32)}
  adapters = peft.load_adapters(made_by_peft(tmp_path / "a", made, use_rslora=True), config)
  assert adapters["lora_scale"]["scale"].tolist() == [4.0, 0.0, 0.0]


def test_one_adapter_of_a_fused_module_serves_its_parts(tmp_path):
  """c_attn's update falls apart into those of q, k and v: the same A, each its own rows of B."""
  config, _ = load(ORACLES / "gpt2")
  D = config.hidden_size
  a, b = drawn(4, D, 3 * D)
  adapters = peft.load_adapters(made_by_peft(tmp_path / "a", {"transformer.h.2.attn.c_attn": (a, b)}), config)
  for i, name in enumerate("qkv"):
    assert_allclose(update(adapters, name, 2), 2.0 * (b[i * D : (i + 1) * D] @ a).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change,said", [
  ({"use_dora": True}, "`use_dora` = true"), ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
  ({"bias": "lora_only"}, '`bias` = "lora_only"'), ({"init_lora_weights": "pissa"}, '`init_lora_weights` = "pissa"'),
  ({"layer_replication": [[0, 2]]}, "`layer_replication`"), ({"target_parameters": ["x"]}, "`target_parameters`"),
  ({"trainable_token_indices": [1]}, "`trainable_token_indices`"), ({"lora_bias": True}, "`lora_bias`"),
  ({"an_option_of_tomorrow": True}, "`an_option_of_tomorrow`"), ({"peft_type": "IA3"}, "not about a LoRA adapter"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(change, said, tmp_path):
  config = model_config(read_config(ORACLES / "llama"))
  folder = made_by_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": drawn(4, 32, 32)}, **change)
  with pytest.raises(UserError, match=re.escape(said)):
    peft.load_adapters(folder, config)


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path):
  config = model_config(read_config(ORACLES / "llama"))
  a, b = drawn(4, 32, 32)
  made = {"model.layers.0.self_attn.q_proj": (a[:3], b), "model.layers.1.self_attn.k_proj": (a, b), "lm_head": (a, b)}
  folder = made_by_peft(tmp_path / "a", made)
  tensors = load_file(folder / peft.WEIGHTS)
  del tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"]
  save_file(tensors, folder / peft.WEIGHTS)
  with pytest.raises(UserError) as error:
    peft.load_adapters(folder, config)
  for line in (
    "lm_head.lora_A.weight is not of a module that can be adapted here",
    "q_proj.lora_A.weight has shape (3, 32), (4, 32) is needed",
    "k_proj.lora_A.weight is missing",
    "k_proj.lora_B.weight has shape (32, 4), (16, 4) is needed",
  ):
    assert line in str(error.value)


def test_damaged_and_pickled_adapters_are_refused(tmp_path):
  config = model_config(read_config(ORACLES / "llama"))
  a, b = drawn(4, 32, 32)
  folder = made_by_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (a, np.full_like(b, np.inf))})
  with pytest.raises(UserError, match="q_proj.lora_B.weight holds NaN or infinity"):
    peft.load_adapters(folder, config)
  weights = folder / peft.WEIGHTS
  weights.write_bytes(weights.read_bytes()[:-5])
  with pytest.raises(UserError, match="cut short: tensor"):
    peft.load_adapters(folder, config)
  weights.rename(folder / "adapter_model.bin")
  with pytest.raises(UserError, match="has adapter_model.bin but no .*: pickles are refused.*save_pretrained"):
    peft.load_adapters(folder, config)
  (folder / peft.CONFIG).unlink()
  with pytest.raises(UserError, match="has no adapter_config.json"):
    peft.load_adapters(folder, config)


# peft itself, where it is installed


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "bert", "albert"])
@pytest.mark.parametrize("part", ["all", "some"])
def test_peft_loads_it_and_gives_the_same_logits(family, part, tmp_path):
  torch, transformers, library = map(pytest.importorskip, ("torch", "transformers", "peft"))
  scale = None if part == "all" or family == "albert" else [0.75, 0.0, 1.25]
  config, params, adapters = adapted(family, None if part == "all" else ("q", "down"), scale)
  peft.save_adapters(tmp_path / "out", str(ORACLES / family), config, adapters)
  auto = transformers.AutoModelForCausalLM if config.causal else transformers.AutoModelForMaskedLM
  base = auto.from_pretrained(ORACLES / family, attn_implementation="eager", dtype=torch.float32)
  model = library.PeftModel.from_pretrained(base, tmp_path / "out").eval()
  with np.load(ORACLES / family / "io.npz") as stored:
    tokens, mask = stored["input_ids"], stored["mask"]
  with torch.no_grad():
    theirs = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()
  merged = merge(params, adapters["lora"], adapters["lora_scale"])
  position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = Transformer(config).apply({"params": merged}, tokens, mask, position)
  top = head(merged, config)
  ours = np.asarray(hidden @ top.matrix.T + (0 if top.bias is None else top.bias))
  assert_allclose(ours[mask > 0], theirs[mask > 0], atol=1e-4)
