"""Dual chunk attention: the matrix of distances against the papers' figures and against loops, outputs and gradients
against one softmax over logits made pair by pair from that matrix."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qwen_jax import sharding
from qwen_jax.errors import InputError
from qwen_jax.long_context import DualChunk, V1Lengths, Yarn
from qwen_jax.ops import attention as ops
from qwen_jax.ops import blocks, dual_chunk, rope_scaling
from tests.conftest import MESHES
from tests.ops.test_attention import arrays, assert_close, marks, with_gradients

THETA = 100.0


def distance(i: int, j: int, chunks: DualChunk) -> int:
    """What query i takes its distance to key j for; the definition, pair by pair."""
    s, apart = chunks.stride, i // chunks.stride - j // chunks.stride
    farthest = chunks.chunk_size - (chunks.clamp == "paper")
    q = i % s if apart == 0 else min(i % s + s, farthest) if apart == 1 else min(2 * s - 1, farthest)
    return q - j % s


LONGEST = 80


def matrix(chunks: DualChunk) -> np.ndarray:
    """The distances that the code computes, from its positions and windows; -1 where a query sees nothing."""
    length, positions = LONGEST, jnp.arange(LONGEST)[None]
    q_ABT, k_BS = dual_chunk.query_positions(positions, chunks), dual_chunk.key_positions(positions, chunks)
    since_ABT, until_ABT = dual_chunk.windows(positions, chunks.stride)
    out = np.full((length, length), -1)
    for kind in dual_chunk.KINDS:
        q, since, until = (np.asarray(x[kind, 0])[:, None] for x in (q_ABT, since_ABT, until_ABT))
        seen = (since <= positions) & (positions <= until)
        assert (out[seen] == -1).all()  # no pair is of two kinds
        out = np.where(seen, q - np.asarray(k_BS), out)
    return out


PRINTED = {  # rows of the papers' figures: arXiv:2402.17463 figure 2 under both clamps, arXiv:2501.15383 figure 2
    (10, 4, "paper"): {
        9: "9 8 7 6 5 4 3 2 1 0", 10: "9 8 7 6 5 4 4 3 2 1 0", 11: "9 8 7 6 5 4 5 4 3 2 1 0",
        12: "9 8 7 6 5 4 6 5 4 3 2 1 0", 13: "9 8 7 6 5 4 7 6 5 4 3 2 1 0",
    },
    (10, 4, "code"): {
        10: "10 9 8 7 6 5 4 3 2 1 0", 11: "10 9 8 7 6 5 5 4 3 2 1 0", 12: "10 9 8 7 6 5 6 5 4 3 2 1 0",
        13: "10 9 8 7 6 5 7 6 5 4 3 2 1 0",
    },
    (8, 3, "paper"): {8: "7 6 5 4 3 3 2 1 0", 10: "7 6 5 4 3 5 4 3 2 1 0"},
}  # fmt: skip


@pytest.mark.parametrize("sizes", PRINTED, ids=str)
def test_distances_are_those_that_the_papers_print(sizes):
    found = matrix(DualChunk(*sizes[:2], clamp=sizes[2]))
    for row, text in PRINTED[sizes].items():
        assert found[row, : row + 1].tolist() == [int(x) for x in text.split()]


@st.composite
def chunk_sizes(draw):
    chunk = draw(st.integers(2, 24))
    return DualChunk(chunk, draw(st.integers(1, chunk // 2)), clamp=draw(st.sampled_from(("code", "paper"))))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(chunk_sizes())
def test_the_whole_matrix_equals_the_definition(chunks):
    index = np.arange(LONGEST)
    true = index[:, None] - index
    expected = np.array([[distance(i, j, chunks) if j <= i else -1 for j in index] for i in index])
    found = matrix(chunks)
    np.testing.assert_array_equal(found, expected)
    causal = true >= 0
    assert found.max() <= chunks.farthest and found[causal].min() >= 0
    assert (found == true)[causal & (true <= chunks.local_size)].all()
    reach = min(chunks.farthest + 1, 2 * chunks.stride)  # up to here it is plain attention
    assert (found == true)[:reach][causal[:reach]].all() and not (found == true)[reach][causal[reach]].all()


def turned(x, angles):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def all_distances(chunks, q_positions, kv_positions):
    return np.vectorize(functools.partial(distance, chunks=chunks))(q_positions[:, :, None], kv_positions[:, None])


@with_gradients
def pair_by_pair(q, k, v, distances, q_positions, kv_positions, q_segments, kv_segments):
    """One softmax over all visible keys; each logit from the query turned by its distance to that very key."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    angles = distances[..., None] * (THETA ** (-np.arange(0, H, 2, dtype=np.float32) / H))[None, None, None]
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    q_BTSNH = turned(jnp.broadcast_to(q[:, :, None], (B, T, S, N, H)), angles[..., None, :])
    logits = jnp.einsum("btsnh,bsnh->btns", q_BTSNH, k) / np.sqrt(H)
    seen = (q_segments[:, :, None] == kv_segments[:, None]) & (q_segments != 0)[:, :, None]
    seen = (seen & (kv_positions[:, None] <= q_positions[:, :, None]))[:, :, None]
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits, 0.0)), 0.0)
    total = weights.sum(-1)
    safe = jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("btns,bsnh->btnh", weights, v) / safe[..., None]
    return out, jnp.where(total == 0, ops.NEG_INF, jnp.log(safe))


