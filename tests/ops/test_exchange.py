"""Experts split over devices give what one device gives, however uneven the load, values and gradients."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qwen_jax import sharding
from qwen_jax.ops.exchange import exchanged_experts
from qwen_jax.ops.experts import experts
from tests.ops.test_experts import case, gradients_of

E, K = 8, 3
LOADS = {
    "even": None,
    "all to the last device": lambda draw: np.tile(np.array([[5, 6, 7]]), (64, 1)),
    "all to one expert": lambda draw: np.full((64, K), 2),
    "some tokens to nobody": lambda draw: np.where(np.arange(64)[:, None] < 16, E, draw.integers(0, E, (64, K))),
}  # fmt: skip


def exchanged(devices: int, room: float):
    mesh = sharding.make_mesh(sharding.MeshConfig(expert=devices), jax.devices()[:devices])
    part = PartitionSpec("expert")
    local = functools.partial(exchanged_experts, axis="expert", lockstep=("expert",), room=room)
    return jax.shard_map(local, mesh=mesh, in_specs=(part,) * 4, out_specs=part, check_vma=False)


def compiled(function):
    return jax.jit(function), gradients_of(function)


@pytest.fixture(scope="module")
def alone():
    return compiled(experts)


@pytest.fixture(scope="module", params=[(4, 1.25), (8, 0.3)], ids=lambda split: "{} devices, room {}".format(*split))
def split(request):
    return compiled(exchanged(*request.param))


@pytest.mark.parametrize("load", LOADS)
def test_values_and_gradients_are_those_of_one_device(load, split, alone):
    arguments = case(64, E, K, choose=LOADS[load])
    found, expected = ([program(*arguments) for program in programs] for programs in (split, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_a_round_is_little_larger_than_an_even_load():
    """The rows that travel at once are counted in the program: their number does not depend on the load."""
    devices, R = 4, 256
    x, gates, choice, weights = case(R, E, K)
    jaxpr = str(jax.make_jaxpr(exchanged(devices, 1.25))(x, gates, choice, weights))
    room = int(np.ceil(1.25 * (R // devices) * K / devices))
    assert f"f32[{devices},{room},{x.shape[1]}] = all_to_all" in jaxpr
