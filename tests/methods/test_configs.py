"""Every file in configs/ can be run as it says: it loads, is valid, and its adapters fit the model that it names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from jaxbias import config as configs
from jaxbias import methods, plan
from jaxbias.losses.registry import parse
from jaxbias.mesh import make_mesh
from jaxbias.train.loop import Trainer

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
GPT2 = Path(__file__).parents[1] / "oracles" / "models" / "gpt2" / "config.json"
GPT2_LARGE = {
  "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024, "n_embd": 1280, "n_layer": 36,
  "n_head": 20,
}  # fmt: skip


def read(path: Path):
  return configs.from_command_line([f"--config={path}"])[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_loads_is_valid_and_names_what_is_registered(path):
  config, told = read(path), ast.get_docstring(ast.parse(path.read_text()))
  assert "python -m jaxbias " in told and f"--config=configs/{path.name}" in told
  if not config.variants:
    return  # it trains nothing
  configs.validate(config)
  for name in configs.compared(config):
    spec = config.variants[name].to_dict()
    assert methods.get(spec["method"]).label and parse(spec["losses"])[0].terms
  assert f"python -m jaxbias compare --config=configs/{path.name} " in told and "--workdir=" in told


@pytest.mark.parametrize("name,shape,numbers", [
  ("biasunlearn_gpt2", GPT2_LARGE, 36 * 4 * 8 * (1280 + 1280)),
  ("biasunlearn_llama", plan.SHAPES["llama-3.1-8b"], 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))),
])  # fmt: skip
def test_the_published_adapters_fit_the_published_models(name, shape, numbers):
  config = read(FOLDER / f"{name}.py")
  model = plan.abstract_model(shape, name, config, make_mesh(config.mesh))
  assert Trainer.of(model, config).num_trainable == numbers


def test_the_step_of_the_published_settings_can_be_planned():
  """With their dropout, on a small model."""
  found = plan.plan(read(FOLDER / "biasunlearn_gpt2.py"), str(GPT2), batch=2, length=16)
  assert set(found.losses) == {"npo", "sft", "kl"} and found.peak > 0
