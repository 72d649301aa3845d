"""The dry run: names of slices, meshes, and the whole command with a CPU in the place of the chips."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import pytest

from experiments import moe, pretrain, sft
from launch import changes, compilers, dry_run, figures, hlo, reports, topologies
from launch.topologies import Chip
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig

ROOM = 2**40
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "hidden_size")


@pytest.fixture
def cpu(monkeypatch):
    """Returns a function that makes of the 8 virtual devices a slice "cpu:2x4" with so many bytes a chip."""

    def make(capacity):
        chip = Chip("cpu", 1e12, capacity, 1e11, 1e10, 1e9, sides=("2x2", "2x4", "2x4"), per_host=8)
        monkeypatch.setitem(topologies.CHIPS, "cpu", chip)
        monkeypatch.setattr(compilers, "find", lambda topology: None)
        monkeypatch.setattr(compilers, "devices", lambda topology: jax.devices())
        monkeypatch.setattr(reports, "versions", lambda topology: {"jax": jax.__version__, "compiler": "cpu"})

    return make


@pytest.mark.parametrize("name, slices, shape, chips", [
    ("v5p-128", 1, "4x4x4", 64), ("v5p-256", 2, "4x4x8", 256), ("v5e-16", 1, "4x4", 16), ("v5litepod-16", 1, "4x4", 16),
    ("v6e-256", 1, "16x16", 256), ("v4-8", 1, "2x2x1", 4), ("v5p:2x2x4", 1, "2x2x4", 16), ("h100x8", 1, "1x8", 8),
    ("h100x4", 1, "1x4", 4), ("h100x512", 1, "64x8", 512),
])  # fmt: skip
def test_names_of_slices(name, slices, shape, chips):
    found = topologies.parse(name, slices)
    assert (found.shape, found.chips) == (shape, chips)


@pytest.mark.parametrize("name, slices, line", [
    ("v5q-128", 1, "no topology is called 'v5q-128'; chips: .* such as v5"), ("", 1, "no topology"),
    ("v5p-127", 1, r"no slice of v5p is called 'v5p-127' \(TensorCores, two a chip\); expected v5p-N, N of 8, 16"),
    ("v5p:", 1, "no topology"), ("v5p:4", 1, "has no shape"), ("h100x12", 1, "multiple of 8"), ("v5p-8", 0, "--slices"),
    ("h100x8", 2, "h100x16"),
])  # fmt: skip
def test_unknown_slices_are_told_in_one_line(name, slices, line):
    with pytest.raises(InputError, match=line):
        topologies.parse(name, slices)


def test_a_mesh_multiplies_to_the_slice():
    slice_of_64, recipe = topologies.parse("v5p-128"), sft.qwen2()
    assert changes.mesh_of("", slice_of_64, recipe) == MeshConfig(fsdp=64)
    assert changes.mesh_of("fsdp=-1,tensor=4", slice_of_64) == MeshConfig(fsdp=16, tensor=4)
    assert changes.written(changes.mesh_of("expert=64", slice_of_64)) == "expert=64"
    for text, line in {
        "fsdp=32": "the mesh fsdp 32 is of 32 chips; v5p-128 has 64", "tensor=3,fsdp=-1": "has 64",
        "rows=4": "AXIS one of data, fsdp", "fsdp": "AXIS=SIZE", "fsdp=4,fsdp=4": "each once",
        "fsdp=128": "of 128 chips",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=line):
            changes.mesh_of(text, slice_of_64)


def test_variations_are_possible_ones():
    """Those of a search multiply to the chips and divide heads, experts and rows; remedies change what they say."""
    topology = topologies.parse("v5p-128", 2)
    recipe = dataclasses.replace(moe.qwen2_57b_a14b(), mesh=MeshConfig(fsdp=128))
    found = dict(changes.search(recipe, topology))
    assert len(found) > 20
    for flags, config in found.items():
        mesh = config.mesh
        assert mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor == 128
        assert 4 % mesh.tensor == 0 == 64 % mesh.expert and config.model.remat in flags
        assert config.batch_size % (mesh.data * mesh.fsdp * mesh.expert * config.microbatches) == 0
    tried = list(changes.remedies(dataclasses.replace(pretrain.qwen_7b(), mesh=MeshConfig(fsdp=64))))
    assert [flags for flags, _ in tried[:3]] == [
        "--model.vocabulary-chunks 32",
        "--microbatches 8",
        "--microbatches 16",
    ]
    assert tried[0][1].model.vocabulary_chunks == 32 and tried[1][1].microbatches == 8
    assert "--mesh fsdp=32,context=2" in [flags for flags, _ in tried]


def test_the_report_is_of_the_program_that_runs(cpu, capsys, tmp_path):
    cpu(ROOM)
    kept = ["--keep", str(tmp_path / "kept"), "--price", "2", "--json"]
    flags = ["experiments.pretrain", "smoke", "--topology", "cpu:2x4", "--mesh", "fsdp=8", "--batch-size", "16"]
    assert dry_run.main([*flags, *kept, "--functions", "train_step"]) == 0
    report = json.loads(capsys.readouterr().out)
    count = pretrain.smoke().model.param_counts()["total"]
    held = report["bytes per chip"]
    assert count * 4 / 8 <= held["parameters"] < count * 4 / 8 * 1.2  # norms and biases are whole everywhere
    assert 0 < held["optimizer"] - 2 * held["parameters"] < 64 and report["rows x tokens of a step"] == [16, 64]
    step = report["functions"]["train_step"]
    assert step["bytes"]["arguments"] >= held["parameters"] + held["optimizer"] + held["batch"]
    # Forward, and twice as much backward, which forms the logits of the vocabulary again, and maybe those of
    # attention, which takes 2 products forward and 4 or 5 backward. Norms and biases are in no product.
    model, tokens = pretrain.smoke().model, 16 * 64 / 8
    N, K, H, L, D = (getattr(model, name) for name in SIZES)
    matrices = model.param_counts()["non_embedding"] - L * ((N + 2 * K) * H + 2 * D) - D
    weights = tokens * (6 * matrices + 8 * model.vocab_size * D)
    product = 2 * tokens * 64 * N * H * L
    assert weights + 6 * product <= step["FLOPs"]["products"] <= weights + 7 * product
    assert report["cost of 1B tokens"] == pytest.approx(2 * report["hours of one chip for 1B tokens"])
    assert report["model FLOPs utilisation"] == pytest.approx(
        report["model FLOPs per chip"] / (1e12 * report["step seconds"])
    )
    again = [*flags, "--functions", "train_step", "--price", "2", "--json", "--read", str(tmp_path / "kept")]
    assert dry_run.main(again) == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.fixture
def compiler(monkeypatch):
    """Takes the place of the compiler: what needs more than 100 bytes does not fit; returns what it was asked for."""
    asked = []

    def make(config, built, topology, compiled):
        more = 4 * config.microbatches + 8 * (config.model.remat != "none") + config.model.vocabulary_chunks / 4
        cost = hlo.Cost(1e12 * more, {}, 0.0, 0.0, {}, {})
        fits = config.mesh.context == 1 and more > 8
        asked.append(config)
        found = dict.fromkeys(compiled, figures.Compiled(fits, {"peak": 90 if fits else 110}, fits and cost, 1.0))
        return reports_make(config, built, topology, found)

    reports_make = reports.make
    monkeypatch.setattr(reports, "make", make)
    monkeypatch.setattr(figures, "compile_function", lambda *args: None)
    return asked


def test_what_does_not_fit_gets_the_cheapest_changes_that_do(cpu, compiler, capsys):
    cpu(ROOM)
    flags = ["experiments.pretrain", "smoke", "--topology", "cpu:2x4", "--mesh", "fsdp=4,tensor=2"]
    flags += ["--batch-size", "32", "--functions", "train_step"]
    assert dry_run.main(flags) == 1
    found = capsys.readouterr()
    assert "train_step: DOES NOT FIT: needs 0.00 GB" in found.out
    assert "changes that make it fit (3 compiled)" in found.out
    rows = [line.split("|")[1:5] for line in found.out.splitlines() if line.startswith("| `")]
    assert [row[0].strip() for row in rows] == [
        "`--microbatches 2`",
        "`--model.vocabulary-chunks 32`",
        "`--microbatches 4`",
    ]
    assert [float(row[3]) for row in rows] == [10.0, 12.0, 18.0] and {row[1] for row in rows} == {" yes "}
    assert len(compiler) == 4 and "[dry run] --microbatches 2: 10 s a step" in found.err
    compiler.clear()
    assert dry_run.main([*flags, "--tries", "2"]) == 1 and len(compiler) == 3


def test_a_search_prints_a_table_of_what_fits_first(cpu, compiler, capsys):
    cpu(ROOM)
    flags = [
        "experiments.pretrain",
        "smoke",
        "--topology",
        "cpu:2x4",
        "--search",
        "--tries",
        "12",
        "--batch-size",
        "32",
    ]
    assert dry_run.main(flags) == 0
    rows = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines()[2:]]
    fitting = [float(row[3]) for row in rows if row[1] == " yes "]
    assert len(rows) == 12 == len(compiler) and len(fitting) > 2 and fitting == sorted(fitting)
    assert [row[1] for row in rows] == [" yes "] * len(fitting) + [" no "] * (12 - len(fitting))


@pytest.mark.parametrize("words, line", [
    (["experiments.nothing", "smoke"], "there is no module 'experiments.nothing'"),
    (["experiments.long_context", "smoke"], "has no build"),
    (["experiments.sft", "smok"], "no recipe is called 'smok'; nearest: smoke"),
    (["experiments.sft", "smoke", "--lengt", "8"], "unknown flag '--lengt'"),
    (["experiments.sft", "smoke", "--mesh", "fsdp=4"], "is of 4 chips; cpu:2x4 has 8"),
    (["experiments.sft", "smoke", "--batch-size", "4"], "cannot be shared by the mesh axes"),
    (["experiments.sft", "smoke", "--functions", "train"], "--functions has train; expected of train_step"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(cpu, capsys, words, line):
    cpu(ROOM)
    assert dry_run.main([*words, "--topology", "cpu:2x4"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and line in told


def test_a_missing_compiler_is_told_with_what_to_install():
    code = """
import sys
sys.modules["libtpu"] = None
from launch import dry_run
sys.exit(dry_run.main(["experiments.sft", "qwen2", "--topology", "v5p-128"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: libtpu, the compiler for TPUs, is not installed; pip install -e '.[aot]'\n"


def test_help_is_at_once():
    """Counted in modules, which do not vary with the machine's load."""
    code = "import sys; from launch import dry_run; dry_run.parser(); print('jax' in sys.modules, len(sys.modules))"
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "False" and int(found[1]) < 300, time.perf_counter() - start