def rotation(chunks, positions, head_dim):
    """As a model makes it."""
    off = dict(yarn=Yarn(), v1=V1Lengths())
    return rope_scaling.rotation(positions, positions + 1, head_dim=head_dim, theta=THETA, chunks=chunks, **off)


def ours(chunks, q, k, v, q_positions, kv_positions, q_segments, kv_segments, **keywords):
    """Unrotated queries and keys in; rotated as a model does it."""
    where = dict(q_positions_BT=q_positions, kv_positions_BS=kv_positions)
    where |= dict(q_segment_ids_BT=q_segments, kv_segment_ids_BS=kv_segments)
    q, k = rotation(chunks, q_positions, q.shape[-1]).queries(q), rotation(chunks, kv_positions, q.shape[-1]).keys(k)
    return ops.attention(q, k, v, **where, stride=chunks.stride, **keywords)


def rotated(chunks, kind, shape):
    """What a back end is given for a kind of marks and (B, T, S, N, K, H): arrays with both cotangents, and marks."""
    seen_by = non_negative(*marks(1, kind, *shape[:3]))
    q, k, v, *cotangents = arrays(0, *shape)
    queries, keys = (rotation(chunks, positions, shape[-1]) for positions in seen_by[:2])
    return (queries.queries(q), keys.keys(k), v, *cotangents), seen_by


def non_negative(q_positions, kv_positions, *segments):
    return abs(q_positions), abs(kv_positions), *segments


@st.composite
def cases(draw):
    chunks = draw(chunk_sizes())
    divisors = [size for size in range(1, chunks.stride + 1) if chunks.stride % size == 0]
    blocks = tuple(draw(st.sampled_from(divisors)) for _ in range(2))
    T = draw(st.integers(1, 60))
    return chunks, blocks, T, draw(st.one_of(st.just(T), st.integers(1, 70))), draw(st.integers(1, 3))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 2**32 - 1))
def test_outputs_and_all_gradients_equal_one_softmax_pair_by_pair(case, seed):
    chunks, blocks, T, S, G = case
    found = with_gradients(functools.partial(ours, chunks, backend="blockwise", block_sizes=blocks))
    for kind in ("ordinary", "packed", "cache", "random"):
        inputs, seen_by = arrays(seed, 2, T, S, 2 * G, 2, 8), non_negative(*marks(seed, kind, 2, T, S))
        expected = pair_by_pair(*inputs, all_distances(chunks, *seen_by[:2]), *seen_by)
        assert_close(found(*inputs, *seen_by), expected, tolerance=3e-5)  # angles of up to 24 radians in float32


def test_the_reference_is_the_same():
    chunks, seen_by = DualChunk(10, 4), non_negative(*marks(3, "packed", 2, 50, 50))
    inputs = arrays(3, 2, 50, 50, 4, 2, 8)
    found = with_gradients(functools.partial(ours, chunks, backend="reference"))(*inputs, *seen_by)
    assert_close(found, pair_by_pair(*inputs, all_distances(chunks, *seen_by[:2]), *seen_by), 3e-5)


