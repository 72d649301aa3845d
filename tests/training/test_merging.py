"""The Online Merging Optimizer against its formulas, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.errors import InputError
from qwen_jax.training import merging, optimizer
from qwen_jax.training.merging import MergingConfig
from qwen_jax.training.optimizer import OptimizerConfig


def config(kind, **fields):
    return MergingConfig(kind=kind, pretrained="somewhere", **fields)


def tree(seed, scale=1.0):
    draw = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(draw.normal(0, scale, (40, 30)), jnp.float32),
        "b": jnp.asarray(draw.normal(0, scale, 50), jnp.float32),
    }


def one_step(how, step, tuned, pretrained):
    tx = merging.online(how, seed=3)
    state = merging.begin(how, tx.init(tuned), tuned, pretrained, seed=3)
    return tx.update(step, state)[0], state.direction


@pytest.mark.parametrize("rescale", [False, True])
def test_dare_keeps_entries_at_random_of_the_step_anew_and_of_tau_once(rescale):
    how = config("dare", alpha=0.25, reserve=0.3, rescale=rescale)
    step, tuned, pretrained, factor = tree(0), tree(1, 0.1), tree(2, 0.1), 1 / 0.3 if rescale else 1.0
    merged, tau = one_step(how, step, tuned, pretrained)
    for name in step:
        whole = factor * (tuned[name] - pretrained[name])
        kept = np.asarray(tau[name]) != 0
        np.testing.assert_allclose(tau[name], np.where(kept, np.clip(whole, -1, 1), 0), rtol=1e-5, atol=1e-6)
        rest = (np.asarray(merged[name]) - 0.25 * np.asarray(tau[name])) / (0.75 * factor)
        alive = np.abs(rest) > 1e-6
        np.testing.assert_allclose(rest[alive], np.asarray(step[name])[alive], rtol=1e-3, atol=1e-5)
    share = np.mean(np.asarray(tau["a"]) != 0)
    assert abs(share - 0.3) < 0.04  # 1,200 draws: three standard deviations
    tx = merging.online(how, seed=3)
    first, state = tx.update(step, tx.init(tuned))
    second, _ = tx.update(step, state)
    assert np.mean((np.asarray(first["a"]) != 0) == (np.asarray(second["a"]) != 0)) < 0.8  # other entries each step


def test_ties_keeps_the_largest_and_what_has_the_sign_of_the_sum():
    how = config("ties", alpha=0.25, reserve=0.2)
    step, tuned, pretrained = tree(0, 0.5), tree(1, 0.4), tree(2, 0.4)
    merged, _ = one_step(how, step, tuned, pretrained)
    for name in step:
        trimmed = []
        for x in (np.asarray(step[name]), np.asarray(tuned[name]) - np.asarray(pretrained[name])):
            count = int(np.ceil(0.2 * x.size))
            least = np.sort(np.abs(x).ravel())[-count]
            trimmed.append(np.where(np.abs(x) >= least, x, 0))
        d, tau = trimmed[0], np.clip(trimmed[1], -1, 1)
        expected = np.zeros_like(d)
        for place in np.ndindex(d.shape):
            sign = np.sign(d[place] + tau[place])
            expected[place] = 0.75 * d[place] * (np.sign(d[place]) == sign) + 0.25 * tau[place] * (
                np.sign(tau[place]) == sign
            )
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["dare", "ties"])
def test_with_nothing_merged_and_all_kept_it_is_the_optimizer_alone(kind):
    adam = optimizer.make(OptimizerConfig(peak_lr=1e-2), 10)
    how = config(kind, alpha=0.0, reserve=1.0)
    merged = optax.chain(adam, merging.online(how, seed=0))
    params, grads = tree(0), tree(1)
    alone, _ = adam.update(grads, adam.init(params), params)
    state = merging.begin(how, merged.init(params), params, params, seed=0)
    found, state = merged.update(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    np.testing.assert_allclose(optimizer.learning_rate(state), 1e-2)


def test_with_everything_merged_it_goes_where_fine_tuning_went():
    tuned, pretrained = tree(0, 0.1), tree(1, 0.1)
    merged, _ = one_step(config("dare", alpha=1.0, reserve=1.0), tree(2), tuned, pretrained)
    jax.tree.map(lambda x, a, b: np.testing.assert_allclose(x, a - b, atol=1e-6), merged, tuned, pretrained)


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(kind="dare"), "merging.pretrained is missing"),
        (dict(alpha=2.0), "merging.alpha is 2.0; expected 0 to 1"),
        (dict(reserve=0.0), "merging.reserve is 0.0; expected above 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_line(fields, told):
    with pytest.raises(InputError, match=told):
        MergingConfig(**fields)
