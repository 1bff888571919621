"""What each verb takes on the command line, and the check of names before anything is parsed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxbias.errors import UserError, did_you_mean

SOURCE_HELP = "a name, a folder (of a model, a training run or a PEFT adapter), a .gguf file, or hf:org/name[@revision]"
CONFIG_HELP = "any key can be overridden: --config.train.steps=40 --config.model=PATH --config.seeds='(0,1,2)'"

INTRASENTENCE = "stereoset_intrasentence,stereoset_intrasentence_sum"


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise UserError(f"{message}; `{self.prog} --help` lists what there is.")


def parser() -> argparse.ArgumentParser:
  """The verbs and their arguments; `verb` of what it parses is the one that was named."""
  whole = _Parser(
    prog="jaxbias", description="Debiasing and unlearning in language models: train, measure, compare.",
    allow_abbrev=False,
  )  # fmt: skip
  verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")

  def verb(name: str, text: str, **more) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text, allow_abbrev=False, **more)

  p = verb("compare", "train and evaluate every variant of a config, and write a report", epilog=CONFIG_HELP)
  p.add_argument("--config", metavar="FILE", required=False, help="a config file, e.g. configs/quickstart.py")
  p.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="where the runs and the report go")
  p.add_argument("--profile", metavar="FROM:TO", help="keep a trace of these steps in the run's folder, profile/")
  _processes(p)

  p = verb("train", "train and evaluate one variant of a config", epilog=CONFIG_HELP)
  p.add_argument("--config", metavar="FILE", required=False, help="a config file, e.g. configs/quickstart.py")
  p.add_argument("--variant", metavar="NAME", help="which of the config's variants; not needed if it has one")
  p.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="where the run goes")
  p.add_argument("--profile", metavar="FROM:TO", help="keep a trace of these steps in the run's folder, profile/")
  _processes(p)

  p = verb("diagnose", "a grid of objectives, remedies and data sizes: what forgetting has to do with "
           "fairness and performance", epilog=CONFIG_HELP)  # fmt: skip
  p.add_argument("--config", metavar="FILE", required=False, help="such as configs/diagnose_planted.py")
  p.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="where runs, table and report go")

  p = verb("plan", "what a train step would need on devices that are not here", epilog=CONFIG_HELP)
  p.add_argument("--config", metavar="FILE", required=False, help="a config file, e.g. configs/quickstart.py")
  p.add_argument("--variant", metavar="NAME", help="whose losses; default: the first that the config compares")
  p.add_argument("--model-config", metavar="SOURCE", help="a config.json, llama-3.1-8b (its shape is built in), or a "
                 "model; default: the config's")
  p.add_argument("--devices", metavar="N", type=int, default=8, help="how many to pretend to have; default 8")
  p.add_argument("--tpu", metavar="SLICE", default="", help="such as v5e:2x4: ask this TPU's compiler (needs libtpu)")
  p.add_argument("--device-memory", metavar="GIB", type=float, help="exit with code 2 when the peak is above it")
  p.add_argument("--batch", metavar="ROWS", type=int, default=0, help="packed rows a step; default: one a data shard")
  p.add_argument("--length", metavar="TOKENS", type=int, default=0, help="of a row; default 1024")
  p.add_argument("--out", metavar="FILE", type=Path, help="also write the plan as JSON")

  p = verb("evaluate", "benchmarks' metrics for one model, with intervals")
  _model(p)
  p.add_argument("--benchmark", metavar="NAME[,NAME]", default=INTRASENTENCE,
                 help="default: StereoSet's intrasentence task, by mean over tokens and by sum")
  p.add_argument("--data", metavar="SOURCE", action="append", default=[],
                 help="a file or folder, `builtin`, hf:NAME[:CONFIG[:SPLIT]] or tfds:NAME[:SPLIT]; NAME=SOURCE where "
                 "benchmarks have each their own")
  p.add_argument("--limit", metavar="N", type=int, help="only the first N examples; the result says so")
  p.add_argument("--truncate", choices=("left",), help="cut texts that are too long; the result says how many")
  p.add_argument("--scorer", metavar="NAME", help="of what a model writes: lexicon, lexicon:FILE, module:function, or "
                 "a classifier's folder")
  p.add_argument("--out", metavar="FILE", type=Path, help="also write estimates, items, answers and provenance as JSON")
  p.add_argument("--list", action="store_true", help="name every benchmark, its data and metrics, and stop")
  _processes(p)

  p = verb("finetune", "teach a model SST-2 or RTE, and measure its accuracy (docs/downstream.md)")
  _model(p)
  p.add_argument("--task", metavar="NAME", required=True, help="sst2 or rte")
  p.add_argument("--data", metavar="SOURCE", action="append", required=True, help="a folder with train and dev tables, "
                 "hf:NAME[:CONFIG] or tfds:NAME; or both of train=SOURCE and dev=SOURCE")
  p.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="where the result goes, and "
                 "a run for each seed that --model takes")
  p.add_argument("--seeds", metavar="N[,N]", type=_numbers, default=(0, 1, 2), help="default: 0,1,2")
  p.add_argument("--train-limit", metavar="N", type=int, default=1000, help="train on the first N examples; default "
                 "1000, 0 for all")
  p.add_argument("--limit", metavar="N", type=int, default=0, help="answer only the first N; default: all")
  p.add_argument("--rank", metavar="R", type=int, default=8, help="of the LoRA adapters; 0: none; default 8")
  p.add_argument("--base", metavar="LEAF[,LEAF]", type=_names, default=(), help="parameters of the base that train, as "
                 "`*` or `layers/mlp/*`; default: none")
  p.add_argument("--learning-rate", metavar="X", type=float, default=0.0, help="at its peak; default 5e-4, and "
                 "2e-5 with --base")
  p.add_argument("--epochs", metavar="X", type=float, default=3.0, help="default 3")
  p.add_argument("--batch", metavar="N", type=int, default=32, help="examples in a step; default 32")
  p.add_argument("--max-length", metavar="N", type=int, default=128, help="tokens of an example; default 128")

  p = verb("collapse", "neural collapse of models or checkpoints, by class and layer (docs/collapse.md)")
  p.add_argument("--model", metavar="[LABEL=]SOURCE", action="append", help="repeated for several; LABEL: a name, or a "
                 f"step; SOURCE: {SOURCE_HELP}")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
  p.add_argument("--data", metavar="FILE", required=True, help="a text, or .jsonl lines of `text`, maybe with `labels`")
  p.add_argument("--classes", metavar="NAME[,NAME]", default="gender", help="gender, occupations, a list's file, "
                 "vocabulary, random:N, labels; default: gender")
  p.add_argument("--sites", metavar="NAME[,NAME]", default="head_input", help="head_input, stack_out, layer_N or all")
  p.add_argument("--pieces", default="single", help="of a word of several: single (left out), first, pooled")
  p.add_argument("--shift", default="auto", help="1: the state before a token; 0: its own; auto: by the kind of model")
  p.add_argument("--min-count", metavar="N", type=int, default=2, help="classes seen less often are left out")
  p.add_argument("--held-out", metavar="SHARE", type=float, default=0.2, help="of the texts, for NC4; default 0.2")
  p.add_argument("--passes", type=int, choices=(1, 2), default=1, help="2: variances around final means, as published")
  p.add_argument("--seed", type=int, default=0, help="of random classes and of what is held out")
  p.add_argument("--limit", metavar="N", type=int, help="only the first N texts")
  p.add_argument("--compat", action="store_true", help="also `dual_dists`, which was published as a distance")
  p.add_argument("--out", metavar="DIR", type=Path, help="collapse.json and pictures")
  _processes(p)

  p = verb("score", "log-probability of every option of anyone's rows")
  _model(p)
  p.add_argument("--rows", metavar="FILE", type=Path, required=True, help="JSON lines {id, context, options}")
  p.add_argument("--out", metavar="FILE", type=Path, required=True, help="{id: [[sum in nats, tokens], ...]}")
  _processes(p)

  p = verb("groups", "make contrast groups of a config's training triples, with its model", epilog=CONFIG_HELP)
  p.add_argument("--config", metavar="FILE", required=False, help="such as configs/contrastive_smollm2.py")
  p.add_argument("--out", metavar="FILE.jsonl", type=Path, required=True, help="for --config.data.groups; a card of "
                 "what each generator made, and why texts were dropped, goes beside it as FILE.md")

  p = verb("report", "write the tables, figures and page of a finished comparison again")
  p.add_argument("folder", type=Path, help="the comparison's workdir")

  p = verb("convert", "write a model or a trained run as a Hugging Face folder, or as a PEFT adapter")
  p.add_argument("--model", metavar="SOURCE", help=f"{SOURCE_HELP}; default: the run's own base")
  p.add_argument("--run", metavar="DIR", dest="run_folder", type=Path, help="a trained run: WORKDIR/VARIANT-seedN")
  p.add_argument("--to", choices=("hf", "peft"), required=True, help="hf: adapters merged; peft: adapters alone")
  p.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of --to=hf; default: the model's own")

  p = verb("fetch", "bring a model to this machine and say where it is")
  p.add_argument("source", help=f"{SOURCE_HELP}, such as smollm2-135m-instruct")
  return whole


def _model(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", metavar="SOURCE", default="smollm2-135m-instruct",
                      help=SOURCE_HELP)  # fmt: skip
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")


def _processes(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("several processes, as one run", "the same command for each, but for --process")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; or `auto`, where SLURM, Open "
                     "MPI, Cloud TPU or GKE start the processes: then nothing else is needed")
  group.add_argument("--processes", metavar="N", type=int, help="how many there are")
  group.add_argument("--process", metavar="I", type=int, help="which one this is, from 0")
  group.add_argument("--silence", metavar="SECONDS", type=int, default=100, help="without a sign of life of one of "
                     "them, after which all stop; default 100")


def _names(text: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
  try:
    return tuple(map(int, text.split(",")))
  except ValueError:
    raise argparse.ArgumentTypeError(f"`{text}` has to be whole numbers, such as 0,1,2") from None


def check_names(arguments: Sequence[str]) -> None:
  """Raises UserError with the nearest name for a verb or a flag that does not exist, before anything is parsed."""
  verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
  verb = next((a for a in arguments if not a.startswith("-")), None)
  if verb is None:
    return
  if verb not in verbs:
    raise UserError(f"there is no verb `{verb}`; {did_you_mean(verb, verbs)}")
  flags = [flag for action in verbs[verb]._actions for flag in action.option_strings]
  for argument in arguments:
    flag = argument.split("=")[0]
    overrides = flag.startswith("--config.") and "--config" in flags
    if flag.startswith("--") and flag not in flags and not overrides:
      raise UserError(f"`{verb}` has no argument {flag}; {did_you_mean(flag, flags)}")
