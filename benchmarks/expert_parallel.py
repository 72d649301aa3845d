"""Experts over a TPU slice: memory and traffic of the train step, compiled ahead of time; needs no TPU.

    pip install -e '.[aot]'
    python -m benchmarks.expert_parallel --topology v5p-128 --expert 16 [--model qwen3-30b-a3b] [--length 4096]

Prints one JSON object: what `experiments.pretrain` would run for the model, with one row of tokens a chip, over
--expert chips for the experts and fsdp over the others; the report is that of `launch.dry_run`. The loop of further
rounds of `ops.exchange` is left out of the step, for no even load enters it: what one such round in every layer would
add stands by itself.
"""

import argparse
import dataclasses
import json
import sys

from experiments import pretrain
from launch import dry_run, reports, topologies
from qwen_jax import config
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig


def report(topology: str, model: str, expert: int, length: int, rows: int, layers: int) -> dict:
    """Compiles the step and returns its figures."""
    where = topologies.parse(topology)
    shape = config.get(model).replace(remat="full")
    shape = shape.replace(num_hidden_layers=layers) if layers else shape
    run = dataclasses.replace(
        pretrain.qwen_7b(), model=shape, length=length, batch_size=rows * where.chips, microbatches=1,
        mesh=MeshConfig(fsdp=where.chips // expert, expert=expert),
    )  # fmt: skip
    found = dry_run.compile_all(pretrain, run, where, ("train_step",))
    return {"model": model, "layers": shape.num_hidden_layers} | reports.versions(where) | found


def main() -> int:
    """Prints the figures of one slice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p-128")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument(
        "--expert", type=int, default=16, help="chips over which the experts are split; the rest is fsdp"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1, help="rows a chip")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has; 0: all")
    try:
        print(json.dumps(report(**vars(parser.parse_args())), indent=1))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
