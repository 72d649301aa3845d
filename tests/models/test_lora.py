"""LoRA: x·A·B beside frozen kernels is the merged model, in value and gradient, without the merged model's cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, rollout
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.ops.dropout import Dropout
from tests.conftest import FAMILIES, MOE_FAMILIES, tiny

KINDS = {
    "plain": LoraConfig(rank=3, alpha=5.0),
    "some-targets": LoraConfig(rank=2, targets=("q_proj", "c_proj")),
    "rslora": LoraConfig(rank=4, alpha=2.0, rslora=True),
    "dora": LoraConfig(rank=3, dora=True),
    "rows": LoraConfig(rank=2, row_ids=(7, 250, 9)),
}


def drawn(config, lora, seed=0):
    """Random parameters, and adapters in which nothing has its first value."""
    params = models.init(config, jax.random.key(seed))
    noise = np.random.default_rng(seed)
    away = lambda x: x + jnp.asarray(noise.normal(0, 0.1, x.shape), jnp.float32)
    return params, jax.tree.map(away, models.lora.init(config, lora, jax.random.key(seed), params))


def tokens(config, rows=2, length=12):
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    drawn[:, ::3] = 7  # a row that is trained apart, in and out
    return drawn


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradients(config, lora, params, adapters, ids):
    def loss(adapters):
        return models.sequence_log_probs(config, models.lora.join(params, adapters, lora), ids).mean()

    return jax.value_and_grad(loss)(adapters)


@functools.partial(jax.jit, static_argnums=(0, 1))
def merged_loss_and_gradients(config, lora, params, adapters, ids):
    """The oracle: the plain model with the dense sum for kernels, differentiated through the sum."""

    def loss(adapters):
        return models.sequence_log_probs(config, models.lora.merge(params, adapters, lora), ids).mean()

    return jax.value_and_grad(loss)(adapters)


@pytest.mark.parametrize(
    "name, kind",
    [("qwen2-tied", "rows"), ("qwen2-untied", "rows"), ("qwen3", "dora"), ("qwen2-tied", "some-targets")],
)
def test_the_joined_model_is_the_merged_one(name, kind):
    family, lora = FAMILIES[name], KINDS[kind]
    params, adapters = drawn(family, lora)
    ids = tokens(family)
    joined, merged = models.lora.join(params, adapters, lora), models.lora.merge(params, adapters, lora)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f"{a.shape} {b.shape}"), merged, params)
    expected = models.forward(family, merged, ids)
    np.testing.assert_allclose(models.forward(family, joined, ids), expected, atol=2e-5)
    assert np.abs(expected - models.forward(family, params, ids)).max() > 0.01
    log_probs = models.sequence_log_probs(family, merged, ids)
    np.testing.assert_allclose(models.sequence_log_probs(family, joined, ids), log_probs, atol=2e-5)


@pytest.mark.parametrize("name, kind", [("qwen3", "rslora"), ("qwen2-untied", "rows")])
def test_gradients_are_those_through_the_dense_sum(name, kind):
    config, lora = FAMILIES[name], KINDS[kind]
    params, adapters = drawn(config, lora)
    args = (config, lora, params, adapters, tokens(config))
    (loss, found), (same, expected) = loss_and_gradients(*args), merged_loss_and_gradients(*args)
    np.testing.assert_allclose(loss, same, atol=1e-5)
    worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, expected)
    assert max(jax.tree.leaves(worst)) < 1e-4, worst


def test_dora_takes_the_length_as_constant():
    """Section 4.3 of the paper: the gradient of B is that of the plain product times magnitude / length."""
    config, lora = tiny(num_hidden_layers=1), LoraConfig(rank=2, dora=True, targets=("down",))
    params, adapters = drawn(config, lora)
    _, found = loss_and_gradients(config, lora, params, adapters, tokens(config))
    kernel, part = params["layers"]["mlp"]["down"]["kernel"][0], adapters["layers"]["mlp"]["down"]
    total = kernel + part["a"][0] @ part["b"][0] * 8.0
    ratio = (part["magnitude"][0] / jnp.linalg.norm(total, axis=0))[None]

    def fixed(b):
        down = {"kernel": ((kernel + part["a"][0] @ b[0] * 8.0) * ratio)[None]}
        layers = {**params["layers"], "mlp": {**params["layers"]["mlp"], "down": down}}
        return models.sequence_log_probs(config, {**params, "layers": layers}, tokens(config)).mean()

    expected = jax.jit(jax.grad(fixed))(part["b"])
    np.testing.assert_allclose(found["layers"]["mlp"]["down"]["b"], expected, atol=1e-5 * np.abs(expected).max())


WITH_EXPERTS = {"qwen2-moe": LoraConfig(rank=2), "qwen3-moe-some-dense": LoraConfig(rank=2)}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_layers_with_experts_have_adapters_on_attention_and_the_shared_expert(name):
    """Layers of several kinds, each stacked with its like, as one joined tree; dropout has keys for all of them."""
    config, lora = MOE_FAMILIES[name], WITH_EXPERTS[name]
    params, adapters = drawn(config, lora)
    joined, ids = models.lora.join(params, adapters, lora), tokens(config)
    expected = models.forward(config, models.lora.merge(params, adapters, lora), ids)
    np.testing.assert_allclose(models.forward(config, joined, ids), expected, atol=1e-4)
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
    assert any("'shared'" in path for path in paths) == (name == "qwen2-moe")
    assert not any("'router'" in path or "'shared_gate'" in path for path in paths)
    dropped = models.hidden_states(config, joined, ids, dropout=Dropout(jax.random.key(0), 0.1, 0.1))
    assert np.all(np.isfinite(dropped)) and np.abs(dropped - models.hidden_states(config, joined, ids)).max() > 0.01


def test_targets_that_only_routed_experts_have_are_refused():
    with pytest.raises(
        InputError, match="names gate, up, down, which this model has not .*; expected some of q, k, v, o"
    ):
        models.lora.abstract(MOE_FAMILIES["qwen3-moe"], LoraConfig(rank=2))


@pytest.mark.parametrize("kind", ["plain", "dora", "rows"])
def test_step_0_is_the_base(kind):
    config, lora = FAMILIES["qwen2-untied"], KINDS[kind]
    params = models.init(config, jax.random.key(0))
    adapters = models.lora.init(config, lora, jax.random.key(1), params)
    expected = models.forward(config, params, tokens(config))
    found = models.forward(config, models.lora.join(params, adapters, lora), tokens(config))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    shapes = models.lora.abstract(config, lora)
    jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype or pytest.fail(f"{a} {b}"), adapters, shapes)
    names = models.lora.axes(config, lora)
    jax.tree.map(lambda leaf, axes: len(axes) == leaf.ndim or pytest.fail(f"{axes}"), adapters, names)


def test_sampling_takes_a_joined_model():
    config, lora = tiny(), KINDS["rows"]
    params, adapters = drawn(config, lora)
    draw = lambda params: (
        rollout.generate(
            config, params, [[1, 7, 3], [250, 4]], jax.random.key(0), max_new_tokens=6, temperature=0.0
        ).tokens
    )
    np.testing.assert_array_equal(
        draw(models.lora.join(params, adapters, lora)), draw(models.lora.merge(params, adapters, lora))
    )


@pytest.mark.parametrize("kind", ["plain", "dora", "rows"])
def test_no_dense_gradient_is_computed_or_held(kind):
    """By the compiled program: each matrix product twice instead of three times, and of the gradients adapters only."""
    # Unrolled: the cost of a loop's body is counted once however often it runs.
    config = tiny(num_hidden_layers=2, hidden_size=128, intermediate_size=256, vocab_size=4096, scan_layers=False)
    lora = KINDS[kind]
    ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    params, adapters = models.abstract(config), models.lora.abstract(config, lora)
    tuned = loss_and_gradients.lower(config, lora, params, adapters, ids).compile()
    whole = jax.jit(jax.grad(lambda params, ids: models.sequence_log_probs(config, params, ids).mean()))
    whole = whole.lower(params, ids).compile()
    dense = sum(x.size * 4 for x in jax.tree.leaves(params))
    outputs = sum(x.size * 4 for x in jax.tree.leaves(adapters))
    assert tuned.memory_analysis().output_size_in_bytes < outputs + 1024 < dense / 20
    saved = whole.memory_analysis().peak_memory_in_bytes - tuned.memory_analysis().peak_memory_in_bytes
    assert saved > 0.8 * dense, (saved, dense)
    flops = lambda compiled: compiled.cost_analysis()["flops"]
    assert flops(tuned) < (0.9 if kind == "dora" else 0.8) * flops(whole), flops(tuned) / flops(whole)


def test_the_fields_are_checked():
    with pytest.raises(InputError, match="lora.targets names 'qkv'; expected some of q, k"):
        LoraConfig(rank=1, targets=("qkv",))
    with pytest.raises(InputError, match="lora.dropout is 1.0"):
        LoraConfig(rank=1, dropout=1.0)
    with pytest.raises(InputError, match="lora.alpha is 0"):
        LoraConfig(rank=1, alpha=0)
    assert LoraConfig(targets=("w1", "c_proj", "w2", "c_attn")).targets == LoraConfig().targets
