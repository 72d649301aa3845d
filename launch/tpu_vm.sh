#!/usr/bin/env bash
# TPU VM slices by Cloud TPU's queued resources: made, set up, run on every worker, followed, taken up again, deleted.
#   bash launch/tpu_vm.sh ACTION --name NAME --zone ZONE [flags] [-- experiments.NAME RECIPE --workdir gs://… …]
#
# Actions
#   create   asks for the slice; it waits in the queue     wait    until it is there (a minute between two looks)
#   setup    copies this commit to every worker and installs it there
#   run      starts the experiment on every worker as a systemd unit, which starts it again when it stopped for
#            preemption (status 75) or was killed, not when its input was bad (2) or it failed by itself (1)
#   resume   after a preemption: deletes what is left of the slice, then create, wait, setup and run
#   logs     follows the first worker's output (--worker 3: another's)     status  of slice and units
#   ssh      runs the words after -- on every worker                       stop    ends the run; it saves first
#   delete   the slice and the request for it
# Flags
#   --topology v5p-128      as Cloud TPU calls it (accelerator type); v5e-N is asked for as v5litepod-N
#   --slices K              several slices as one run (multislice): nodes NAME-0 … NAME-(K-1)
#   --runtime VERSION       of the TPU VM's software, such as v2-alpha-tpuv5 (v5p) or v2-alpha-tpuv6e
#   --project P   --spot (may be preempted)   --reservation R   --worker N
#   --print                 shows the commands and does nothing     --help
# State is Cloud TPU's, systemd's and the workdir's: the same flags take up a run from any machine.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"
name="" zone="" project="" topology="" slices=1 runtime="" reservation="" worker=0 spot="" unit=qwen-jax
action=${1:---help}
shift || true
[[ $action != --help && $action != -h ]] || usage
flags "name zone project topology slices runtime reservation worker" "spot" "$@"
required name zone
need gcloud "install Google Cloud's command line and log in: gcloud auth login"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is $slices; expected a whole number of at least 1"
place=(--zone "$zone")
if [ -n "$project" ]; then
  place+=(--project "$project")
fi
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

queued() { run gcloud compute tpus queued-resources "$@" "${place[@]}"; }

# on WORKERS COMMAND: a shell command on workers of every node.
on() {
  local node
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" "--worker=$1" "--command=$2"
  done
}

create() {
  required topology runtime
  local which=(--node-id "$name") how=()
  if [ "$slices" -gt 1 ]; then
    which=(--node-count "$slices" --node-prefix "$name")
  fi
  if [ -n "$spot" ]; then
    how+=(--spot)
  fi
  if [ -n "$reservation" ]; then
    how+=(--reserved --reservation "$reservation")
  fi
  queued create "$name" "${which[@]}" --accelerator-type "${topology/#v5e-/v5litepod-}" \
    --runtime-version "$runtime" "${how[@]}"
}

wait_for_it() {
  local state
  while true; do
    state=$(queued describe "$name" "--format=value(state.state)")
    echo "$state"
    [ -z "$print" ] || return 0
    case $state in
    ACTIVE) return ;;
    FAILED | SUSPENDED | SUSPENDING) fail "the request is $state; delete it and ask again: $0 resume" ;;
    esac
    sleep 60
  done
}

setup() {
  local packed=/tmp/$name-qwen_jax.tar.gz node
  run git -C "$here/.." archive --format=tar.gz -o "$packed" HEAD
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$packed" "$node:qwen_jax.tar.gz" "${place[@]}" --worker=all
  done
  on all 'mkdir -p qwen_jax && tar xzf qwen_jax.tar.gz -C qwen_jax && cd qwen_jax && python3 -m venv .venv && .venv/bin/python -m pip install -q -e ".[tpu]"'
}

# The command is a file on the worker: systemd would read dollars and percent signs among its own arguments.
start() {
  local words script restart
  experiment_words
  script="cd \"\$(dirname \"\$0\")/qwen_jax\" && exec $(quoted ".venv/bin/${words[0]}" "${words[@]:1}")"
  restart="-p Restart=on-failure -p RestartPreventExitStatus='1 2 130' -p RestartSec=30 -p TimeoutStopSec=600 -p KillMode=mixed"
  on all "printf '%s\n' $(quoted "$script") > qwen_jax_run.sh && sudo systemctl reset-failed $unit 2> /dev/null; sudo systemd-run --unit=$unit --uid=\"\$(id -u)\" -p WorkingDirectory=\"\$HOME\" -E HOME=\"\$HOME\" $restart /bin/bash \"\$HOME/qwen_jax_run.sh\""
}

case $action in
create) create ;;
wait) wait_for_it ;;
setup) setup ;;
run) start ;;
resume)
  [ ${#experiment[@]} -gt 0 ] || fail "no experiment; give what was given to run"
  required topology runtime
  queued delete "$name" --force --quiet
  create
  wait_for_it
  setup
  start
  ;;
logs)
  nodes=("${nodes[0]}")
  on "$worker" "journalctl -u $unit -f -n 100 -o cat"
  ;;
status)
  queued describe "$name"
  on all "systemctl is-active $unit || true"
  ;;
ssh)
  [ ${#experiment[@]} -gt 0 ] || fail "no command; expected after --"
  on all "$(quoted "${experiment[@]}")"
  ;;
stop) on all "sudo systemctl stop $unit" ;;
delete) queued delete "$name" --force --quiet ;;
*) fail "$action is no action; expected create, wait, setup, run, resume, logs, status, ssh, stop or delete" ;;
esac
