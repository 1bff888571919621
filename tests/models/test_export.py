"""Our parameters as a Hugging Face folder: bit for bit what was read, fused tensors whole again, adapters merged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from jaxbias.errors import UserError
from jaxbias.files import new_folder
from jaxbias.mesh import make_mesh
from jaxbias.models.checkpoints import load_params, read_config
from jaxbias.models.config import ModelConfig
from jaxbias.models.export import export_model
from jaxbias.models.families import model_config
from jaxbias.models.language_model import layout_for
from jaxbias.models.lora import LoraConfig, init_lora, merge
from jaxbias.models.transformer import Transformer, abstract_variables

ORACLES = Path(__file__).parents[1] / "oracles" / "models"
FAMILIES = sorted(path.name for path in ORACLES.iterdir())


def load(folder: Path, dtype: str = "float32") -> tuple[ModelConfig, dict]:
  config = model_config(read_config(folder))
  boxed = abstract_variables(Transformer(config))
  abstract, layout = nn.unbox(boxed), layout_for(config, make_mesh({"data": -1}))
  shardings = layout.shardings(abstract, nn.get_partition_spec(boxed))
  return config, load_params(folder, config, abstract, shardings, dtype)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
  return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(ours, theirs) -> None:
  jax.tree.map(assert_array_equal, ours, theirs)


def random_adapters(config: ModelConfig, params: dict, targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down"),
                    scale=None) -> dict:  # fmt: skip
  """Both factors away from zero, a rank of 2; `scale` of each layer, default 1.5."""
  rng = np.random.default_rng(1)
  adapters = init_lora(jax.random.key(0), params, LoraConfig(rank=2, targets=targets))
  factors = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), adapters)
  scale = jnp.full(config.num_layers, 1.5) if scale is None else jnp.asarray(scale, jnp.float32)
  return {"lora": factors, "lora_scale": {"scale": scale}}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_is_written_bit_for_bit(family, tmp_path):
  """Names, shapes, dtypes and bytes of the original tensors, with and without an index of several files."""
  source = ORACLES / family
  original = load_file(source / "model.safetensors")
  config, params = load(source)
  for out, limit in ((tmp_path / "one", 10**9), (tmp_path / "several", 40_000)):
    export_model(out, source, config, params, shard_bytes=limit)
    written = tensors_of(out)
    assert written.keys() == original.keys()
    for name, tensor in original.items():
      assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
      assert written[name].tobytes() == tensor.tobytes(), name
    assert read_config(out) == read_config(source)
    assert load(out)[0] == config
    same(load(out)[1], params)


def test_files_stay_below_the_limit_and_are_indexed_in_the_order_of_layers(tmp_path):
  config, params = load(ORACLES / "llama")
  export_model(tmp_path / "out", ORACLES / "llama", config, params, shard_bytes=30_000)
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert [path.name for path in files][0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
  held = [load_file(path) for path in files]
  assert all(sum(t.nbytes for t in tensors.values()) <= 30_000 or len(tensors) == 1 for tensors in held)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert index["weight_map"] == {name: path.name for path, tensors in zip(files, held, strict=True) for name in tensors}
  assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held for t in tensors.values())
  layer = lambda file: [int(name.split(".")[2]) for name in file if ".layers." in name]
  assert [i for file in held for i in sorted(set(layer(file)))] == sorted(i for file in held for i in set(layer(file)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "albert"])
def test_adapters_are_merged_as_merge_does(family, tmp_path):
  config, params = load(ORACLES / family)
  adapters = random_adapters(config, params)
  export_model(tmp_path / "out", ORACLES / family, config, params, adapters)
  merged = merge(params, adapters["lora"], adapters["lora_scale"])
  ours, theirs = flatten_dict(load(tmp_path / "out")[1]), flatten_dict(merged)
  for path, leaf in theirs.items():
    assert_allclose(ours[path], leaf, rtol=0, atol=1e-6, err_msg=str(path))  # a sum of two products, in either order
    adapted = path[-1] == "kernel" and (*path[:-1], "a") in flatten_dict(adapters["lora"])
    assert np.array_equal(leaf, flatten_dict(params)[path]) != adapted
  export_model(tmp_path / "again", ORACLES / family, config, merged)
  same(load(tmp_path / "again")[1], merged)


def test_a_merged_update_is_what_the_equation_says(tmp_path):
  config, params = load(ORACLES / "gpt2")
  adapters = random_adapters(config, params, ("v",), scale=[1.0, 0.0, 2.0])
  export_model(tmp_path / "out", ORACLES / "gpt2", config, params, adapters)
  before, after = (tensors_of(folder) for folder in (ORACLES / "gpt2", tmp_path / "out"))
  a, b = (np.asarray(adapters["lora"]["layers"]["attention"]["v"][factor]) for factor in "ab")
  D = config.hidden_size
  for i, scale in enumerate((1.0, 0.0, 2.0)):
    name = f"transformer.h.{i}.attn.c_attn.weight"
    assert_array_equal(after[name][:, : 2 * D], before[name][:, : 2 * D])
    assert_allclose(after[name][:, 2 * D :], before[name][:, 2 * D :] + scale * a[i] @ b[i], atol=1e-6)
  assert {name for name in before if not np.array_equal(before[name], after[name])} == {
    f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 2)}  # fmt: skip


def test_layers_that_share_weights_cannot_be_scaled_apart(tmp_path):
  config, params = load(ORACLES / "albert")
  with pytest.raises(UserError, match="layers that share their weights have different lora_scale"):
    export_model(tmp_path / "out", ORACLES / "albert", config, params, random_adapters(config, params, scale=[1, 1, 2]))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_bfloat16_is_said_under_the_key_that_the_config_uses(key, tmp_path):
  source = shutil.copytree(ORACLES / "llama", tmp_path / "source")
  hf = {name: value for name, value in read_config(source).items() if name != "dtype"}
  hf |= {key: "float32"} if key else {}
  (source / "config.json").write_text(json.dumps(hf))
  config, params = load(source)
  export_model(tmp_path / "out", source, config, params, dtype="bfloat16")
  assert read_config(tmp_path / "out") == hf | {key or "torch_dtype": "bfloat16"}
  assert {str(tensor.dtype) for tensor in tensors_of(tmp_path / "out").values()} == {"bfloat16"}
  same(load(tmp_path / "out")[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))


def test_what_the_architecture_has_and_we_do_not_use_is_carried_over(tmp_path):
  source = shutil.copytree(ORACLES / "bert", tmp_path / "source")
  tensors, rng = load_file(source / "model.safetensors"), np.random.default_rng(0)
  pooler = {"bert.pooler.dense.weight": rng.normal(size=(32, 32)).astype(np.float32),
            "bert.embeddings.position_ids": np.arange(128)[None]}  # fmt: skip
  again = {"cls.predictions.decoder.bias": tensors["cls.predictions.bias"]}
  (source / "model.safetensors").unlink()
  save_file(tensors | pooler | again, source / "model.safetensors")
  for name in ("tokenizer.json", "vocab.txt", "LICENSE", "pytorch_model.bin", "notes.md"):
    (source / name).write_text(name)
  config, params = load(source)
  export_model(tmp_path / "out", source, config, params, texts={"README.md": "a card"})
  written = tensors_of(tmp_path / "out")
  assert written.keys() == (tensors | pooler).keys()
  for name, tensor in pooler.items():
    assert written[name].dtype == tensor.dtype
    assert_array_equal(written[name], tensor)
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "LICENSE", "README.md"}  # fmt: skip


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
  config, params = load(ORACLES / "llama")
  (tmp_path / "kept").write_text("mine")
  with pytest.raises(UserError, match="exists already and is not an empty folder; give a new one"):
    export_model(tmp_path, ORACLES / "llama", config, params)
  with pytest.raises(UserError, match="exists already"):
    export_model(tmp_path / "kept", ORACLES / "llama", config, params)
  assert [path.name for path in tmp_path.iterdir()] == ["kept"]
  (tmp_path / "empty").mkdir()
  export_model(tmp_path / "empty", ORACLES / "llama", config, params)
  assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_and_leave_nothing(value, tmp_path):
  config, params = load(ORACLES / "phi3")
  flat = flatten_dict(params)
  kernel = flat["layers", "attention", "k", "kernel"]
  flat["layers", "attention", "k", "kernel"] = kernel.at[1, 2, 3].set(value)
  with pytest.raises(UserError, match=r"tensor model.layers.1.self_attn.qkv_proj.weight holds NaN or infinity"):
    export_model(tmp_path / "out", ORACLES / "phi3", config, unflatten_dict(flat))
  assert not list(tmp_path.iterdir())


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
  config, params = load(ORACLES / "llama")
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
  with pytest.raises(UserError, match="MB are needed in .* and 0 MB are free; make room"):
    export_model(tmp_path / "out", ORACLES / "llama", config, params)
  assert not list(tmp_path.iterdir())


def test_a_new_folder_has_its_name_only_when_it_is_whole(tmp_path):
  with new_folder(tmp_path / "a" / "out") as work:
    (work / "part").write_text("1")
    assert not (tmp_path / "a" / "out").exists()
  assert (tmp_path / "a" / "out" / "part").read_text() == "1" and len(os.listdir(tmp_path / "a")) == 1
  with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b") as work:
    raise KeyboardInterrupt
  assert os.listdir(tmp_path) == ["a"]
