#!/usr/bin/env bash
# GPU nodes by SLURM: one process a node, which drives all of its GPUs.
#   bash launch/slurm.sh --name NAME --nodes N [flags] [-- experiments.NAME RECIPE --workdir DIR …]
#
# Flags
#   --gpus 8                of a node                      --time 24:00:00      of one run, after which it is requeued
#   --partition P   --account A   --constraint C   --cpus N (of a node)
#   --python .venv/bin/python                              on every node, seen from the folder this is called from
#   --image IMAGE           runs in a container by pyxis (srun --container-image), where python is the image's
#   --interface ens         network interface of NCCL and gloo, where their own choice is wrong
#   --print                 shows the batch script and the command, and does nothing     --help
# The workdir is a folder that all nodes see. SIGTERM comes ten minutes before the time is over; the run saves and exits
# with 75, and SLURM takes the job back into its queue (also after a preemption). Output: NAME-JOB.log.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"
name="" nodes="" gpus=8 time=24:00:00 partition="" account="" constraint="" cpus="" python=.venv/bin/python image="" interface=""
[ $# -gt 0 ] || usage
flags "name nodes gpus time partition account constraint cpus python image interface" "" "$@"
required name nodes
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes is $nodes; expected a whole number of at least 1"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus is $gpus; expected a whole number of at least 1"
need sbatch "run this on a login node of the cluster"
experiment_words
words[0]=$python
step=(srun --ntasks-per-node=1 --kill-on-bad-exit=1)
if [ -n "$image" ]; then
  words[0]=python
  step+=("--container-image=$image" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
fi
devices=$(seq -s , 0 $((gpus - 1)))

batch_script() {
  echo "#!/usr/bin/env bash"
  echo "#SBATCH --job-name=$name"
  echo "#SBATCH --output=$name-%j.log"
  echo "#SBATCH --open-mode=append"
  echo "#SBATCH --nodes=$nodes"
  echo "#SBATCH --ntasks-per-node=1"
  echo "#SBATCH --gpus-per-node=$gpus"
  echo "#SBATCH --exclusive"
  echo "#SBATCH --time=$time"
  echo "#SBATCH --requeue"
  echo "#SBATCH --signal=TERM@600"
  local flag
  for flag in "partition=$partition" "account=$account" "constraint=$constraint" "cpus-per-task=$cpus"; do
    if [ -n "${flag#*=}" ]; then
      echo "#SBATCH --$flag"
    fi
  done
  echo "export JAX_LOCAL_DEVICE_IDS=$devices # one process a node: jax would take one GPU for it"
  echo "export NCCL_DEBUG=\${NCCL_DEBUG:-WARN}"
  if [ -n "$interface" ]; then
    echo "export NCCL_SOCKET_IFNAME=$(quoted "$interface") GLOO_SOCKET_IFNAME=$(quoted "$interface")"
  fi
  quoted "${step[@]}" "${words[@]}"
  echo "status=\$?"
  echo "if [ \"\$status\" -eq 75 ]; then # told to stop, and saved: SLURM starts it again when there is room"
  echo "  scontrol requeue \"\$SLURM_JOB_ID\""
  echo "fi"
  echo "exit \"\$status\""
}

if [ -n "$print" ]; then
  echo "sbatch <<'SCRIPT'"
  batch_script
  echo SCRIPT
else
  batch_script | sbatch
fi
