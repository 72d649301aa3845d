"""The router against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.routing import route

B, T, E, K = 3, 5, 7, 3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_are_the_largest_probabilities_and_the_sums_are_those_of_each_row(normalize, dtype):
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.permuted(np.linspace(-4, 4, B * T * E)).reshape(B, T, E), dtype)  # no two are equal
    valid = draw.random((B, T)) < 0.7
    gates, chosen, sums = route(logits, jnp.asarray(valid), experts_per_token=K, normalize=normalize)
    assert gates.dtype == jnp.float32 and {x.dtype for x in sums} == {jnp.dtype("float32")}
    for b in range(B):
        counts, probs, z = np.zeros(E), np.zeros(E), 0.0
        for t in range(T):
            if not valid[b, t]:
                assert (chosen[b, t] == E).all() and (gates[b, t] == 0).all()
                continue
            logit = np.asarray(logits[b, t], np.float64)
            p = np.exp(logit) / np.exp(logit).sum()
            best = np.argsort(-p)[:K]
            np.testing.assert_array_equal(chosen[b, t], best)
            np.testing.assert_allclose(gates[b, t], p[best] / (p[best].sum() if normalize else 1), rtol=1e-5)
            counts[best] += 1
            probs, z = probs + p, z + np.log(np.exp(logit).sum()) ** 2
        np.testing.assert_array_equal(sums.counts[b], counts)
        np.testing.assert_allclose(sums.probs[b], probs, rtol=1e-5)
        np.testing.assert_allclose((sums.z[b], sums.tokens[b]), (z, valid[b].sum()), rtol=1e-5)


def test_counts_have_no_gradient_and_probabilities_have():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, E)), jnp.float32)
    take = lambda name: jax.grad(
        lambda x: getattr(route(x, jnp.ones((B, T), bool), experts_per_token=K, normalize=True)[2], name)[0, 0].sum()
    )(logits)
    assert not take("counts").any() and take("probs")[0].any() and not take("probs")[1:].any()
