"""DPO and its siblings against closed forms, published figures and trl's (kept in tests/golden/preferences)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.objectives import dpo
from tests.objectives import trl_names

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "preferences" / "losses.npz"
VARIANTS = ("sigmoid", "ipo", "hinge", "robust")


def test_all_of_them_are_what_trl_computes():
    golden = dict(np.load(GOLDEN))
    found = trl_names.losses(golden)
    assert {f"loss/{name}" for name in found} == {name for name in golden if name.startswith("loss/")}
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[f"loss/{name}"], rtol=1e-5, err_msg=name)


def sequences(seed=0, count=5):
    """[policy chosen, policy rejected, reference chosen, reference rejected]."""
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.normal(-30, 5, count), jnp.float32) for _ in range(4)]


def test_the_sums_of_torchtunes_test():
    """Its figures: log-ratio differences 0, 10, 20, so logits 0, 1, 2 at beta 0.1."""
    found = dpo.loss(
        jnp.array([-0.5, -10.0, -1.0]), jnp.array([-0.1, -30.0, -21.0]),
        jnp.array([-0.5, -10.1, -0.1]), jnp.array([-0.1, -20.1, -0.1]),
    )  # fmt: skip
    np.testing.assert_allclose(found[0], np.log1p(np.exp(-np.array([0.0, 1.0, 2.0]))).mean(), rtol=1e-6)


@pytest.mark.parametrize("smoothing, expected", [(0.0, 0.753059), (0.3, 0.925447)])
def test_the_figures_of_tunix(smoothing, expected):
    """Its test draws, from numpy's seed 0, four tokens of eight answers and the reference's."""
    draw = np.random.RandomState(0)
    policy, reference = (jnp.asarray(draw.normal(0, 5, (8, 4)).sum(-1)) for _ in range(2))
    loss = dpo.loss(policy[:4], policy[4:], reference[:4], reference[4:], label_smoothing=smoothing)[0]
    np.testing.assert_allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_formula(variant):
    pc, pr, rc, rr = map(np.asarray, sequences())
    h, beta, e = (pc - rc) - (pr - rr), 0.2, 0.1 if variant in ("sigmoid", "robust") else 0.0
    right, wrong = np.log1p(np.exp(-beta * h)), np.log1p(np.exp(beta * h))
    expected = {
        "sigmoid": (1 - e) * right + e * wrong,
        "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "hinge": np.maximum(0, 1 - beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
    }[variant]
    loss, metrics = dpo.loss(*sequences(), beta=beta, label_smoothing=e, variant=variant)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (h > 0).mean())
    np.testing.assert_allclose(metrics["reward_chosen"], beta * (pc - rc).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_margin"], beta * h.mean(), rtol=1e-4)


def test_a_policy_that_is_its_reference_costs_log_2_and_is_pushed_towards_the_chosen():
    policy = sequences()[:2]
    loss = lambda chosen, rejected: dpo.loss(chosen, rejected, *policy)[0]
    np.testing.assert_allclose(loss(*policy), np.log(2), rtol=1e-6)
    up, down = jax.grad(loss, argnums=(0, 1))(*policy)
    np.testing.assert_allclose(up, -0.1 / 2 / 5, rtol=1e-5)
    np.testing.assert_allclose(down, -up)


def test_robust_is_the_mean_of_the_true_loss_under_flipped_labels():
    pc, pr, rc, rr = sequences()
    e, robust = 0.2, lambda *x: dpo.loss(*x, label_smoothing=0.2, variant="robust")[0]
    expected = dpo.loss(pc, pr, rc, rr)[0]
    np.testing.assert_allclose((1 - e) * robust(pc, pr, rc, rr) + e * robust(pr, pc, rr, rc), expected, rtol=1e-5)


def test_lengths_divide_each_answer_and_weights_leave_pairs_out():
    x, lengths = sequences(), (jnp.array([1, 2, 3, 4, 5]), jnp.array([5, 4, 3, 2, 1]))
    divided = [value / lengths[place % 2] for place, value in enumerate(x)]
    np.testing.assert_allclose(dpo.loss(*x, lengths=lengths)[0], dpo.loss(*divided)[0], rtol=1e-6)
    weights = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0])
    kept = [value[jnp.array([0, 2])] for value in x]
    broken = [x[0].at[1].set(-jnp.inf), *x[1:]]
    np.testing.assert_allclose(dpo.loss(*broken, weights=weights)[0], dpo.loss(*kept)[0], rtol=1e-6)


def test_no_gradient_reaches_the_reference():
    grads = jax.grad(lambda x: dpo.loss(*x)[0])(sequences())
    assert not np.any(grads[2]) and not np.any(grads[3]) and np.all(grads[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_extreme_log_probabilities_are_not_nan(variant, size):
    x = [jnp.array([-size, 0.0]), jnp.array([0.0, -size]), jnp.array([0.0, -size]), jnp.array([-size, 0.0])]
    value, grads = jax.value_and_grad(lambda x: dpo.loss(*x, variant=variant)[0])(x)
    assert not np.isnan(value) and not any(np.isnan(grad).any() for grad in grads)


def test_orpo_holds_where_a_probability_is_1_or_0():
    chosen, rejected, lengths = jnp.array([0.0, -1e6]), jnp.array([-1e6, 0.0]), (jnp.ones(2), jnp.ones(2))
    value, grads = jax.value_and_grad(lambda x: dpo.orpo(*x, lengths=lengths)[0])((chosen, rejected))
    assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)


def test_bfloat16_sums_are_compared_in_float32():
    x = [value.astype(jnp.bfloat16) for value in sequences()]
    loss, metrics = dpo.loss(*x)
    assert {value.dtype for value in (loss, *metrics.values())} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, dpo.loss(*(value.astype(jnp.float32) for value in x))[0], rtol=1e-6)


def test_kto_counts_a_distance_below_0_as_none():
    policy, reference, good = jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.0]), jnp.array([True, False])
    expected = np.mean(1 / (1 + np.exp(0.1 * np.array([1.0, 1.0]))))
    np.testing.assert_allclose(dpo.kto(policy, reference, good, -3.0)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "how", [dict(variant="dpo"), dict(label_smoothing=0.5), dict(variant="ipo", label_smoothing=0.1)]
)
def test_what_there_is_not_is_one_line(how):
    with pytest.raises(InputError, match="expected") as error:
        dpo.loss(*sequences(), **how)
    assert "\n" not in str(error.value)
