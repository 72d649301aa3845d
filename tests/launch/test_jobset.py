"""The manifest for GKE: its Job against Kubernetes' own schema, the rest against JobSet's documented fields."""

import json

import jsonschema
import kubernetes_validate
import pytest

from launch import jobset, topologies
from qwen_jax.errors import InputError

VERSION = "1.30"
# Fields, kinds and values of JobSet's v1alpha2 that a manifest may have, from the API's reference; unknown ones fail.
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def closed(required=(), **properties):
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False,
    }  # fmt: skip


REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
RULE = closed(
    ["action"], name=TEXT, action={"enum": ACTIONS}, targetReplicatedJobs={"type": "array", "items": TEXT},
    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
)  # fmt: skip
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(
        ["name"], name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
        namespace=TEXT, annotations={"type": "object", "additionalProperties": TEXT},
    ),
    spec=closed(
        ["replicatedJobs"],
        failurePolicy=closed(maxRestarts=COUNT, rules={"type": "array", "items": RULE, "maxItems": 10}),
        replicatedJobs={
            "type": "array",
            "items": closed(["name", "template"], name=TEXT, replicas=COUNT, template={"type": "object"}),
        },
    ),
)  # fmt: skip


def validate(made: dict) -> dict:
    """Checks a manifest; returns the spec of its Job."""
    jsonschema.validate(made, JOBSET)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes_validate.validate(json.loads(json.dumps(job)), VERSION, strict=True)
    return job["spec"]


@pytest.mark.parametrize(
    "name, slices, hosts, chips, wired",
    [
        ("v5p-128", 1, 16, 4, "4x4x4"),
        ("v6e-256", 2, 64, 4, "16x16"),
        ("v5p-8", 1, 1, 4, "2x2x1"),
        ("v5e-4", 1, 1, 4, "2x2"),
    ],
)
def test_a_manifest_is_one_of_kubernetes_and_asks_for_the_slice(name, slices, hosts, chips, wired):
    command = ["python", "-m", "experiments.sft", "qwen2", "--dataset", "it's $HOME", ""]
    made = jobset.manifest("run-1", topologies.parse(name, slices), "r/i:1", command, service_account="trainer")
    job = validate(made)
    assert made["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == wired
    assert container["resources"]["limits"] == {"google.com/tpu": chips} and container["command"] == command
    assert hosts * chips * slices == topologies.parse(name, slices).chips
    assert pod["serviceAccountName"] == "trainer"


def test_a_preempted_run_is_started_again_and_one_that_failed_is_not():
    """75, a killed pod and a lost node fail the Job by its backoff limit; only what the policy lists fails the set."""
    made = jobset.manifest("run", topologies.parse("v5p-16"), "i", ["true"], restarts=7)
    job = validate(made)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2, 130] and job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which a pod failure policy needs
    assert made["spec"]["failurePolicy"] == {
        "maxRestarts": 7, "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }  # fmt: skip


def test_the_check_finds_what_is_wrong():
    made = jobset.manifest("run", topologies.parse("v5p-16"), "i", ["true"])
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(made)
    with pytest.raises(jsonschema.ValidationError):
        validate({**made, "spec": {**made["spec"], "failurePolicy": {"maxRestart": 1}}})


@pytest.mark.parametrize("wrong, line", [
    (dict(name="Run"), "name is 'Run'"), (dict(name="a" * 41), "at most 40"), (dict(restarts=-1), "restarts is -1"),
    (dict(topology=topologies.parse("h100x8")), "is no TPU slice"),
])  # fmt: skip
def test_a_manifest_that_would_be_refused_is_refused_here(wrong, line):
    right = dict(name="run", topology=topologies.parse("v5p-16"), image="i", command=["true"])
    with pytest.raises(InputError, match=line):
        jobset.manifest(**{**right, **wrong})
