"""docs/launch.md: every dry run on it is run, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import REPOSITORY
from tests.launch.test_elsewhere import TPU

PAGE = (REPOSITORY / "docs" / "launch.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_launcher_is_shown():
  shown = " ".join(command for command, _ in SHOWN)
  for path in (REPOSITORY / "launch").iterdir():
    if path.suffix in (".py", ".sh", ".sbatch"):
      assert f"launch/{path.name}" in shown


@pytest.mark.parametrize("command, printed", SHOWN, ids=[command[:40] for command, _ in SHOWN])
def test_a_dry_run_prints_what_the_page_says(command, printed):
  if "install" in command and not (REPOSITORY / ".git").exists():
    pytest.skip("a commit is installed, and this is no git checkout")
  assert re.search("--dry-run|DRY_RUN=1", command)
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "XLA_", "PYTHON"))}
  environment |= TPU | {"TMPDIR": "/tmp", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
  done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = re.sub(r"(?<!\S)/\S*/python[0-9.]* -m", "python -m", done.stdout)
  assert re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", found) == printed
