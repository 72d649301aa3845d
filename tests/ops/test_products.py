"""Products of joined axes equal the einsum they are written as, in value and gradient, and copy nothing on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.products import product

SIZES = dict(B=2, T=3, D=8, N=4, H=5, K=2, J=3, F=7, P=1, C=6)
SPECS = (
    "BTD,DF->BTF",
    "BTD,DNH->BTNH",
    "BTNH,NHD->BTD",
    "BTD,DKJH->BTKJH",
    "BTD,PCD->BTPC",
    "BTPC,BTD->PCD",
    "BTPC,PCD->BTD",
)


@pytest.mark.parametrize("spec", SPECS)
def test_equal_to_the_einsum(spec):
    rng = np.random.default_rng(0)
    draw = lambda letters: jnp.asarray(rng.normal(size=[SIZES[letter] for letter in letters]), jnp.float32)
    letters_x, letters_y, letters_out = re.split(",|->", spec)
    x, y, weights = draw(letters_x), draw(letters_y), draw(letters_out)

    def value_and_gradients(joined):
        out, pull = jax.vjp(lambda x, y: product(spec, x, y, joined=joined), x, y)
        return out, pull(weights)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *map(value_and_gradients, (True, False)))
