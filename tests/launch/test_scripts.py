"""The scripts that start runs elsewhere, against stand-ins for gcloud, kubectl, sbatch that write down their words."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sh")
HARD = ["--dataset", 'it\'s a "b"  $HOME %h `x` \\', "--note", "", "*"]
RUN = ["experiments.sft", "qwen2", "--workdir", "gs://b/my run", *HARD]
TPU = ["--name", "big", "--zone", "z1", "--topology", "v5p-128", "--runtime", "v2-alpha-tpuv5"]
GKE = ["--name", "big", "--topology", "v5p-128", "--image", "r/i:1"]
XPK = ["--cluster", "c", "--zone", "z1", "--project", "p"]
SLURM = ["--name", "big", "--nodes", "4"]
BASICS = ["bash", "cat", "date", "dirname", "env", "git", "id", "mkdir", "python3", "rm", "sed", "seq", "sh", "sleep"]
STUB = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >> "$CALLS"; printf '\\n\\0' >> "$CALLS"
[ "${0##*/}" != sbatch ] && [ "${0##*/}" != kubectl ] && [ "${0##*/}" != docker ] || cat > "$CALLS.stdin"
[[ "$*" != *describe* ]] || echo "${STATE:-ACTIVE}"
"""


@pytest.fixture
def call(tmp_path):
    """Returns a function that runs a script with stand-ins first in PATH: (result, the words of each call)."""
    for folder in ("bin", "basics"):
        (tmp_path / folder).mkdir()
    for tool in BASICS:  # no tool of a cloud may be found by chance
        (tmp_path / "basics" / tool).symlink_to(shutil.which(tool))
    for tool in ("gcloud", "kubectl", "sbatch", "docker", "xpk"):
        (tmp_path / "bin" / tool).write_text(STUB)
        (tmp_path / "bin" / tool).chmod(0o755)

    def run(script, *words, tools=True, **environment):
        calls = tmp_path / "calls"
        calls.write_bytes(b"")
        path = f"{tmp_path}/bin:{tmp_path}/basics" if tools else f"{tmp_path}/basics"
        environment = {
            "PATH": path,
            "HOME": str(tmp_path),
            "CALLS": str(calls),
            "PYTHON": sys.executable,
            **environment,
        }
        command = ["bash", str(LAUNCH / script), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        told = [each.split("\0")[:-1] for each in calls.read_text().split("\n\0") if each]
        return done, told

    run.stdin = tmp_path / "calls.stdin"
    return run


def given(command: str) -> list[str]:
    """The words that a shell makes of a command."""
    return subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True).stdout.split(
        "\0"
    )[:-1]


def test_scripts_are_clean():
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    command = [shellcheck, "-x", *sorted(map(str, LAUNCH.glob("*.sh")))]
    done = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_and_needs_no_tool(call, script):
    done, told = call(script, "--help", tools=False)
    assert done.returncode == 0 and not told and "--print" in done.stdout
    declared = [line for line in (LAUNCH / script).read_text().splitlines() if line.startswith("flags ")]
    for flag in shlex.split(declared[0])[1].split():
        assert f"--{flag}" in done.stdout


