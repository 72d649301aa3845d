#!/usr/bin/env bash
# The main job on a fresh machine: makes the environment, then trains a tokenizer and a small model on human chats,
# fine-tunes it and shows its replies. Run it again to go on from where it stopped.
#   bash launch/quickstart.sh [RECIPE] [flags of experiments.quickstart]
#   WORKDIR=DIR chooses the folder, seen from where you are; runs/quickstart of the repository otherwise.
if [ -n "${WORKDIR:-}" ] && [[ $WORKDIR != /* ]]; then
  WORKDIR=$PWD/$WORKDIR # environment.sh goes to the repository
fi
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment ""
recipe=cpu
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  recipe=$1
  shift
fi
workdir=${WORKDIR:-runs/quickstart}
echo "[quickstart] recipe $recipe in $workdir: about 8 minutes on two CPU cores (recipe cpu)"
exec .venv/bin/python -m experiments.quickstart "$recipe" --workdir "$workdir" "$@"
