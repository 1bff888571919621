"""A run on one TPU slice of a GKE cluster: fills in launch/gke_jobset.yaml and hands it to `kubectl apply`.

  python launch/gke.py --name=npo --image=REGISTRY/jaxbias:TAG --accelerator=tpu-v5-lite-podslice --topology=4x4 \\
    -- evaluate --model=M --data=gs://BUCKET/dev.json --out=gs://BUCKET/npo.json

--dry-run prints the manifest and the kubectl line. The cluster is the one that kubectl points to.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
APPLY = ("kubectl", "apply", "-f", "-")
NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # room for the pods' own names, which are made from it


def main(arguments: Sequence[str] | None = None) -> int:
  """kubectl's exit code; 2 for bad input."""
  options = parse(arguments)
  manifest = render(options)
  if options.dry_run:
    print(f"{manifest}# {' '.join(APPLY)}")
    return 0
  try:
    return subprocess.run(APPLY, input=manifest, text=True).returncode
  except FileNotFoundError:
    fail("kubectl is not installed; see kubernetes.io/docs/tasks/tools, or take what --dry-run prints elsewhere.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="gke.py", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--name", required=True, help="of the JobSet")
  parser.add_argument("--image", required=True, help="with Python, jaxbias and jax[tpu] in it; docs/launch.md has one")
  parser.add_argument("--accelerator", required=True, metavar="TYPE", help="of the node pool, such as "
                      "tpu-v5-lite-podslice")
  parser.add_argument("--topology", required=True, metavar="AxB[xC]", help="of the slice, such as 4x4")
  parser.add_argument("--chips", type=int, default=4, metavar="N", help="of a host; default 4")
  parser.add_argument("--restarts", type=int, default=10, metavar="N", help="at most; default 10")
  parser.add_argument("--grace", type=int, default=180, metavar="SECONDS", help="from SIGTERM to SIGKILL; default 180")
  parser.add_argument("--dry-run", action="store_true", help="print the manifest and change nothing")
  parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="what jaxbias is to do")
  options = parser.parse_args(arguments)
  options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
  return options


def fail(message: str) -> None:
  print(f"gke.py: {message}", file=sys.stderr)
  raise SystemExit(2)


def render(options: argparse.Namespace) -> str:
  """The manifest. Strings are written as JSON, which is YAML, so that no letter of theirs has a meaning there.

  Kubernetes would replace $(X) in a command, and takes $$(X) for $(X).
  """
  if not options.command:
    fail("what to run is missing; write it behind --, such as: -- evaluate --data=gs://BUCKET/dev.json")
  if not re.fullmatch(NAME, options.name):
    fail(f"--name={options.name}: Kubernetes takes up to 40 small letters, digits and -, from a letter on.")
  if options.restarts < 0 or options.grace < 0:
    fail(f"--restarts={options.restarts} --grace={options.grace}: neither can be negative.")
  command = ["python", "-m", "jaxbias", *(part.replace("$(", "$$(") for part in options.command),
             "--coordinator=auto"]  # fmt: skip
  texts = {key: getattr(options, key) for key in ("name", "image", "accelerator", "topology")} | {"command": command}
  numbers = {"hosts": hosts(options.topology, options.chips), **{key: getattr(options, key)
             for key in ("chips", "restarts", "grace")}}  # fmt: skip
  written = {key: json.dumps(value) for key, value in (texts | numbers).items()}
  template = re.sub(r"(?m)^ *#.*\n", "", TEMPLATE.read_text(encoding="utf-8"))  # its comments are for its reader
  return Template(template).substitute(written)


def hosts(topology: str, chips: int) -> int:
  """Of a slice of so many chips, each host holding `chips` of them."""
  if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", topology):
    fail(f"--topology={topology} has to be as the node pool's, such as 4x4 or 2x2x4.")
  total = math.prod(map(int, topology.split("x")))
  if chips < 1 or total % chips:
    fail(f"--topology={topology} has {total} chips, which --chips={chips} to a host does not divide.")
  return total // chips


if __name__ == "__main__":
  sys.exit(main())
