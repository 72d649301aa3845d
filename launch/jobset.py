"""The manifest of a run on GKE: a JobSet of one Job a TPU slice and one pod a host, printed as JSON for kubectl.

    python -m launch.jobset --name sft --topology v5p-128 --image IMAGE -- python -m experiments.sft qwen2 --workdir …

A run that was preempted (status 75) or lost a host is started again as a whole, `restarts` times at most; one that
failed by itself (1), had bad input (2) or was stopped by hand (130) is not. JobSet's and GKE's own documentation have
the fields: jobset.sigs.k8s.io, "TPUs in GKE".
"""

import argparse
import json
import re
import sys

from launch import topologies
from launch.topologies import Topology
from qwen_jax.errors import InputError

ACCELERATORS = {
    "v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice",
}  # fmt: skip
GRACE = 600  # seconds between SIGTERM and the end: the run saves in these
FINAL = [1, 2, 130]  # statuses that another start would not mend: see qwen_jax.training.command


def manifest(
    name: str,
    topology: Topology,
    image: str,
    command: list[str],
    *,
    namespace: str = "default",
    restarts: int = 100,
    service_account: str = "",
) -> dict:
    """Returns the JobSet.

    Args:
      name: of the JobSet, at most 40 letters, digits and dashes: names of pods are made of it.
      topology: of TPUs.
      image: of the container.
      command: what each pod runs, word by word; no shell reads it.
      namespace, service_account: of Kubernetes; the namespace's own account if empty.
      restarts: of the whole, at most.

    Raises:
      InputError: on a name that Kubernetes would refuse, or a topology of GPUs.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise InputError(f"name is {name!r}; expected at most 40 of a-z, 0-9 and -, a letter first")
    if topology.chip not in ACCELERATORS:
        raise InputError(f"{topology.name!r} is no TPU slice; GPU nodes are launched by launch/slurm.sh")
    if restarts < 0:
        raise InputError(f"restarts is {restarts}; expected 0 or more")
    per_host = topology.of_chip.per_host
    hosts = max(topology.chips // topology.slices // per_host, 1)
    job = {
        "parallelism": hosts, "completions": hosts, "completionMode": "Indexed", "backoffLimit": 0,
        "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onExitCodes": {"containerName": "run", "operator": "In", "values": FINAL}},
        ]},
        "template": {"spec": pod(topology, image, command, service_account)},
    }  # fmt: skip
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name, "namespace": namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": topology.slices, "template": {"spec": job}}],
        },
    }  # fmt: skip


def pod(topology: Topology, image: str, command: list[str], service_account: str) -> dict:
    """Returns the pod of one host."""
    chips = {"google.com/tpu": min(topology.of_chip.per_host, topology.chips // topology.slices)}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        **({"serviceAccountName": service_account} if service_account else {}),
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.chip],
            "cloud.google.com/gke-tpu-topology": topology.shape,
        },
        "containers": [
            {
                "name": "run",
                "image": image,
                "command": command,
                "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
                "securityContext": {"privileged": True},
                "resources": {"requests": chips, "limits": chips},
            }
        ],
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the manifest; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    own, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="python -m launch.jobset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", required=True)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="")
    parser.add_argument("--restarts", type=int, default=100)
    options = vars(parser.parse_args(own))
    try:
        if not command:
            raise InputError("no command; expected after --: python -m experiments.NAME RECIPE …")
        where = topologies.parse(options.pop("topology"), options.pop("slices"))
        print(json.dumps(manifest(topology=where, command=command, **options), indent=2))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
