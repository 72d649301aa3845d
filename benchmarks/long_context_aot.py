"""qwen2.5-7b-1m compiled ahead of time for TPU slices: prefill of 1,048,576 tokens, a training step of 262,144 tokens.

    python -m benchmarks.long_context_aot --slices v5p-32 --out docs/results/long_context_aot/v5p.json

Needs `libtpu` (the extra `aot`), no TPU. A program that does not fit a chip's memory does not compile: the compiler's
own words are then the result. The sequence is one row, split over the axis fsdp like the parameters; heads over tensor.
Bytes per chip are the compiler's. FLOPs are counted, as the compiler sees neither into kernels nor how often a loop
runs: 2 per weight of a product and token, and for attention the pairs of blocks that the kernel's own walk visits at
these positions, 2 * head_dim per logit and product (2 forward, 3 and 4 in the two backward kernels). A remat of "full"
runs the forward twice.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from experiments import pretrain
from launch import compilers, figures, reports, topologies
from qwen_jax import config, models, sharding
from qwen_jax.batches import LMBatch
from qwen_jax.errors import InputError
from qwen_jax.models.decoder import Decoder, KVCache, head
from qwen_jax.ops import blockwise
from qwen_jax.ops.kernels import flash_tpu
from qwen_jax.sharding import Layout, MeshConfig, Rules
from qwen_jax.training import optimizer, program

MODEL = config.get("qwen2.5-7b-1m")
RULES = Rules(batch=("data", "expert"), length=("fsdp", "context"))
TENSOR = MODEL.num_key_value_heads
LENGTHS = {"prefill": 1_048_576, "train": 262_144}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile.

    Attributes:
        out: JSON file, rewritten after every program.
        slices: names of topologies: see `launch.topologies`.
        programs: of LENGTHS.
    """

    out: Path
    slices: tuple[str, ...] = ("v5e-64", "v5e-256", "v5p-32", "v5p-128", "v6e-32", "v6e-64")
    programs: tuple[str, ...] = tuple(LENGTHS)


def prefill(layout: Layout):
    """Returns the prefill of one prompt, and its arguments: logits of the last token, the cache of keys and values."""
    c, length = MODEL.replace(param_dtype="bfloat16"), LENGTHS["prefill"]
    struct = lambda x, names: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(names, x.shape))
    params = jax.tree.map(struct, models.abstract(c), models.axes(c))
    tokens_BT = struct(jax.ShapeDtypeStruct((1, length), jnp.int32), ("batch", "length"))
    shape = (c.num_hidden_layers, 1, c.num_key_value_heads, length, c.head_dim)
    of_cache = layout.sharding(("layers", "batch", "kv_heads", "length", "head_dim"), shape)

    def run(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens_BT.shape)
        slots = jax.lax.with_sharding_constraint(jnp.zeros(shape, jnp.dtype(c.dtype)), of_cache)
        empty = KVCache(slots, slots, jnp.zeros_like(positions_BT), jnp.zeros_like(positions_BT), jnp.int32(0))
        ones_BT = jnp.ones_like(positions_BT)
        hidden_BTD, cache, _ = Decoder(c, layout).apply({"params": params}, tokens_BT, positions_BT, ones_BT, empty)
        logits_BV = jnp.einsum("BD,VD->BV", hidden_BTD[:, -1], head(c, params, layout).astype(hidden_BTD.dtype))
        return logits_BV, cache.k, cache.v

    return jax.jit(run, out_shardings=(None, of_cache, of_cache)), (params, tokens_BT)


def train(layout: Layout):
    """Returns the step of one row, and its arguments: AdamW, float32 masters, the state donated, layers recomputed."""
    model, ints = MODEL.replace(remat="full"), jax.ShapeDtypeStruct((1, LENGTHS["train"]), jnp.int32)
    floats = jax.ShapeDtypeStruct(ints.shape, jnp.float32)
    built = program.build(
        init_params=functools.partial(models.init, model),
        param_axes=models.axes(model),
        loss_fn=functools.partial(pretrain.language_model_loss, model=model, layout=layout),
        tx=optimizer.make(optimizer.OptimizerConfig(), 1000),
        batch=LMBatch(tokens=ints, targets=ints, loss_mask=floats, segment_ids=ints, positions=ints),
        layout=layout,
    )
    return built.train_step, (built.state, built.batch)


def logits_visited(length: int, parts: int) -> tuple[list[int], int]:
    """Returns how many logits of one query head each of `parts` equal shares of the queries visits, and of the square.

    The kernel's own walk over the keys of the whole row is asked: what it does not list it does not compute.
    """
    G = MODEL.num_attention_heads // MODEL.num_key_value_heads
    spec = blockwise.Spec(1.0, True, flash_tpu.LANES, flash_tpu.LANES, MODEL.dual_chunk.stride)
    keys = jnp.arange(length, dtype=jnp.int32)[None]
    found = []
    for part in range(parts):
        mine = keys[:, part * length // parts : (part + 1) * length // parts]
        marks = blockwise.Marks(mine, keys, jnp.ones_like(mine), jnp.ones_like(keys))
        pairs, _, of_pair = flash_tpu.visited(marks, spec, G)
        found.append(int(pairs) * of_pair // G)
    return found, length * length


def flops(name: str, parts: int, chips: int) -> dict:
    """Returns the counted FLOPs, as the docstring of the module says."""
    length, c = LENGTHS[name], MODEL
    runs, products = {"prefill": (1, 2), "train": (4, 2 + 2 + 3 + 4)}[name]  # forward; forward, again, backward
    weights = c.param_counts()["non_embedding"]  # norms and biases among them, a ten-thousandth
    vocabulary = 2 * c.vocab_size * c.hidden_size * {"prefill": 1, "train": 4 * length}[name]
    found, square = logits_visited(length, parts)
    of_logit = products * 2 * c.head_dim * c.num_attention_heads * c.num_hidden_layers
    return {
        "weights": 2 * runs * weights * length + vocabulary,
        "attention": sum(found) * of_logit,
        "attention, full square": square * of_logit,
        "attention, of the full square": round(sum(found) / square, 4),
        "attention, most of one chip": max(found) * of_logit * parts // chips,
        "attention, mean of a chip": sum(found) * of_logit // chips,
    }


def compile_for(name: str, slice_name: str) -> dict:
    """Returns what the compiler says of one program on one slice."""
    topology = topologies.parse(slice_name)
    shape = MeshConfig(fsdp=topology.chips // TENSOR, tensor=TENSOR)
    layout = Layout(sharding.make_mesh(shape, compilers.devices(topology)), RULES)
    row = {"program": name, "tokens": LENGTHS[name], "slice": slice_name, "chips": topology.chips}
    row |= {"mesh": {"fsdp": shape.fsdp, "tensor": shape.tensor}}
    function, arguments = {"prefill": prefill, "train": train}[name](layout)
    found = figures.compile_function(function, arguments, topology.of_chip)
    return row | reports.of_function(found, topology.of_chip) | {"counted": flops(name, shape.fsdp, topology.chips)}


def main(options: Options) -> int:
    """Compiles one program after the other and rewrites the report after each."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.programs:
        for topology in options.slices:
            try:
                rows.append(compile_for(name, topology))
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            report = {"model": "qwen2.5-7b-1m"} | reports.versions(topologies.parse(topology)) | {"programs": rows}
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
