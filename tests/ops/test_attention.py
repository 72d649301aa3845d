"""Attention: the reference against loops, other back ends against the reference, on one device and on many."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec

from qwen_jax import sharding
from qwen_jax.errors import InputError
from qwen_jax.ops import attention as ops

TOLERANCE = 1e-5  # float32 sums in another order; absolute where values are of order 1
MARKS = ("q_positions_BT", "kv_positions_BS", "q_segment_ids_BT", "kv_segment_ids_BS")


def arrays(seed, B, T, S, N, K, H):
    """Returns q, k, v and cotangents of out and logsumexp."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H), (B, T, N)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def marks(seed, kind, B, T, S):
    """Returns positions and segment ids: ordinary rows, packed rows with padding, a cache, or anything at all."""
    rng = np.random.default_rng(seed)
    q_positions, kv_positions = np.arange(T)[None].repeat(B, 0), np.arange(S)[None].repeat(B, 0)
    q_segments, kv_segments = np.ones((B, T)), np.ones((B, S))
    if kind == "packed":  # the first queries' documents, cut at random, then padding; positions restart
        q_segments, q_positions = packed(rng, B, T)
        kv_segments, kv_positions = np.zeros((B, S)), np.zeros((B, S))
        kv_segments[:, :T], kv_positions[:, :T] = q_segments[:, :S], q_positions[:, :S]
    if kind == "cache":  # the queries are the last of the written slots, and those begin with padding
        written = rng.integers(min(T, S), S + 1)
        q_positions = q_positions + written - T
        kv_segments = ((kv_positions < written) & (kv_positions >= rng.integers(0, S, (B, 1)))).astype(int)
    if kind == "random":
        q_positions, kv_positions = rng.integers(-9, 30, (B, T)), rng.integers(-9, 30, (B, S))
        q_segments, kv_segments = rng.integers(-1, 3, (B, T)), rng.integers(-1, 3, (B, S))
    return tuple(np.asarray(x, np.int32) for x in (q_positions, kv_positions, q_segments, kv_segments))


def packed(rng, B, T):
    starts = rng.random((B, T)) < 3 / T
    segments = 1 + np.cumsum(starts, axis=1)
    index = np.arange(T)[None].repeat(B, 0)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    padding = index >= T - T // 5
    return np.where(padding, 0, segments), np.where(padding, 0, positions)


def reference(q, k, v, *marks, **keywords):
    return ops.attention(q, k, v, **dict(zip(MARKS, marks, strict=True)), backend="reference", **keywords)


def by_blocks(q, k, v, *marks, causal=True, blocks=(16, 16), backend="blockwise"):
    keywords = dict(zip(MARKS, marks, strict=True), causal=causal, block_sizes=blocks)
    return ops.attention(q, k, v, **keywords, backend=backend)


def with_gradients(attend):
    """Returns a function of (q, k, v, both cotangents, marks) to both outputs and the gradients of q, k and v."""

    def run(q, k, v, d_out, d_logsumexp, *marks):
        outputs, pull = jax.vjp(lambda *qkv: attend(*qkv, *marks), q, k, v)
        return *outputs, *pull((d_out, d_logsumexp))

    return jax.jit(run)


def assert_close(actual, expected, tolerance=TOLERANCE):
    for name, a, b in zip(("out", "logsumexp", "dq", "dk", "dv"), actual, expected, strict=False):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


