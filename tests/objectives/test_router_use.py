"""Measures of routing against closed forms, and against a plain sum over the joint distribution."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen_jax.objectives import router_use

SPLIT = np.kron(np.eye(3), [[5, 5]])  # 3 domains, 6 experts, each domain its own two
ALIKE = np.outer([1, 100, 7], [1, 2, 3, 4])
COUNTS = arrays(np.int64, (3, 4), elements=st.integers(1, 1000))


def test_an_even_load_and_one_that_all_goes_to_one_expert():
    even, one = np.full((2, 8), 3.0), np.eye(8)[[1, 2]] * 9
    np.testing.assert_allclose(router_use.entropy([even, one]), [[1, 1], [0, 0]], atol=1e-12)
    np.testing.assert_allclose(router_use.overload([even, one]), [[1, 1], [8, 8]])
    half = np.array([4, 4, 0, 0])
    assert router_use.entropy(half) == pytest.approx(0.5) and router_use.overload(half) == pytest.approx(2)
    np.testing.assert_array_equal(router_use.load(half), [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(router_use.load(np.zeros(4)), np.zeros(4))


def test_information_of_a_perfect_split_is_the_log_of_the_domains_and_of_independence_none():
    np.testing.assert_allclose(router_use.mutual_information([SPLIT, SPLIT * 7]), [math.log(3)] * 2)
    assert router_use.mutual_information(ALIKE) == pytest.approx(0, abs=1e-12)
    # Two domains, one expert of their own each with half of the load, one in common: half of a bit.
    assert router_use.mutual_information([[1, 0, 1], [0, 1, 1]]) == pytest.approx(math.log(2) / 2)


def test_overlap_is_what_two_domains_have_in_common():
    np.testing.assert_allclose(router_use.overlap(SPLIT), np.eye(3))
    np.testing.assert_allclose(router_use.overlap(ALIKE), np.ones((3, 3)))
    np.testing.assert_allclose(router_use.overlap([[1, 0, 1], [0, 1, 1]]), [[1, 0.5], [0.5, 1]])


def test_specialists_serve_one_domain_mostly():
    assert router_use.specialists(SPLIT) == 1 and router_use.specialists(ALIKE) == 0
    # Loads (3/4, 1/4, 0) and (1/3, 2/3, 0): of the first expert 9 of 13 parts, of the second 8 of 11; nobody's is none.
    counts = [[3, 1, 0], [1, 2, 0]]
    assert router_use.specialists(counts, over=1.3) == pytest.approx(2 / 3)
    assert router_use.specialists(counts, over=1.4) == pytest.approx(1 / 3)
    assert router_use.specialists(counts, over=1.5) == 0


@given(COUNTS)
def test_information_is_the_divergence_of_the_joint_distribution_from_the_product(counts):
    joint = counts / counts.sum(axis=1, keepdims=True) / 3
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    expected = sum(joint[d, e] * math.log(joint[d, e] / product[d, e]) for d, e in np.ndindex(joint.shape))
    assert router_use.mutual_information(counts) == pytest.approx(expected, abs=1e-9)
    assert -1e-12 <= router_use.mutual_information(counts) <= math.log(3) + 1e-12


@given(COUNTS)
def test_overlap_is_one_minus_half_the_distance_of_the_loads(counts):
    load = counts / counts.sum(axis=1, keepdims=True)
    distance = np.abs(load[:, None] - load[None]).sum(axis=-1)
    np.testing.assert_allclose(router_use.overlap(counts), 1 - distance / 2, atol=1e-12)
