"""A whole comparison in seconds, for the tests that run one: a tiny model, a small StereoSet file, a config of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxbias.data.tokens import tokenizer_of_metadata
from tests.conftest import BYTE_LEVEL, TOKENS

REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = ("sft-seed0", "sft-seed1", "npo-seed0", "npo-seed1")
TERMS = {"gender": ("he", "she", "they", "aunt", "son", "man"), "race": ("cat", "cow", "bat", "rat", "hat", "mat")}
CONFIG = """from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.model = {model!r}
  c.data.source = {data!r}
  c.lora.rank, c.lora.targets = 2, ("q", "down")
  c.train.steps, c.train.warmup_steps, c.train.checkpoint_every = 6, 1, 3
  c.train.rows = {{"forget": 4, "retain": 4, "general": 2}}
  c.train.learning_rate = 1e-2
  c.eval.bootstrap_draws = 50
  c.seeds = (0, 1)
  c.compare = ("sft", "npo")
  with c.unlocked():
    c.variants = {{name: methods.variant(name) for name in c.compare}}
  return c
"""


def tiny_model(folder: Path, positions: int = 256) -> Path:
  """A Llama of two layers with random weights, in Hugging Face's layout; nearly every byte is a token."""
  D, F, V = 16, 32, len(TOKENS)
  shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  for layer in ("model.layers.0.", "model.layers.1."):
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": (D, F)}
    shapes |= {f"{layer}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape) * shape[1] ** -0.5 if len(shape) == 2 else np.ones(shape)
  folder.mkdir(parents=True)
  save_file({name: draw(shape).astype(np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
  }))  # fmt: skip
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  tokenizer_of_metadata(metadata, "tiny").save(str(folder / "tokenizer.json"))
  return folder


def stereoset(path: Path) -> Path:
  """Two triples for each of a dozen terms, in StereoSet's own format."""
  fillings = {"stereotype": "the cat", "anti-stereotype": "a hat", "unrelated": "12"}
  records = []
  for domain, terms in TERMS.items():
    for term, verb in ((term, verb) for term in terms for verb in ("sat", "ran")):
      sentence = lambda label, term=term, verb=verb: f"{term} {verb} on {fillings[label]}."
      records.append({
        "id": f"{term}-{verb}", "bias_type": domain, "target": term, "context": f"{term} {verb} on BLANK.",
        "sentences": [{"id": f"{term}-{verb}-{label}", "gold_label": label, "sentence": sentence(label)}
                      for label in fillings],
      })  # fmt: skip
  path.write_text(json.dumps({"version": "1.0", "data": {"intrasentence": records, "intersentence": []}}))
  return path


@dataclass(frozen=True)
class Workplace:
  """Model, data, config and cache side by side; what takes long is done once in a session of pytest."""

  folder: Path

  @classmethod
  def of(cls, tmp_path_factory) -> Workplace:
    place = cls(tmp_path_factory.getbasetemp() / "tiny")
    if not place.folder.exists():
      model, data = tiny_model(place.folder / "model"), stereoset(place.folder / "stereoset.json")
      place.config.write_text(CONFIG.format(model=str(model), data=str(data)))
    return place

  @property
  def config(self) -> Path:
    return self.folder / "tiny.py"

  @property
  def cache(self) -> Path:
    return self.folder / "cache"

  def start(self, *arguments: object, **how) -> subprocess.Popen:
    """`python -m jaxbias ARGUMENTS`, left running."""
    environment = os.environ | {"JAXBIAS_CACHE": str(self.cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxbias", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)

  def run(self, *arguments: object) -> subprocess.CompletedProcess:
    """`python -m jaxbias ARGUMENTS` to its end, with what it said."""
    process = self.start(*arguments)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

  def compare(self, workdir: Path, config: Path | None = None) -> subprocess.CompletedProcess:
    return self.run("compare", "--config", config or self.config, "--workdir", workdir)

  def finished(self) -> Path:
    """The work folder of a comparison that nobody interrupted."""
    workdir = self.folder / "finished"
    if not workdir.exists():
      done = self.compare(workdir)
      assert done.returncode == 0, done.stderr
    return workdir


def read(path: Path) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TIMES = ("seconds", "wall_seconds", "created", "command", "git", "spent", "tokens_per_second", "mfu", "goodput",
         "continued")  # fmt: skip


def untimed(value):
  """A JSON value without what the clock, the command line or a commit meanwhile put there."""
  if isinstance(value, dict):
    return {key: untimed(inner) for key, inner in value.items() if key not in TIMES}
  return [untimed(inner) for inner in value] if isinstance(value, list) else value
