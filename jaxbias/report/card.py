"""The model card that travels with exported weights: what was measured, how they were made, what they are not for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxbias.report import results as read
from jaxbias.report.tables import Column, escape

USE = {
  "transformers": 'from transformers import {auto}\nmodel = {auto}.from_pretrained("FOLDER")',
  "peft": 'from peft import PeftModel\nfrom transformers import {auto}\n'
          'base = {auto}.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "FOLDER")',
}  # fmt: skip
INTENDED = """Research on social bias and unlearning in language models: comparing objectives, probing what training \
changed, reproducing the table above. Not for decisions about people, and not as evidence that a product is fair."""
LIMITS = (
  "A stereotype score near its ideal says that stereotypes and anti-stereotypes of the data set named here are about "
  "equally likely. Other groups, languages, tasks and prompts were not measured.",
  "What was pushed down is often hidden rather than removed; further training or another prompt can bring it back.",
  "The base model's licence, and its other limits, apply to these weights as well.",
)


def card(about: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
  """README.md. about: library, base, name, fingerprint, causal, dtype, command, provenance (versions, git, created)
  and, of a trained run: run, variant, seed, step, steps, losses, notes. results: the comparison's results.json, where
  there is one."""
  row = next((r for r in read.trained(results) if r["name"] == about.get("variant")), None) if results else None
  blocks = [_front_matter(about), f"# {escape(_title(about, row))}", _what(about)]
  if row:
    blocks += ["## Bias and forgetting", *_table(results, row, about["seed"])]
  elif about.get("run"):
    blocks += ["## Bias and forgetting", "The run's comparison had written no results.json when this was exported, so "
               "nothing is claimed here about its bias."]  # fmt: skip
  blocks += ["## Use", f"```python\n{_snippet(about)}\n```", "### Intended use", INTENDED, "### Limits"]
  blocks.append("\n".join(f"- {limit}" for limit in (*map(escape, about.get("notes", ())), *LIMITS)))
  blocks += ["## How it was made", *_provenance(about, results)]
  return "\n\n".join(blocks) + "\n"


def _front_matter(about: Mapping) -> str:
  base = [f"base_model: {about['base'].removeprefix('hf:')}"] if about["base"].startswith("hf:") else []
  task = "text-generation" if about["causal"] else "fill-mask"
  lines = [f"library_name: {about['library']}", f"pipeline_tag: {task}", *base, "tags: [jaxbias, bias, unlearning]"]
  return "\n".join(("---", *lines, "---"))


def _title(about: Mapping, row: Mapping | None) -> str:
  if not about.get("run"):
    return about["name"]
  label = read.label(row) if row else about["variant"] or about["run"]
  return f"{about['name']}, {label}"


def _what(about: Mapping) -> str:
  kind = {"peft": "A LoRA adapter", "transformers": "A language model"}[about["library"]]
  merged = " with the adapters merged into the weights" if about["library"] == "transformers" else ""
  if not about.get("run"):
    return f"{kind}: {escape(about['name'])} as it is, written by jaxbias in {about['dtype']}."
  if not about["variant"]:
    return f"{kind}: {escape(about['name'])} and the adapter {escape(about['run'])}{merged}, in {about['dtype']}."
  losses = escape(json.dumps(about["losses"]))
  return (f"{kind}{merged}, in {about['dtype']}. Trained by jaxbias from {escape(about['name'])} with the losses "
          f"{losses}: variant `{about['variant']}`, seed {about['seed']}, step {about['step']} of {about['steps']}.")


def _table(results: Mapping, row: Mapping, seed: int) -> list[str]:
  base, seeds = read.base(results) or {}, list(results["seeds"])
  heads = ("metric", "base model", f"this variant, mean of {len(seeds)} seed{'s'[: len(seeds) > 1]}", f"seed {seed}")
  lines = [_line(heads), _line(("---", "---:", "---:", "---:"))]
  for name, metric in results["metrics"].items():
    found = read.estimate(row, name)
    own = found and seed in seeds and len(found.per_seed) == len(seeds)
    lines.append(_line((
      escape(f"{metric.get('label', name)} {Column('', metric, ()).aim}"), _cell(_measured(base, name), metric),
      _cell(found, metric), read.number(found.per_seed[seeds.index(seed)], metric) if own else "n/a",
    )))  # fmt: skip
  data = results["data"]
  said = [f"- Data: {escape(str(data.get('name', '?')))}. In brackets: {escape(results['interval'])}."]
  said += [f"- {escape(metric.get('label', name))}: {escape(metric['help'])}."
           for name, metric in results["metrics"].items() if metric.get("help")]  # fmt: skip
  failed = [f"This variant did not finish: {escape(row['failed'])}"] if row.get("failed") else []
  return [*failed, "\n".join(lines), "\n".join(said)]


def _measured(base: Mapping, metric: str) -> read.Estimate | None:
  """The base's estimate; its own change is zero by definition and has no interval."""
  found = read.estimate(base, metric)
  return found._replace(low=None, high=None) if found and found.low == found.high else found


def _cell(found: read.Estimate | None, metric: Mapping) -> str:
  if found is None:
    return "n/a"
  return escape(f"{read.number(found.value, metric)} {read.interval(found, metric)}".rstrip())


def _line(entries) -> str:
  return f"| {' | '.join(entries)} |"


def _snippet(about: Mapping) -> str:
  auto = "AutoModelForCausalLM" if about["causal"] else "AutoModelForMaskedLM"
  return USE[about["library"]].format(auto=auto, base=about["base"].removeprefix("hf:"))


def _provenance(about: Mapping, results: Mapping | None) -> list[str]:
  """The commands that made it, and what they ran on."""
  made = about.get("provenance") or {}
  lines = [f"- base: {escape(about['name'])}, fingerprint `{about['fingerprint']}`"]
  if versions := made.get("versions"):
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}")
  if "created" in made:
    git = made.get("git") or {}
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    lines += [f"- config: hash `{made.get('config_hash', '?')}`, started {made['created']} on "
              f"{escape(made.get('hardware', '?'))}",
              f"- commit: {git.get('commit', 'not from a git checkout')}{dirty}"]  # fmt: skip
  if results:
    lines.append(f"- data: {escape(str(results['data'].get('name')))}, fingerprint "
                 f"`{results['data'].get('fingerprint')}`")  # fmt: skip
  commands = filter(None, (made.get("command"), about["command"]))
  return ["\n".join(lines), "```sh\n{}\n```".format("\n".join(commands))]
