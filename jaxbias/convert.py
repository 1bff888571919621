"""`convert`: a model, or a trained run on top of its base, as a Hugging Face folder or as PEFT's adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from jaxbias import provenance
from jaxbias.errors import UserError
from jaxbias.files import check_new
from jaxbias.models import adapted as adapted_sources
from jaxbias.models import language_model
from jaxbias.models.adapted import Adapted
from jaxbias.models.checkpoints import read_config
from jaxbias.models.config import ModelConfig
from jaxbias.models.export import export_model
from jaxbias.models.families import model_config
from jaxbias.models.peft import save_adapters
from jaxbias.models.sources import ModelFolder
from jaxbias.report import results as read
from jaxbias.report.card import card


def convert(
  source: str | None, run: Path | None, to: str, out: Path, dtype: str | None = None, command: str = ""
) -> list[str]:
  """Write `out` ("hf": adapters merged, "peft": adapters alone) with a model card; returns what a user should know.

  source: as everywhere, default the run's own base. dtype: of the "hf" weights, default the base's own.
  Raises UserError before anything is computed where `out` has something in it or the arguments do not fit together.
  """
  check_new(out)
  adapted = _adapted(source, run)
  base = source if source and (run or not adapted) else adapted.base
  if to == "peft" and dtype:
    raise UserError("--dtype is for --to=hf; the factors of an adapter are written as they were trained, in float32.")
  if to == "peft" and not adapted:
    raise UserError(f"{source} has no adapters of its own to write; name a run with --run, or ask for --to=hf.")
  folder = adapted_sources.base_folder(base)
  hf = read_config(folder.path)
  config, dtype = model_config(hf), dtype or _own_dtype(hf)
  results, made = _comparison(adapted)
  notes = _notes(adapted, base, folder, results)
  about = _about(adapted, base, folder, config, dtype, command) | {"notes": notes, "provenance": made}
  trained = adapted.read(config) if adapted else {}
  if to == "peft":
    if "lora" not in trained or "params" in trained:
      raise UserError(f"{adapted.folder} trained parameters of the base itself (train.base), which an adapter cannot "
                      "hold; ask for --to=hf.")  # fmt: skip
    about |= {"library": "peft", "dtype": "float32"}
    save_adapters(out, base, config, trained, {"README.md": card(about, results)})
    return notes
  model = language_model.load(base, "float32" if adapted else dtype)
  params = language_model.exchange(model.params, trained.get("params", {}), adapted.factor if adapted else 1.0)
  adapters = trained if "lora" in trained else None
  export_model(out, folder.path, config, params, adapters, dtype, texts={"README.md": card(about, results)})
  return notes


def _adapted(source: str | None, run: Path | None) -> Adapted | None:
  if source is None and run is None:
    raise UserError("name what to convert: a model with --model, a trained run with --run, or both.")
  found = adapted_sources.find(run or source)
  if run and not found:
    inside = sorted(path.parent.name for path in run.glob("*/checkpoints")) if run.is_dir() else []
    hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
    raise UserError(f"{run} is not the folder of a training run: it has no checkpoints{hint}.")
  return found


def _own_dtype(hf: Mapping) -> str:
  """bfloat16 stays bfloat16; everything else fits into float32."""
  return "bfloat16" if (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16" else "float32"


def _comparison(adapted: Adapted | None) -> tuple[dict | None, dict]:
  """results.json and the provenance of the comparison that a run belongs to, where they are there."""
  if not adapted or not adapted.run:
    return None, {}
  workdir = adapted.folder.resolve().parent
  results = read.load(workdir) if (workdir / "results.json").is_file() else None
  about = workdir / "provenance.json"
  return results, json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}


def _notes(adapted: Adapted | None, source: str, base: ModelFolder, results: Mapping | None) -> list[str]:
  notes = []
  to_its_end = adapted and adapted.run and not adapted.run.get("control", {}).get("name")  # a controller stops earlier
  if to_its_end and adapted.step < adapted.run["train"]["steps"]:
    notes.append(f"the run is at step {adapted.step} of {adapted.run['train']['steps']}: its training did not finish.")
  trained_on = results["model"].get("fingerprint") if results else None
  if trained_on not in (None, base.fingerprint) and not adapted_sources.find(source):
    notes.append(f"the adapters were trained on other weights ({results['model'].get('source')}); the table is about "
                 "those.")  # fmt: skip
  return notes


def _about(adapted: Adapted | None, base: str, folder: ModelFolder, config: ModelConfig, dtype: str, command: str):
  about = {"library": "transformers", "base": base, "name": folder.name, "fingerprint": folder.fingerprint,
           "causal": config.causal, "dtype": dtype, "command": command}  # fmt: skip
  if not adapted:
    return about | {"provenance": {"versions": provenance.versions()}}
  run = adapted.run
  variant = run.get("variant")
  return about | {
    "run": adapted.folder.resolve().name, "variant": variant, "seed": run.get("seed"), "step": adapted.step,
    "steps": run.get("train", {}).get("steps"), "losses": run["variants"][variant]["losses"] if variant else None,
  }  # fmt: skip
