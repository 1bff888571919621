"""A whole comparison in seconds, for the tests that run one: a tiny model, a small StereoSet file, a config of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxbias.data.tokens import tokenizer_of_metadata
from tests.conftest import BYTE_LEVEL, TOKENS

REPOSITORY = Path(__file__).resolve().parents[2]
TERMS = {"gender": ["he", "she", "they", "mother", "father", "aunt"], "race": ["cat", "cattle", "bat", "rat", "hat", "mat"]}
CONFIG = '''"""A tiny model, a few triples, a few steps."""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.model = {model!r}
  c.data.source = {data!r}
  c.lora.rank, c.lora.targets = 2, ("q", "down")
  c.train.steps, c.train.warmup_steps, c.train.checkpoint_every = 6, 1, 2
  c.train.rows = {{"forget": 4, "retain": 4, "general": 2}}
  c.train.learning_rate = 1e-2
  c.eval.bootstrap_draws = 50
  c.compare = {variants!r}
  with c.unlocked():
    c.variants = {{name: methods.variant(name) for name in c.compare}}
  return c
'''


def tiny_model(folder: Path, positions: int = 256) -> Path:
  """A Llama of two layers with random weights, in Hugging Face's layout; every byte is a token."""
  D, F, heads, V = 16, 32, 2, len(TOKENS)
  shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  for layer in ("model.layers.0.", "model.layers.1."):
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": (D, F)}
    shapes |= {f"{layer}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
  rng = np.random.default_rng(0)
  weights = {name: rng.normal(size=shape) * shape[-1] ** -0.5 for name, shape in shapes.items() if len(shape) == 2}
  weights |= {name: np.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
  folder.mkdir()
  save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": D,
    "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads,
    "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2,
  }))  # fmt: skip
  tokenizer_of_metadata({f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}, "tiny").save(
    str(folder / "tokenizer.json")
  )
  return folder


def stereoset(path: Path, filler: str = "") -> Path:
  """Two triples for each of a dozen terms, in StereoSet's own format; `filler` lengthens every sentence."""
  records = []
  for domain, terms in TERMS.items():
    for number, (term, verb) in enumerate((term, verb) for term in terms for verb in ("sat", "ran")):
      fillings = {"stereotype": "the cat", "anti-stereotype": "a hat", "unrelated": "12"}
      records.append({
        "id": f"{domain}{number}", "bias_type": domain, "target": term, "context": f"{filler}{term} {verb} on BLANK.",
        "sentences": [{"id": f"{domain}{number}{label}", "gold_label": label,
                       "sentence": f"{filler}{term} {verb} on {filling}."} for label, filling in fillings.items()],
      })  # fmt: skip
  path.write_text(json.dumps({"version": "1.0", "data": {"intrasentence": records, "intersentence": []}}))
  return path


def tiny_config(folder: Path, variants: Sequence[str] = ("sft", "npo"), extra: str = "", **model) -> Path:
  """A config file beside its model and its data; `extra` is put before the return, indented by the caller's need."""
  (folder / "tiny.py").write_text(CONFIG.format(
    model=str(tiny_model(folder / "model", **model)), data=str(stereoset(folder / "stereoset.json")),
    variants=tuple(variants)).replace("  return c", f"{extra}  return c"))  # fmt: skip
  return folder / "tiny.py"


def command(*arguments: object) -> list[str]:
  return [sys.executable, "-m", "jaxbias", *map(str, arguments)]


def environment(cache: Path) -> dict[str, str]:
  return os.environ | {"JAXBIAS_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}


def run(cache: Path, *arguments: object) -> subprocess.CompletedProcess:
  """`python -m jaxbias ARGUMENTS`, with its output."""
  return subprocess.run(command(*arguments), cwd=REPOSITORY, env=environment(cache), capture_output=True, text=True)