def test_it_is_plain_attention_up_to_the_length_of_training():
    blocks = dict(backend="blockwise", block_sizes=(8, 8))
    plain = with_gradients(functools.partial(ours, DualChunk(), **blocks))
    inputs, positions = arrays(4, 1, 34, 34, 4, 2, 8), np.arange(34, dtype=np.int32)[None]
    for clamp, reach in (("code", 33), ("paper", 32)):
        found = with_gradients(functools.partial(ours, DualChunk(32, 8, clamp=clamp), **blocks))
        for length in (32, 33, 34):
            segments = (positions < length).astype(np.int32)  # behind it padding
            seen_by = positions, positions, segments, segments
            ours_, plain_ = found(*inputs, *seen_by), plain(*inputs, *seen_by)
            if length <= reach:
                assert_close(ours_, plain_)
            else:
                assert np.abs(ours_[0] - plain_[0]).max() > 1e-3
                assert_close([x[:, :reach] for x in ours_[:2]], [x[:, :reach] for x in plain_[:2]])


@functools.partial(jax.jit, static_argnums=1)
def block_pairs(seen_by, spec):
    """How many key blocks each kind of each query block runs over, [A, I]."""
    found = blocks.ranges(*blocks.cut_both(seen_by, spec), spec)
    return jnp.maximum(found.last_AI - found.first_AI, 0)


def test_each_pair_of_blocks_is_of_one_kind():
    positions = jnp.arange(256)[None]
    seen_by = blocks.Marks(positions, positions, *(jnp.ones_like(positions),) * 2)

    pairs = lambda stride: int(block_pairs(seen_by, blocks.Spec(1.0, True, 16, 8, stride)).sum())
    assert pairs(48) == pairs(None) == sum(2 * (i + 1) for i in range(16))


def test_documents_shorter_than_a_chunk_cost_nothing_more_in_a_packed_row():
    segments = jnp.repeat(jnp.arange(1, 9), 40)[None]
    positions = jnp.tile(jnp.arange(40), 8)[None]
    seen_by = blocks.Marks(positions, positions, segments, segments)
    assert not block_pairs(seen_by, blocks.Spec(1.0, True, 16, 16, 48))[1:].any()


def test_auto_offers_the_kernel_to_a_tpu_with_chunks_and_without():
    mesh = sharding.make_mesh(MESHES["fsdp8"])
    inputs = *arrays(0, 8, 128, 128, 2, 1, 8)[:3], *marks(0, "ordinary", 8, 128, 128)

    def program(chunks):
        local = jax.shard_map(functools.partial(ours, chunks), mesh=mesh, in_specs=rows, out_specs=rows)
        return str(jax.make_jaxpr(local)(*inputs))

    rows = jax.sharding.PartitionSpec("fsdp")
    assert "pallas_call" in program(DualChunk()) and "pallas_call" in program(DualChunk(64, 16))


def test_block_sizes_divide_the_stride_where_a_large_one_does():
    assert ops._size_within_chunks(262_144 - 8_192, 1 << 20, 128) == 128
    assert ops._size_within_chunks(7 * 100, 4096, 128) == 100
    assert ops._size_within_chunks(4_999, 4096, 128) == 128  # a prime
    assert ops._size_within_chunks(896, 70, 128) == 70


@pytest.mark.parametrize("keywords, message", [
    (dict(block_sizes=(16, 7), backend="blockwise"), "blocks of 7 do not divide the stride of 48"),
    (dict(causal=False), "causal False"),
], ids=str)  # fmt: skip
def test_what_has_no_chunks_is_refused(keywords, message):
    inputs = *arrays(9, 1, 64, 64, 2, 1, 8)[:3], *marks(0, "ordinary", 1, 64, 64)
    with pytest.raises(InputError, match=message):
        ours(DualChunk(64, 16), *inputs, **keywords)


def test_queries_rotated_once_are_refused():
    q, k, v, *_ = arrays(9, 1, 8, 8, 2, 1, 8)
    names = ("q_positions_BT", "kv_positions_BS", "q_segment_ids_BT", "kv_segment_ids_BS")
    seen_by = dict(zip(names, marks(0, "ordinary", 1, 8, 8), strict=True))
    with pytest.raises(InputError, match=r"\(1, 8, 2, 8\); .* expects \[3, B, T, N, H\]"):
        ops.attention(q, k, v, **seen_by, stride=4)


@pytest.mark.parametrize("fields, message", [
    (dict(chunk_size=32, local_size=17), "local_size is 17; expected 1 to 16, half of chunk_size 32"),
    (dict(chunk_size=32), "local_size is 0"),
    (dict(chunk_size=-1), "chunk_size is -1"),
    (dict(chunk_size=32, local_size=8, clamp="both"), "clamp is 'both'; expected one of code, paper"),
], ids=str)  # fmt: skip
def test_impossible_chunks_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        DualChunk(**fields)
