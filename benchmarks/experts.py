"""The layer of experts, forward and backward, float32: arithmetic done, and time against a dense MLP and transformers.

    python benchmarks/experts.py [--runs 7] [--case few]

Prints JSON lines, one per case. Router and experts of Qwen3-MoE's kind, with random weights, against (a) a dense MLP as
wide as the experts of one token together, which is the same arithmetic per token, and (b) where torch and transformers
are installed, their Qwen3MoeSparseMoeBlock with the same weights, in two of its ways to run experts: "eager", a loop
over experts in Python, which a block made by itself does, and "grouped_mm", torch's grouped product, which a whole
model asks for ("by default" says which is which, asked of transformers itself).
Programs take turns; medians of wall seconds and of the process's CPU seconds, which a busy machine distorts less.

"share of peak" is the arithmetic that the chosen experts and the router need, over the time and over what a large
float32 matrix product reaches here on all cores: no program can be faster than another by more than 1 over its share.

"FLOPs/active" is what the matrix products of the compiled program do, by its own text, each loop counted as often as
these tokens make it run, over what the chosen experts and the router need: 2 per weight and token forward, 4 backward.
"largest array" leaves the weights and their gradients aside.
"""

import argparse
import json
import math
import re
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding
from qwen_jax.config import QwenConfig
from qwen_jax.models.mlp import MLP, MoE
from qwen_jax.ops.experts import order_by_expert
from qwen_jax.ops.tiles import SIZES
from qwen_jax.sharding import Layout
from qwen_jax.training.throughput import peak_flops


class Case(NamedTuple):
    """Tokens, model width, experts, experts per token, expert width; none of the last four is the size of a tile."""

    tokens: int
    hidden: int
    experts: int
    chosen: int
    width: int


CASES = {
    "few": Case(2048, 768, 18, 4, 384),
    "many": Case(4096, 640, 60, 8, 192),
    "qwen3": Case(2048, 520, 120, 8, 192),  # Qwen3-30B-A3B by about 4 in each width, with 120 of its 128 experts
}


def config_of(case: Case) -> QwenConfig:
    """A model whose layer has this shape."""
    return QwenConfig(
        hidden_size=case.hidden, intermediate_size=case.chosen * case.width, num_experts=case.experts,
        num_experts_per_tok=case.chosen, moe_intermediate_size=case.width, norm_topk_prob=True, dtype="float32",
    )  # fmt: skip


def compiled(module, *arguments):
    """Returns the compiled forward and backward of a layer, and its arguments: parameters, gradient, inputs."""
    params = jax.jit(module.init)(jax.random.key(1), *arguments)
    d_out = jax.random.normal(jax.random.key(2), arguments[0].shape)

    def run(params, d_out, x, *rest):
        out = lambda params, x: jax.tree.leaves(module.apply(params, x, *rest))[0]
        value, pull = jax.vjp(out, params, x)
        return value, pull(d_out)

    arguments = params, d_out, *arguments
    return jax.jit(run).lower(*arguments).compile(), arguments


def tiles_run(case: Case, router_DE, x_BTD) -> dict[int, int]:
    """Returns how many tiles of each size these tokens make."""
    chosen = jax.lax.top_k(x_BTD[0] @ router_DE, case.chosen)[1]
    left = np.asarray(order_by_expert(chosen, case.experts).groups.sizes)
    tiles = {}
    for size in SIZES:
        tiles[size] = int((left // size).sum())
        left = left % size
    return tiles


def flops(text: str, tiles: dict[int, int]) -> float:
    """Returns what the program's matrix products do: a dot that has the size of a tile as an axis is in that loop."""
    total, shapes = 0.0, dict(re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text))
    sides = lambda name: [int(side) for side in shapes[name].split(",") if side]
    pattern = r"(%[\w.-]+) = \S+ dot\((?:\w+\[[\d,]*\]\S* )?(%[\w.-]+),.*?lhs_contracting_dims=\{(\d*)\}"
    for out, left, axis in re.findall(pattern, text):
        contracted = sides(left)[int(axis)]
        size = [side for side in (*sides(out), contracted) if side in tiles]
        total += 2.0 * math.prod(sides(out)) * contracted * (tiles[size[0]] if size else 1)
    return total


def peers(case: Case, params, x_BTD) -> dict:
    """The same layer by transformers, in each of its ways to run experts; {} where it is not installed."""
    try:
        import torch
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return {}
    tensor = lambda x: torch.from_numpy(np.array(x))
    x, d_out = tensor(x_BTD), torch.randn(x_BTD.shape)
    made = {}
    for how in ("eager", "grouped_mm"):
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(
            hidden_size=case.hidden, num_experts=case.experts, num_experts_per_tok=case.chosen, norm_topk_prob=True,
            moe_intermediate_size=case.width, experts_implementation=how,
        ))  # fmt: skip
        block.load_state_dict({
            "gate.weight": tensor(params["router"].T),
            "experts.gate_up_proj": tensor(jnp.concatenate([params["gate"], params["up"]], 2).swapaxes(1, 2)),
            "experts.down_proj": tensor(params["down"].swapaxes(1, 2)),
        })  # fmt: skip

        def run(block=block):
            inputs = x.clone().requires_grad_()
            block.zero_grad()
            out = block(inputs)
            out.backward(d_out)
            return out.detach().numpy()

        made[f"transformers {how}"] = run
    return made


