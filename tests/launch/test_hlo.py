"""Reading compiled programs: what they do against what is known of them by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import figures, hlo, kernels
from launch.topologies import Chip
from qwen_jax import sharding
from qwen_jax.sharding import MeshConfig

LAYERS, ROWS, WIDTH, INNER = 5, 16, 64, 96


def compiled_scan(mesh):
    """x -> x . w1 . w2 for each layer, inner widths over tensor: an all-reduce a layer."""
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    struct = lambda shape, *names: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(*names))

    def run(x, up, down):
        def layer(x, weights):
            return jax.lax.with_sharding_constraint((x @ weights[0]) @ weights[1], place("fsdp")), None

        return jax.lax.scan(layer, x, (up, down))[0]

    weights = struct((LAYERS, WIDTH, INNER), None, None, "tensor"), struct((LAYERS, INNER, WIDTH), None, "tensor")
    return jax.jit(run).lower(struct((ROWS, WIDTH), "fsdp"), *weights).compile()


def test_loops_count_as_often_as_they_run():
    text = compiled_scan(sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))).as_text()
    found = hlo.cost(text)
    assert found.flops == LAYERS * 2 * 2 * ROWS * WIDTH * INNER / 8
    moved = {kind: size for (kind, *_), size in found.collectives.items()}
    assert moved == {"all-reduce": LAYERS * ROWS / 4 * WIDTH * 4}
    weights = LAYERS * 2 * WIDTH * INNER / 2 * 4  # each read once; activations are small beside them
    assert weights < found.memory < 4 * weights
    assert {link for _, link, _ in found.collectives} == {"ici"}
    assert {link for _, link, _ in hlo.cost(text, 2).collectives} == {"ici"}  # pairs are neighbours
    assert {link for _, link, _ in hlo.cost(text, 1).collectives} == {"dcn"}


LOOP = """
HloModule m, is_scheduled=true

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[], bf16[8,128]) parameter(0)
  %counter = s32[] get-tuple-element(%p), index=0
  BOUND
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%start (a: bf16[4,128]) -> (bf16[4,128], bf16[8,128]) {
  %a = bf16[4,128]{1,0} parameter(0)
  %all-gather.1 = bf16[8,128]{1,0} all-gather(%a), channel_id=1, CHAIN={chain_id="0"}
  ROOT %c = (bf16[4,128]{1,0}, bf16[8,128]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (b: bf16[4,128]) -> bf16[8,128] {
  %b = bf16[4,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,128]{1,0} all-gather(%b), channel_id=1, CHAIN={chain_id="0"}
}

%all-reduce-scatter.3 (c: bf16[8,128]) -> bf16[4,128] {
  %c1 = bf16[8,128]{1,0} parameter(0)
  %all-reduce.3 = bf16[8,128]{1,0} all-reduce(%c1), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %cut = bf16[4,128]{1,0} slice(%all-reduce.3), slice={[0:4], [0:128]}
}

%body (q: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %q = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%q), index=1
  %one = s32[] constant(2)
  %next = s32[] add(%i, %one)
  %f = (bf16[4,128]{1,0}, bf16[8,128]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %g = bf16[8,128]{1,0} fusion(%x), kind=kOutput, calls=%middle, backend_config={"estimated_cycles":"70"}
  %r = bf16[4,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %send.1 = (bf16[8,128], u32[], token[]) send(%g), channel_id=4, SLICES={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %t = (s32[], bf16[8,128]) tuple(%next, %g)
}

ENTRY %main (z: bf16[8,128]) -> bf16[8,128] {
  %z = bf16[8,128]{1,0} parameter(0)
  %w = (s32[], bf16[8,128]) while(%z), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_what_tpu_programs_are_written_like():
    """7 rounds by twos are 4; a collective in pieces is one; a reduce-scatter is told from an all-reduce."""
    found = hlo.cost(LOOP.replace("BOUND", "%bound = s32[] constant(7)"))
    assert found.collectives == {
        ("all-gather", "ici", True): 4 * 2048, ("reduce-scatter", "ici", False): 4 * 2048,
        ("all-reduce", "dcn", True): 4 * 2048,
    }  # fmt: skip
    assert found.cycles == 280 and not found.rounds
    unknown = hlo.cost(LOOP.replace("BOUND", "%bound = s32[] get-tuple-element(%p), index=0"))
    assert not unknown.collectives and unknown.rounds["all-gather", "ici", True] == 2048


@pytest.mark.parametrize(
    "text, flops",
    [
        ("f32[2,10,7] convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf", 2 * 2 * 10 * 5 * 7),
        ("f32[10,7,1] convolution(%a, %c), window={size=2}, dim_labels=0bf_0io->bf0", 2 * 2 * 10 * 5 * 7),
        # A product of a batch of two: the window steps over one of them at a time.
        (
            "f32[2,10,7] convolution(%a, %c), window={size=2 stride=1 pad=0_1 lhs_dilate=2}, dim_labels=0bf_0io->0bf",
            2 * 2 * 10 * 5 * 7,
        ),
        ("f32[2,10,2,7] dot(%a, %c), lhs_contracting_dims={2}, rhs_contracting_dims={1}", 2 * 2 * 10 * 2 * 7 * 5),
    ],
)
def test_products_of_tpus_are_convolutions(text, flops):
    program = f"""ENTRY %main () -> f32[] {{
  %a = f32[2,10,5] parameter(0)
  %b = f32[5,7,1] parameter(1)
  %c = f32[2,5,7] parameter(2)
  ROOT %r = {text}
}}"""
    assert hlo.cost(program).flops == flops


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}, x", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4]]),
])  # fmt: skip
def test_groups_of_devices(text, groups):
    assert hlo.groups(text) == groups


def test_kernels_are_known_by_their_shapes():
    """B 2, K 3, G 4, T = S = 1024, H 64, by a TPU's blocks of 256 positions; 2, 3 and 4 products of half a square."""
    query, key, rows = [1, 2, 3, 4, 1024, 64], [1, 2, 3, 2, 512, 64], [1, 2, 3, 4, 1, 1024]
    inputs = [("s32", [1, 2, 8]), *(("bf16", sides) for sides in (query, key, key))]
    square = 2 * 12 * 1024 * 1024 * 64
    for outputs, products in (([query, rows], 2), ([query], 3), ([key, key], 4)):
        assert kernels.flops(inputs, [("bf16", sides) for sides in outputs]) == ("attention", products * square)
    gpu = [("bf16", [3, 2, 1024, 12, 64]), ("bf16", [2, 1024, 3, 64]), ("bf16", [2, 1024, 3, 64])]
    assert kernels.flops(gpu, [("bf16", [2, 1024, 12, 64]), ("f32", [2, 1024, 12])]) == ("attention", 2 * square)
    assert kernels.flops(gpu, [("bf16", [2, 1024, 3, 64])] * 2) == ("attention", 4 * square)
    rows, weights, out = ("bf16", [100, 8]), ("bf16", [4, 8, 6]), ("bf16", [100, 6])
    assert kernels.flops([("s32", [5]), rows, weights], [out]) == ("experts", 2 * 100 * 8 * 6)
    assert kernels.flops([("bf16", [8, 100]), out], [weights]) == ("experts", 2 * 100 * 8 * 6)
    assert kernels.flops([rows], [rows]) == ("other", 0.0)


def test_seconds_are_of_what_takes_longest_and_of_what_cannot_hide():
    chip = Chip("tpu", flops=100.0, capacity=1, memory=10.0, ici=5.0, dcn=1.0, clock=10.0)
    cost = functools.partial(hlo.Cost, 200.0, {"attention": 60.0}, 10.0, 20.0)
    found = figures.seconds(cost({("all-gather", "ici", True): 5.0, ("all-reduce", "ici", False): 5.0}, {}), chip)
    assert found == dict(products=2.6, memory=1.0, ici=3.0, dcn=0.0, roofline=4.6, cycles=2.0, compiler=5.0)
    found = figures.seconds(cost({("all-gather", "dcn", True): 5.0}, {}), chip)
    assert found["roofline"] == pytest.approx(5.0)  # the transfer is longer than the work that hides it
    gpu = Chip("cuda", flops=100.0, capacity=1, memory=10.0, ici=5.0, dcn=1.0)
    assert "compiler" not in figures.seconds(cost({}, {}), gpu)


@pytest.mark.parametrize("message, needed", [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded", 17.5 * 2**30),
    ("the total memory required for HLO temporaries (298.12G) exceeds available HBM (15.75G).", int(298.12 * 2**30)),
    ("RESOURCE_EXHAUSTED: otherwise", None),
])  # fmt: skip
def test_how_much_too_much_is_read_from_the_refusal(message, needed):
    assert figures.needed(message) == needed