def loops(q, k, v, q_positions, kv_positions, q_segments, kv_segments, *, causal):
    """The definition, one query at a time, in float64."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out, logsumexp = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        seen = []
        for s in range(S):
            same = q_segments[b, t] == kv_segments[b, s] and q_segments[b, t] != 0
            if same and (not causal or kv_positions[b, s] <= q_positions[b, t]):
                seen.append(s)
        if seen:
            keys, values = (x[b, seen, n // (N // K)].astype(np.float64) for x in (k, v))
            weights = np.exp(keys @ q[b, t, n] / math.sqrt(H))
            out[b, t, n], logsumexp[b, t, n] = weights @ values / weights.sum(), np.log(weights.sum())
    return out, np.maximum(logsumexp, ops.NEG_INF)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["packed", "random"])
def test_reference_equals_the_definition_in_loops(kind, causal):
    q, k, v, *_ = arrays(0, 2, 9, 11, 4, 2, 8)
    seen_by = marks(0, kind, 2, 9, 11)
    assert_close(reference(q, k, v, *seen_by, causal=causal), loops(q, k, v, *seen_by, causal=causal))


@st.composite
def shapes(draw):
    B, K, G = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    T = draw(st.one_of(st.just(1), st.integers(2, 70)))
    S = draw(st.one_of(st.just(T), st.integers(1, 90)))
    return B, T, S, K * G, K, draw(st.sampled_from((4, 8, 24)))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(shapes(), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.booleans(), st.integers(0, 2**32 - 1))
def test_blockwise_equals_the_reference_with_all_gradients(shape, blocks, causal, seed):
    expected = with_gradients(functools.partial(reference, causal=causal))
    actual = with_gradients(functools.partial(by_blocks, causal=causal, blocks=blocks))
    for kind in ("ordinary", "packed", "cache", "random"):
        inputs = *arrays(seed, *shape), *marks(seed, kind, *shape[:3])
        assert_close(actual(*inputs), expected(*inputs))


@pytest.mark.parametrize("T, S", [(1, 300), (150, 150)])
def test_auto_equals_the_reference(T, S):
    inputs = *arrays(1, 2, T, S, 4, 2, 8), *marks(1, "cache", 2, T, S)
    auto = lambda q, k, v, *marks: ops.attention(q, k, v, **dict(zip(MARKS, marks, strict=True)))
    assert_close(with_gradients(auto)(*inputs), with_gradients(reference)(*inputs))


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    q, k, v, *cotangents = arrays(2, 1, 40, 40, 2, 1, 8)
    nothing = np.arange(40)[None] % 3 == 0
    positions, segments = np.arange(40)[None], np.where(nothing, 0, 1)
    out, logsumexp, dq, _, _ = with_gradients(by_blocks)(q, k, v, *cotangents, *(positions,) * 2, *(segments,) * 2)
    assert not np.any(np.asarray(out)[nothing]) and not np.any(np.asarray(dq)[nothing])
    assert np.all(np.asarray(logsumexp)[nothing] == ops.NEG_INF)


def test_outputs_over_halves_of_the_keys_merge_into_the_whole_with_its_gradients():
    inputs = *arrays(3, 2, 40, 50, 4, 2, 8), *marks(3, "random", 2, 40, 50)

    def merged(q, k, v, q_positions, kv_positions, q_segments, kv_segments):
        parts = []
        for half in (slice(0, 23), slice(23, None)):
            keys = k[:, half], v[:, half], q_positions, kv_positions[:, half], q_segments, kv_segments[:, half]
            parts.append(by_blocks(q, *keys))
        (out_a, a), (out_b, b) = parts
        whole = jnp.logaddexp(a, b)
        return out_a * jnp.exp(a - whole)[..., None] + out_b * jnp.exp(b - whole)[..., None], whole

    assert_close(with_gradients(merged)(*inputs), with_gradients(reference)(*inputs))


def test_bfloat16_goes_in_and_out_and_sums_stay_float32():
    inputs = arrays(4, 2, 60, 60, 4, 2, 16)
    seen_by = marks(4, "packed", 2, 60, 60)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs[:4]]
    actual = with_gradients(by_blocks)(*rounded, inputs[4], *seen_by)
    assert [x.dtype for x in actual] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 3
    expected = with_gradients(reference)(*(x.astype(jnp.float32) for x in rounded), inputs[4], *seen_by)
    # Weights and results are rounded to 8 bits, the sums are not: the error is that of a few roundings, at any length.
    assert_close([x.astype(jnp.float32) for x in actual], expected, tolerance=3e-2)
    assert_close(actual[1:2], expected[1:2])


def poisoned(k, v, slots):
    """Returns k and v with NaN in `slots`: any product with them shows in the result."""
    return tuple(np.where(np.asarray(slots)[:, :, None, None], np.float32(np.nan), x) for x in (k, v))


def test_blocks_of_later_keys_of_other_documents_and_of_empty_slots_are_not_touched():
    B, T = 2, 64
    q, k, v, d_out, d_logsumexp = arrays(5, B, T, T, 4, 2, 8)
    index = np.arange(T)[None].repeat(B, 0)
    cases = {  # positions, segment ids, keys that are NaN, the 16 queries that may not see them
        "later": (index, np.ones_like(index), index >= 32, slice(16, 32)),
        "documents": (index % 32, 1 + index // 32, index < 32, slice(32, 48)),
        "padding": (index, (index < 32).astype(int), index >= 32, slice(16, 32)),
    }
    run = with_gradients(by_blocks)
    for name, (positions, segments, bad, rows) in cases.items():
        marks = positions[:, rows], positions, segments[:, rows], segments
        cotangents = d_out[:, rows], d_logsumexp[:, rows]
        dirty = run(q[:, rows], *poisoned(k, v, bad), *cotangents, *marks)
        assert_close(dirty, run(q[:, rows], k, v, *cotangents, *marks))
        assert all(np.all(np.isfinite(x)) for x in dirty), name


def test_temporary_memory_grows_linearly():
    def temporary(T):
        B, N, K, H = 1, 4, 2, 16
        shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H), (B, T, N)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        inputs += [jax.ShapeDtypeStruct((B, T), jnp.int32)] * 4
        attend = lambda q, k, v, *marks: ops.attention(q, k, v, **dict(zip(MARKS, marks, strict=True)))
        return with_gradients(attend).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    small, middle, large = temporary(2048), temporary(4096), temporary(8192)
    assert middle / small < 2.3 and large / middle < 2.3, (small, middle, large)


def test_remat_policy_that_keeps_the_named_outputs_runs_the_forward_once():
    q, k, v, *_ = arrays(6, 1, 32, 32, 2, 1, 8)
    seen_by = marks(6, "ordinary", 1, 32, 32)
    keep = jax.checkpoint_policies.save_only_these_names(ops.RESIDUALS)
    loss = lambda q, k, v: jnp.sum(by_blocks(jnp.sin(q), k, v, *seen_by)[0] ** 2)
    text = [str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=p)))(q, k, v)) for p in (keep, None)]
    assert [x.count("while[") for x in text] == [2, 3]


SHARDED = (8, 48, 48, 4, 2, 8)


def partitions(layout):
    """Returns the partition specs of (q, k, v, both cotangents, marks), and of the outputs and gradients."""
    rows = layout.rules.spec(("batch", "length", "heads", "head_dim"))
    keys = layout.rules.spec(("batch", None, "kv_heads", "head_dim"))
    mark, key_mark = layout.rules.spec(("batch", "length")), layout.rules.spec(("batch", None))
    stats = PartitionSpec(*rows[:3])
    return (rows, keys, keys, rows, stats, mark, key_mark, mark, key_mark), (rows, stats, rows, keys, keys)


def test_sharded_equals_one_device(mesh):
    layout = sharding.Layout(mesh)
    into, out_of = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), partitions(layout))
    run = with_gradients(by_blocks)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays(0, *SHARDED), *marks(0, "random", *SHARDED[:3]))]
    compiled = jax.jit(run, in_shardings=into, out_shardings=out_of).lower(*shapes).compile()
    for kind in ("packed", "random"):
        inputs = *arrays(7, *SHARDED), *marks(7, kind, *SHARDED[:3])
        assert_close(compiled(*jax.device_put(inputs, into)), run(*inputs))
    if mesh.shape["context"] == 1:  # batch and heads need nothing of one another: only block ranges are agreed on
        assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


def test_inside_shard_map_each_device_skips_by_its_own_rows_and_keys_sum_their_gradients(mesh):
    inputs = *arrays(8, *SHARDED), *marks(8, "packed", *SHARDED[:3])
    into, out_of = partitions(sharding.Layout(mesh))

    def run(q, k, v, d_out, d_logsumexp, *marks):
        specs = into[:3] + into[5:]
        attend = jax.shard_map(
            functools.partial(by_blocks, backend="tpu"), mesh=mesh, in_specs=specs, out_specs=out_of[:2]
        )
        return with_gradients(attend)(q, k, v, d_out, d_logsumexp, *marks)

    assert_close(jax.jit(run)(*inputs), with_gradients(by_blocks)(*inputs))


def test_an_unknown_back_end_is_refused():
    q, k, v, *_ = arrays(9, 1, 4, 4, 1, 1, 4)
    with pytest.raises(InputError, match="'flash' is unknown; expected one of auto, "):
        ops.attention(q, k, v, **dict(zip(MARKS, marks(0, "ordinary", 1, 4, 4), strict=True)), backend="flash")