def defaults() -> dict[str, str]:
    """How transformers runs experts where nobody says how; {} where it is not installed."""
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ImportError:
        return {}
    small = dict(hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    config = Qwen3MoeConfig(**small, num_attention_heads=1, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1)
    alone = config._experts_implementation or "eager"  # what ExpertsInterface falls back to
    return {"a block": alone, "a model": Qwen3MoeForCausalLM(config).config._experts_implementation}


def seconds(programs: dict, runs: int) -> dict[str, tuple[float, float]]:
    """Returns the median wall and CPU seconds of each; they take turns, and the first turn is not counted."""
    taken = {name: [] for name in programs}
    for _ in range(runs + 1):
        for name, run in programs.items():
            start = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: tuple(map(statistics.median, zip(*each[1:], strict=True))) for name, each in taken.items()}


def compare(name: str, runs: int) -> dict:
    """Returns the figures of one case."""
    case = CASES[name]
    config = config_of(case)
    x_BTD = jax.random.normal(jax.random.key(0), (1, case.tokens, case.hidden))
    ones_BT = jnp.ones((1, case.tokens), jnp.int32)
    ours, arguments = compiled(MoE(config, Layout(), False), x_BTD, ones_BT)
    dense, dense_arguments = compiled(MLP(config, Layout(), False, config.intermediate_size), x_BTD)
    params = jax.tree.map(lambda box: box.value, arguments[0], is_leaf=lambda leaf: hasattr(leaf, "value"))["params"]
    programs = {
        "experts": lambda: jax.block_until_ready(ours(*arguments)),
        "dense": lambda: jax.block_until_ready(dense(*dense_arguments)),
        **peers(case, params, x_BTD),
    }
    for peer, run in programs.items():
        if peer.startswith("transformers"):
            differ = np.abs(np.asarray(programs["experts"]()[0]) - run()).max(-1) > 1e-5
            assert differ.mean() < 1e-3, f"{peer} computes something else"  # two experts may be equally likely
    taken = seconds(programs, runs)
    ratio = lambda a, b: [round(x / y, 2) for x, y in zip(taken[a], taken[b], strict=True)]
    text, tiles = ours.as_text(), tiles_run(case, params["router"], x_BTD)
    active = 6.0 * case.tokens * case.hidden * (3 * case.chosen * case.width + case.experts)
    arrays = [math.prod(map(int, shape.split(","))) for shape in re.findall(r" = \w+\[([\d,]+)\]", text)]
    weights = case.experts * case.hidden * case.width
    peak = peak_flops(sharding.make_mesh())[0]
    return {
        "case": name,
        **case._asdict(),
        "FLOPs/active": round(flops(text, tiles) / active, 3),
        "largest array/(tokens x experts x width)": round(
            max(size for size in arrays if size != weights) / (case.tokens * case.experts * case.width), 3
        ),
        "milliseconds, wall and CPU": {peer: [round(1e3 * x, 1) for x in pair] for peer, pair in taken.items()},
        "share of peak": {peer: round(active / pair[0] / peak, 2) for peer, pair in taken.items()},
        "experts/dense, wall and CPU": ratio("experts", "dense"),
        **{f"{peer}/experts, wall and CPU": ratio(peer, "experts") for peer in taken if peer.startswith("transf")},
    }


def main():
    """Prints the figures of all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--case", choices=CASES)
    arguments = parser.parse_args()
    print(json.dumps({"transformers by default": defaults()}), flush=True)
    for name in [arguments.case] if arguments.case else CASES:
        print(json.dumps(compare(name, arguments.runs)), flush=True)


if __name__ == "__main__":
    main()