@pytest.mark.parametrize(
    "script, words",
    [
        ("tpu_vm.sh", ["resume", *TPU]),
        ("gke.sh", ["create", *GKE]),
        ("gke.sh", ["xpk", *GKE, *XPK]),
        ("slurm.sh", SLURM),
    ],
)
def test_printing_does_nothing_and_shows_what_is_done(call, script, words):
    """What is shown, run by a shell, is the calls that the script makes by itself."""
    shown, told = call(script, *words, "--print", "--", *RUN)
    assert shown.returncode == 0 and not told, shown.stderr
    _, expected = call(script, *words, "--", *RUN)
    program = "\n".join(line for line in shown.stdout.splitlines() if not line.startswith("git "))
    subprocess.run(["bash", "-c", program], env=_environment(call), check=True, capture_output=True)
    found = [each.split("\0")[:-1] for each in (call.stdin.with_name("calls")).read_text().split("\n\0") if each]
    assert found[len(found) // 2 :] == expected == found[: len(found) // 2]


def _environment(call):
    bin = call.stdin.with_name("bin")
    return {"PATH": f"{bin}:{bin.parent}/basics", "CALLS": str(call.stdin.with_name("calls")), "HOME": str(bin.parent)}


def test_a_slice_is_asked_for_followed_and_deleted(call):
    _, ((*create,),) = call("tpu_vm.sh", "create", *TPU, "--spot", "--project", "p")
    where = ["--zone", "z1", "--project", "p"]
    kind = ["--accelerator-type", "v5p-128", "--runtime-version", "v2-alpha-tpuv5"]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [*queued, "create", "big", "--node-id", "big", *kind, "--spot", *where]
    _, (create,) = call("tpu_vm.sh", "create", *TPU, "--slices", "2", "--reservation", "r")
    nodes = ["--node-count", "2", "--node-prefix", "big"]
    assert create == [*queued, "create", "big", *nodes, *kind, "--reserved", "--reservation", "r", "--zone", "z1"]
    done, _ = call("tpu_vm.sh", "wait", *TPU, STATE="SUSPENDED")
    assert done.returncode == 2 and "the request is SUSPENDED" in done.stderr
    _, (logs,) = call("tpu_vm.sh", "logs", *TPU, "--slices=2", "--worker=3")
    assert logs[5] == "big-0" and "--worker=3" in logs and "journalctl -u qwen-jax -f" in logs[-1]
    _, calls = call("tpu_vm.sh", "stop", *TPU, "--slices=2")
    assert [each[5] for each in calls] == ["big-0", "big-1"] and all("systemctl stop" in each[-1] for each in calls)
    assert call("tpu_vm.sh", "delete", *TPU)[1] == [[*queued, "delete", "big", "--force", "--quiet", "--zone", "z1"]]


def test_a_run_on_a_tpu_vm_keeps_every_word_and_is_started_again_after_preemption(call, tmp_path):
    _, (start,) = call("tpu_vm.sh", "run", *TPU, "--", *RUN)
    command = start[-1].removeprefix("--command=")
    assert start[-2] == "--worker=all" and "RestartPreventExitStatus='1 2 130'" in command  # 75 is not among them
    assert "-p Restart=on-failure" in command
    (tmp_path / "bin" / "sudo").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "sudo").chmod(0o755)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env={**_environment(call)}, check=True)
    python = tmp_path / "qwen_jax" / ".venv" / "bin" / "python"  # what the worker has after setup
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    found = subprocess.run(["bash", tmp_path / "qwen_jax_run.sh"], capture_output=True, text=True, check=True).stdout
    assert found.split("\n")[:-1] == ["-m", *RUN]


def test_after_a_preemption_the_slice_is_asked_for_again_and_the_run_goes_on(call):
    done, calls = call("tpu_vm.sh", "resume", *TPU, "--", *RUN)
    assert done.returncode == 0, done.stderr
    words = [
        next(word for word in each[3:] if word in ("delete", "create", "describe", "scp", "ssh")) for each in calls
    ]
    assert words == ["delete", "create", "describe", "scp", "ssh", "ssh"]


def test_a_batch_job_keeps_every_word_and_is_requeued_after_preemption(call, tmp_path):
    done, told = call("slurm.sh", *SLURM, "--partition", "gpu", "--interface", "ens1", "--", *RUN)
    assert told == [["sbatch"]], done.stderr
    script = call.stdin.read_text()
    for line in ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    (tmp_path / "bin" / "srun").write_text(
        "#!/bin/bash\nprintf '%s\\n' \"$@\" > srun; env > environment; exit ${STATUS}\n"
    )
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/bash\necho "$@" >> requeued\n')
    for tool in ("srun", "scontrol"):
        (tmp_path / "bin" / tool).chmod(0o755)
    for status in ("75", "1", "0"):
        environment = {**_environment(call), "STATUS": status, "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash", call.stdin], cwd=tmp_path, env=environment)
        assert done.returncode == int(status)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # of the first alone
    assert (tmp_path / "srun").read_text().split("\n")[2:-1] == [".venv/bin/python", "-m", *RUN]
    environment = (tmp_path / "environment").read_text()
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in environment and "NCCL_SOCKET_IFNAME=ens1\n" in environment


