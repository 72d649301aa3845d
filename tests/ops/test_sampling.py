"""Every sampling function equals a plain loop over one row at a time, on free input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwen_jax.ops import sampling

SHAPE = (2, 9)  # one shape: each new one compiles
# Neither -0.0 nor subnormal numbers: XLA takes those for 0.
ordinary = st.floats(-30, 30, width=32, allow_subnormal=False)
logits = hnp.arrays(np.float32, SHAPE, elements=ordinary).map(lambda x: x + 0.0)
flags = hnp.arrays(bool, SHAPE)
many = settings(deadline=None, max_examples=60)


def softmax(row):
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


def kept(filtered, before):
    """Which entries a filter left as they were; the others have to be gone altogether."""
    filtered = np.asarray(filtered)
    assert ((filtered == before) | (filtered == np.float32(sampling.NEG_INF))).all()
    return filtered == before


@many
@given(logits, flags, st.floats(0.25, 4, width=32, allow_subnormal=False))
def test_repetition_penalty(x, seen, penalty):
    expected = x.copy()
    for i, j in np.argwhere(seen):
        expected[i, j] = x[i, j] / np.float32(penalty) if x[i, j] > 0 else x[i, j] * np.float32(penalty)
    np.testing.assert_allclose(sampling.repetition_penalty(x, seen, penalty), expected, rtol=1e-6)


@many
@given(logits, flags, st.floats(-3, 3, width=32, allow_subnormal=False))
def test_presence_penalty(x, said, penalty):
    np.testing.assert_allclose(sampling.presence_penalty(x, said, penalty), x - said * np.float32(penalty), rtol=1e-6)


@many
@given(logits, st.floats(2**-20, 100, width=32, allow_subnormal=False))
def test_temperature_divides_and_never_overflows(x, value):
    cooled = np.asarray(sampling.temperature(x, value))
    assert not np.isnan(cooled).any()
    for row, found in zip(x, cooled, strict=True):
        expected = softmax(row.astype(np.float64) / value)
        np.testing.assert_allclose(softmax(found), expected, atol=2e-3)  # float32 quotients of up to 6e7
        assert found[row.argmax()] == found.max() == 0


@many
@given(logits, st.integers(1, 12))
def test_top_k(x, k):
    found, ids = map(np.asarray, sampling.top_k(x, k))
    for row in range(SHAPE[0]):
        expected = sorted(range(SHAPE[1]), key=lambda i: (-x[row, i], i))[:k]
        assert ids[row].tolist() == expected
        np.testing.assert_array_equal(found[row], x[row, expected])


@many
@given(logits, st.floats(0.0625, 1, width=32, allow_subnormal=False))
def test_top_p(x, p):
    keep = kept(sampling.top_p(x, p), x)
    for row in range(SHAPE[0]):
        order = np.argsort(-x[row], kind="stable")
        mass = np.cumsum(softmax(x[row])[order])
        # The first place where the mass reaches p; 1e-5 either way is float32's choice.
        least, most = (int(np.sum(mass < p + slack)) for slack in (-1e-5, 1e-5))
        floor, ceiling = x[row][order[min(most, SHAPE[1] - 1)]], x[row][order[min(least, SHAPE[1] - 1)]]
        assert keep[row][x[row] >= ceiling].all() and not keep[row][x[row] < floor].any()


def test_top_p_keeps_the_one_that_reaches_p_and_equals_of_it():
    probs = np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)
    for p, expected in ((0.4, 1), (0.6, 2), (0.7, 2), (0.8, 4), (1.0, 4)):
        assert kept(sampling.top_p(np.log(probs), p), np.log(probs)).sum() == expected


@many
@given(logits, st.floats(0, 1, width=32, allow_subnormal=False))
def test_min_p(x, p):
    keep = kept(sampling.min_p(x, p), x)
    for row in range(SHAPE[0]):
        probs = softmax(x[row])
        assert keep[row][probs >= p * probs.max() * (1 + 1e-4)].all()
        assert not keep[row][probs < p * probs.max() * (1 - 1e-4)].any()
        assert keep[row, x[row].argmax()]


@pytest.mark.parametrize("count", [1, 5, 9])
def test_only_first(count):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    assert kept(sampling.only_first(x, count), x).tolist() == [[i < count for i in range(SHAPE[1])]] * SHAPE[0]


@many
@given(logits)
def test_likeliest_is_the_first_of_the_largest(x):
    assert sampling.likeliest(x).tolist() == [int(row.argmax()) for row in x]


def test_draw_follows_the_probabilities_and_never_takes_what_was_removed():
    x = np.log(np.array([0.5, 0.3, 0.2, 1e-30], np.float32))
    x[3] = sampling.NEG_INF
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(4000))
    counts = np.bincount(sampling.draw(jnp.tile(x, (4000, 1)), keys), minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2, 0], atol=0.035)  # 4.5 standard deviations
    assert counts[3] == 0


def test_a_rows_draw_depends_on_its_own_key_only():
    x = np.zeros((3, 100), np.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    together = np.asarray(sampling.draw(x, keys))
    assert together.tolist() == [int(sampling.draw(x[:1], keys[i : i + 1])[0]) for i in range(3)]
    assert len(set(together.tolist())) == 3


@many
@given(logits, st.integers(0, 8))
def test_log_probs_of(x, index):
    expected = [np.log(softmax(row)[index]) for row in x]
    np.testing.assert_allclose(sampling.log_probs_of(x, np.full(2, index, np.int32)), expected, atol=1e-5)
