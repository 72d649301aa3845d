#!/usr/bin/env bash
# TPU slices on GKE: a JobSet by kubectl, or a workload by XPK; and the container image that both run.
#   bash launch/gke.sh ACTION --name NAME [flags] [-- experiments.NAME RECIPE --workdir gs://… …]
#
# Actions
#   image      builds launch/Dockerfile from this commit and pushes it as --image
#   manifest   prints the JobSet             create   applies it by kubectl
#   xpk        starts the same by XPK, on a cluster that XPK made
#   logs       of the first worker           status   of the JobSet and its pods         delete   the JobSet
# Flags
#   --topology v5p-128   --slices K   --image IMAGE   --namespace default   --service-account S
#   --restarts 100       after a preemption or a lost host; the JobSet is failed at once where the input was bad
#   --extra tpu          of setup.py, for the image (cuda: for GPU nodes)
#   --cluster C  --zone Z  --project P      of XPK
#   --print              shows the commands and does nothing     --help
# State is Kubernetes' and the workdir's.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"
name="" topology="" slices=1 image="" namespace=default service_account="" restarts=100 extra=tpu cluster="" zone="" project=""
python=${PYTHON:-$here/../.venv/bin/python}
action=${1:---help}
shift || true
[[ $action != --help && $action != -h ]] || usage
flags "name topology slices image namespace service-account restarts extra cluster zone project" "" "$@"

# The JobSet is made by launch/jobset.py, whatever else happens: it also checks name, topology and restarts.
manifest() {
  required name topology image
  experiment_words
  local how=()
  if [ -n "$service_account" ]; then
    how=(--service-account "$service_account")
  fi
  if ! [ -x "$python" ]; then
    python=python3
  fi
  (cd "$here/.." && "$python" -m launch.jobset --name "$name" --topology "$topology" --slices "$slices" \
    --image "$image" --namespace "$namespace" --restarts "$restarts" "${how[@]}" -- "${words[@]}")
}

kube() { run kubectl --namespace "$namespace" "$@"; }

case $action in
image)
  required image
  need docker "install Docker, or build launch/Dockerfile elsewhere"
  if [ -n "$print" ]; then
    echo "$(quoted git -C "$here/.." archive HEAD) | $(quoted docker build --tag "$image" --file launch/Dockerfile --build-arg "EXTRA=$extra" -)"
  else
    git -C "$here/.." archive HEAD | docker build --tag "$image" --file launch/Dockerfile --build-arg "EXTRA=$extra" -
  fi
  run docker push "$image"
  ;;
manifest) manifest ;;
create)
  need kubectl "install it and take the cluster's credentials: gcloud container clusters get-credentials CLUSTER"
  made=$(manifest)
  if [ -n "$print" ]; then
    echo "kubectl --namespace $(quoted "$namespace") apply --filename - <<'MANIFEST'"
    echo "$made"
    echo MANIFEST
  else
    kubectl --namespace "$namespace" apply --filename - <<<"$made"
  fi
  ;;
xpk)
  required name topology image cluster zone project
  need xpk "pip install xpk"
  experiment_words
  run xpk workload create --workload "$name" --cluster "$cluster" --zone "$zone" --project "$project" \
    --tpu-type "${topology/#v5e-/v5litepod-}" --num-slices "$slices" --docker-image "$image" \
    --max-restarts "$restarts" --restart-on-exit-codes 75 --command "$(quoted "${words[@]}")"
  ;;
logs)
  required name
  need kubectl "install it"
  kube logs --follow --selector "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  ;;
status)
  required name
  need kubectl "install it"
  kube get jobset "$name"
  kube get pods --selector "jobset.sigs.k8s.io/jobset-name=$name"
  ;;
delete)
  required name
  need kubectl "install it"
  kube delete jobset "$name"
  ;;
*) fail "$action is no action; expected image, manifest, create, xpk, logs, status or delete" ;;
esac