def test_xpk_and_the_image_get_their_words(call):
    _, (xpk,) = call("gke.sh", "xpk", *GKE, *XPK, "--slices", "2", "--", *RUN)
    assert xpk[:3] == ["xpk", "workload", "create"] and xpk[xpk.index("--restart-on-exit-codes") + 1] == "75"
    assert given(xpk[xpk.index("--command") + 1]) == ["python", "-m", *RUN]
    assert xpk[xpk.index("--num-slices") + 1] == "2"
    done, told = call("gke.sh", "image", "--image", "r/i:1", "--extra", "cuda")
    build = ["docker", "build", "--tag", "r/i:1", "--file", "launch/Dockerfile", "--build-arg", "EXTRA=cuda", "-"]
    assert told == [build, ["docker", "push", "r/i:1"]], done.stderr


@pytest.mark.parametrize(
    "script, words, line",
    [
        ("tpu_vm.sh", ["create", "--name", "a"], "--zone is missing"),
        ("tpu_vm.sh", ["fly", *TPU], "fly is no action"),
        ("tpu_vm.sh", ["run", *TPU], "no experiment"),
        ("tpu_vm.sh", ["run", *TPU, "--lr", "3"], "--lr is unknown"),
        ("tpu_vm.sh", ["run", *TPU, "--worker"], "--worker has no value"),
        ("tpu_vm.sh", ["run", *TPU, "experiments.sft"], "experiments.sft is no flag"),
        ("tpu_vm.sh", ["create", *TPU, "--slices", "two"], "--slices is two"),
        ("slurm.sh", ["--name", "a", "--nodes", "0", "--", "experiments.sft"], "--nodes is 0"),
        ("slurm.sh", [*SLURM, "--", "python"], "python is no experiment"),
        ("gke.sh", ["create", *GKE[2:], "--name", "Big", "--", *RUN], "name is 'Big'"),
        ("gke.sh", ["create", *GKE, "--topology", "v5p-7", "--", *RUN], "no slice of v5p is called 'v5p-7'"),
        ("gke.sh", ["create", *GKE, "--topology", "h100x8", "--", *RUN], "is no TPU slice"),
    ],
)
def test_a_mistake_is_told_in_one_line(call, script, words, line):
    done, told = call(script, *words)
    assert done.returncode == 2 and not told
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and line in done.stderr


@pytest.mark.parametrize(
    "script, words, tool",
    [
        ("tpu_vm.sh", ["create", *TPU], "gcloud"),
        ("gke.sh", ["create", *GKE, "--", *RUN], "kubectl"),
        ("gke.sh", ["xpk", *GKE, *XPK, "--", *RUN], "xpk"),
        ("slurm.sh", [*SLURM, "--", *RUN], "sbatch"),
    ],
)
def test_a_missing_tool_is_told_in_one_line(call, script, words, tool):
    done, _ = call(script, *words, tools=False)
    assert done.returncode == 2 and f"error: {tool} is not installed; " in done.stderr and done.stderr.count("\n") == 1


def test_scripts_hold_no_hyper_parameters():
    for script in SCRIPTS:
        assert not any(word in (LAUNCH / script).read_text() for word in ("--optimizer", "peak-lr", "--batch-size"))


def test_the_container_has_what_setup_installs():
    """Each folder that setup.py packages is copied; the extra is one of setup.py's."""
    text = (LAUNCH / "Dockerfile").read_text()
    for folder in ("qwen_jax", "experiments", "launch"):
        assert f"COPY {folder} ./{folder}\n" in text
    assert "ARG EXTRA=tpu\n" in text and '"tpu": [' in (LAUNCH.parent / "setup.py").read_text()
    assert os.access(LAUNCH / "Dockerfile", os.R_OK)
