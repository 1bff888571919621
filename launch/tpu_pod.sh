#!/usr/bin/env bash
# A Cloud TPU slice through queued resources: ask for it, install jaxbias on all its workers, run, watch, resume, delete.
#
#   launch/tpu_pod.sh create|install|start|tail|stop|resume|delete [FLAGS] [-- VERB ARGUMENTS]
#
#   --name NAME      of the queued resource and of its TPU      (or $TPU_NAME)
#   --zone ZONE      such as us-east5-b                         (or $TPU_ZONE)
#   --project ID     the Google Cloud project                   (or $TPU_PROJECT)
#   --type TYPE      such as v5litepod-16; create and resume    (or $TPU_TYPE)
#   --runtime NAME   the TPU software version of this type      (or $TPU_RUNTIME)
#   --spot           cheaper, and can be taken away at any time
#   --worker I       whose log to tail: a number or all; default 0
#   --python X.Y     that uv installs on the workers; default 3.12
#   --restarts N     on exit codes 75, 134 and 137, at most N times, on the workers themselves; default 3
#   --dry-run        print the commands, exactly, and run none
#
# Every worker runs `python -m jaxbias VERB ARGUMENTS --coordinator=auto` from ~/jaxbias and writes ~/jaxbias.log.
set -euo pipefail

RESTART='75|134|137' # EX_TEMPFAIL: saved, start me again; 128 + SIGABRT, SIGKILL: a process was lost
LOOK_EVERY=30 # seconds between two looks at a request that waits

fail() {
  printf 'tpu_pod.sh: %s\n' "$1" >&2
  exit 2
}

# One argument as the shell would need it: in quotes only where it has to be.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf '%s' "$1"; else printf '%s' "${1@Q}"; fi
}

joined() {
  local word out=''
  for word in "$@"; do out+="${out:+ }$(quoted "$word")"; done
  printf '%s' "$out"
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run == yes ]]; then
    joined "$@"
    printf '\n'
  else
    "$@"
  fi
}

need() { # need FLAG VALUE VARIABLE: a value that has to be there
  [[ -n $2 ]] || fail "$1 is missing; give it, or set $3."
}

parse() {
  dry_run=no spot=no worker=0 python=3.12 restarts=3 arguments=()
  name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-} runtime=${TPU_RUNTIME:-}
  while (($#)); do
    local flag=$1 value=''
    case $flag in
      --) shift; arguments=("$@"); return ;;
      --dry-run) dry_run=yes; shift; continue ;;
      --spot) spot=yes; shift; continue ;;
      --*=*) value=${flag#*=} flag=${flag%%=*}; shift ;;
      --*) (($# > 1)) || fail "$flag has no value."; value=$2; shift 2 ;;
      *) fail "\`$flag\` is no flag; what jaxbias is to do comes behind --." ;;
    esac
    case $flag in
      --name) name=$value ;;
      --zone) zone=$value ;;
      --project) project=$value ;;
      --type) type=$value ;;
      --runtime) runtime=$value ;;
      --worker) worker=$value ;;
      --python) python=$value ;;
      --restarts) restarts=$value ;;
      *) fail "there is no flag $flag; --name, --zone, --project, --type, --runtime, --spot, --worker, --python, --restarts and --dry-run there are." ;;
    esac
  done
}

queued() { # queued VERB FLAGS: on the request
  run gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" --project="$project" "${@:2}"
}

on_workers() { # on_workers WHICH COMMAND: over ssh
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --project="$project" --worker="$1" --command="$2"
}

create() {
  need --type "$type" TPU_TYPE
  need --runtime "$runtime" TPU_RUNTIME
  local more=()
  [[ $spot == no ]] || more+=(--spot)
  queued create --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" "${more[@]}"
  wait_until_active
}

state() {
  queued describe --format='value(state.state)'
}

wait_until_active() {
  if [[ $dry_run == yes ]]; then
    printf '# every %s s until it says ACTIVE:\n' "$LOOK_EVERY"
    state
    return
  fi
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in FAILED | SUSPEND*) fail "the request $name is $now; \`resume\` asks for it anew, \`delete\` ends it." ;; esac
    printf '%s  %s\n' "$(date +%H:%M:%S)" "$now"
    sleep "$LOOK_EVERY"
  done
  [[ $now == ACTIVE ]] || fail "the state of $name cannot be read."
}

# What is committed here goes to every worker, and its Python with it; the run says which commit in its log.
install() {
  local archive commit
  archive=${TMPDIR:-/tmp}/jaxbias-$name.tar.gz
  commit=$(git rev-parse HEAD) || fail "run it inside a git checkout of jaxbias; what is committed is what is installed."
  git diff --quiet HEAD || printf 'tpu_pod.sh: uncommitted changes are not installed.\n' >&2
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxbias.tar.gz" --zone="$zone" --project="$project" --worker=all
  on_workers all "set -e; mkdir -p jaxbias; tar -xzf jaxbias.tar.gz -C jaxbias; echo $commit > jaxbias/COMMIT; \
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv; ~/.local/bin/uv venv --quiet --clear --python $python jaxbias/.venv; \
~/.local/bin/uv pip install --quiet --python jaxbias/.venv/bin/python -e jaxbias 'jax[tpu]'"
}

start() {
  ((${#arguments[@]})) || fail "what to run is missing; write it behind --, such as: -- evaluate --data=gs://BUCKET/dev.json"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts has to be a whole number."
  local command loop
  command=$(joined .venv/bin/python -m jaxbias "${arguments[@]}" --coordinator=auto)
  loop="for attempt in \$(seq 0 $restarts); do $command; code=\$?; case \$code in $RESTART) ;; *) break;; esac; done; exit \$code"
  on_workers all "cd jaxbias && cat COMMIT >> ../jaxbias.log && { setsid nohup bash -c ${loop@Q} >> ../jaxbias.log 2>&1 \
< /dev/null & echo \$! > ../jaxbias.pid; }"
}

tail_log() {
  on_workers "$worker" 'tail -n 100 -F jaxbias.log'
}

# SIGTERM to the whole group: the run saves, and the loop around it, which is in the group, does not start it again.
stop() {
  # shellcheck disable=SC2016 # the worker's shell expands it
  on_workers all 'kill -TERM -- -$(cat jaxbias.pid)'
}

# Where the TPU is still there, start again; where it was taken away, ask for it anew. The run goes on from its last
# checkpoint if its workdir outlives the workers: on gs://.
resume() {
  if [[ $dry_run == yes ]]; then
    printf '# the state decides:\n'
    state
    printf '# SUSPENDED or FAILED:\n'
    delete
    create
    install
    printf '# then, and where it is ACTIVE:\n'
    start
    return
  fi
  case $(state) in
    ACTIVE) ;;
    SUSPENDED | FAILED) delete; create; install ;;
    *) wait_until_active; install ;;
  esac
  start
}

delete() {
  queued delete --force --quiet
}

main() {
  local command=${1:-}
  case $command in
    create | install | start | tail | stop | resume | delete) ;;
    '' | -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) fail "there is no command \`$command\`; choose from create, install, start, tail, stop, resume, delete." ;;
  esac
  shift
  parse "$@"
  need --name "$name" TPU_NAME
  need --zone "$zone" TPU_ZONE
  need --project "$project" TPU_PROJECT
  [[ $dry_run == yes ]] || command -v gcloud > /dev/null || fail "gcloud is not installed; see cloud.google.com/sdk/docs/install."
  if [[ $command == tail ]]; then tail_log; else "$command"; fi
}

main "$@"
