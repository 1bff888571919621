"""`python -m jaxbias VERB`; `python -m jaxbias --help` lists the verbs.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once. Several processes can be one run
(`jaxbias/distributed.py`): all of them compute, the first one prints and writes.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jaxbias.arguments import check_names, parser
from jaxbias.errors import Preempted, UserError, did_you_mean

RESTART = 75  # EX_TEMPFAIL of sysexits.h, on which launchers start the command again
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


def main(arguments: Sequence[str] | None = None) -> int:
  """Run one verb. Exit codes: 0 done, 2 something the user can mend (one line on stderr says what), 75 (EX_TEMPFAIL)
  saved, start me again, 130 interrupted."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  try:
    code = _run_verb(arguments)
  except Exception as error:
    if not (others := _others()):
      raise
    if others.lost_another(error):
      print(f"jaxbias: another process was lost ({str(error).splitlines()[0]}); start all again, and the same command "
            "goes on from the last checkpoint.", file=sys.stderr)  # fmt: skip
      others.leave(RESTART)
    traceback.print_exc()
    code = 1
  if code not in (0, RESTART) and (others := _others()):
    others.leave(code)
  return code


def _run_verb(arguments: Sequence[str]) -> int:
  try:
    check_names(arguments)
    options, rest = parser().parse_known_args(arguments)
    if stray := [a for a in rest if not a.startswith("--config.")]:
      raise UserError(f"`{options.verb}` cannot use `{stray[0]}`; `jaxbias {options.verb} --help` lists what it takes.")
    _join(options)
    VERBS[options.verb](options, rest)
    return 0
  except UserError as error:
    print(f"jaxbias: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    if error.errno in CANNOT_WRITE:
      print(f"jaxbias: {error.strerror.lower()} while writing {error.filename or 'to disk'}; what was finished is "
            "kept, so free some space or choose another folder and run the same command.", file=sys.stderr)
      return 2
    raise
  except Preempted as stopped:
    print(f"jaxbias: told to stop: {stopped}, and the same command goes on from there.", file=sys.stderr)
    return RESTART
  except KeyboardInterrupt:
    print("jaxbias: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
    return 130


def _others():
  """`jaxbias.distributed` where this process is one of several; looked up, so that nothing heavy is imported for it."""
  found = sys.modules.get("jaxbias.distributed")
  return found if found and found.jax.distributed.is_initialized() else None


def _join(options) -> None:
  """Makes this process one of several, where the command line says so; all but the first print nothing but errors."""
  given = [getattr(options, name, None) for name in ("coordinator", "processes", "process")]
  if given == [None] * 3:
    return
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  from jaxbias import distributed

  distributed.initialize(*given, silence=options.silence, notice=options.verb in ("train", "compare"))
  if not distributed.first():
    sys.stdout = open(os.devnull, "w")
    logging.getLogger("jaxbias").setLevel(logging.ERROR)


def _start_jax() -> None:
  """Compiled programs are kept across runs, next to the models."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import jax

  from jaxbias.models.sources import cache_folder

  jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _config(options, rest: Sequence[str]):
  from jaxbias.config import from_command_line

  given = [f"--config={options.config}"] if options.config else []
  return from_command_line([*given, *rest])[0]


def _compare(options, rest: Sequence[str]) -> None:
  _run(_config(options, rest), options.workdir, options.profile)


def _train(options, rest: Sequence[str]) -> None:
  config = _config(options, rest)
  name = options.variant or (next(iter(config.variants)) if len(config.variants) == 1 else None)
  if name is None or name not in config.variants:
    wanted = f"the config has no variant `{name}`" if name else "name one of the config's variants with --variant"
    raise UserError(f"{wanted}; {did_you_mean(name or '', config.variants)}")
  config.compare = (name,)
  _run(config, options.workdir, options.profile)


def _diagnose(options, rest: Sequence[str]) -> None:
  config = _config(options, rest)
  _start_jax()
  from jaxbias import preemption
  from jaxbias.diagnose import diagnose

  with preemption.listening():
    print(f"report: {diagnose(config, options.workdir, _command())}")


def _plan(options, rest: Sequence[str]) -> None:
  if options.devices < 1 or options.batch < 0 or options.length < 0:
    raise UserError("--devices, --batch and --length have to be positive.")
  config = _config(options, rest)
  os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, as it looks once
  fake = f"--xla_force_host_platform_device_count={options.devices}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake}"
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine that it runs on
  from jaxbias import plan

  source = options.model_config or config.model
  found = plan.plan(config, source, options.variant, options.batch, options.length, options.tpu)
  _print(plan.table(found, options.device_memory))
  if options.out:
    plan.write(options.out, found)
  if options.device_memory:
    plan.check(found, options.device_memory)


def _run(config, workdir: Path, profile: str | None) -> None:
  _start_jax()
  from jaxbias import distributed, preemption
  from jaxbias.compare import compare
  from jaxbias.report.tables import terminal
  from jaxbias.report.write import write
  from jaxbias.train.profile import window

  with preemption.listening():
    results = compare(config, workdir, _command(), window(profile) if profile else None)
  page = distributed.from_first(lambda: str(write(workdir)))
  _print(terminal(results))
  print(f"\nreport: {page}\ntable:  {workdir / 'table.md'}")
  failed = [row["name"] for row in results["rows"] if row.get("failed")]
  if failed:
    raise UserError(f"{', '.join(failed)} did not finish; the table says why, and the other rows are complete.")


def _command() -> str:
  return f"python -m jaxbias {shlex.join(sys.argv[1:])}"


def _print(table) -> None:
  from rich.console import Console

  console = Console()
  Console(width=None if console.is_terminal else 160).print(table)


def _evaluate(options, rest: Sequence[str]) -> None:
  from jaxbias.evals import registry

  if options.list:
    from jaxbias.evals import show

    _print(show.listing(registry.members()))
    return
  names = [name.strip() for name in options.benchmark.split(",")]
  for name in names:
    registry.get(name)
  if not options.data:
    raise UserError(f"name what `{names[0]}` is to read with --data; `jaxbias evaluate --list` says what that is.")
  if options.limit is not None and options.limit < 1:
    raise UserError(f"--limit={options.limit} leaves no example to evaluate.")
  _start_jax()
  from jaxbias.evals import run

  tables, wrong = run.evaluate(
    options.model, names, options.data, dtype=options.dtype, limit=options.limit, truncate=options.truncate,
    scorer=options.scorer, out=options.out, command=_command(),
  )  # fmt: skip
  for table in tables:
    _print(table)
  if wrong:
    raise run.failure(wrong, options.out)


def _finetune(options, rest: Sequence[str]) -> None:
  from jaxbias.data import glue

  glue.get(options.task)
  _start_jax()
  from jaxbias import finetune, preemption

  chosen = (field.name for field in dataclasses.fields(finetune.Settings))
  settings = finetune.Settings(**{name: getattr(options, name) for name in chosen})
  with preemption.listening():
    table, failed = finetune.finetune(
      options.model, options.task, options.data, settings, options.workdir, options.dtype, _command()
    )
  _print(table)
  print(f"\nresult: {options.workdir / finetune.RESULT}")
  if failed:
    raise UserError("\n  ".join(failed))


def _collapse(options, rest: Sequence[str]) -> None:
  _start_jax()
  from jaxbias import distributed
  from jaxbias.evals import collapse_run
  from jaxbias.report.collapse_figures import save

  found = collapse_run.run(
    options.model or ["smollm2-135m-instruct"], options.data, options.classes.split(","),
    sites=options.sites.split(","), passes=options.passes, compat=options.compat, dtype=options.dtype,
    limit=options.limit, out=options.out, command=_command(), pieces=options.pieces, shift=options.shift,
    min_count=options.min_count, held_out=options.held_out, seed=options.seed,
  )  # fmt: skip
  for table in collapse_run.tables(found):
    _print(table)
  if options.out and distributed.first():
    for path in save(collapse_run.rows(found), options.out):
      print(f"picture: {path}")


def _score(options, rest: Sequence[str]) -> None:
  from jaxbias.data.sources import read_choices

  rows = read_choices(options.rows)
  _start_jax()
  from jaxbias.evals import run

  run.score_rows(options.model, rows, options.out, options.dtype)


def _groups(options, rest: Sequence[str]) -> None:
  config = _config(options, rest)
  _start_jax()
  from jaxbias import groups

  print(groups.write(config, options.out).markdown())


def _report(options, rest: Sequence[str]) -> None:
  from jaxbias.report.write import write

  print(f"report: {write(options.folder)}")


def _convert(options, rest: Sequence[str]) -> None:
  _start_jax()
  from jaxbias.convert import convert

  command = _command()
  notes = convert(options.model, options.run_folder, options.to, options.out, options.dtype, command)
  for note in notes:
    print(f"jaxbias: {note}", file=sys.stderr)
  print(f"{'adapter' if options.to == 'peft' else 'model'}: {options.out}")


def _fetch(options, rest: Sequence[str]) -> None:
  from jaxbias.models.sources import resolve

  found = resolve(options.source)
  print(f"{found.name}: {found.path}")


VERBS = {
  "compare": _compare, "train": _train, "diagnose": _diagnose, "plan": _plan, "evaluate": _evaluate,
  "finetune": _finetune, "collapse": _collapse, "score": _score, "groups": _groups, "report": _report,
  "convert": _convert, "fetch": _fetch,
}  # fmt: skip


if __name__ == "__main__":
  sys.exit(main())
