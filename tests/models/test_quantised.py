"""Q-LoRA: a model of codes and scales is the model of the kernels they stand for, in value, gradient and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, rollout
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.ops import quantisation
from qwen_jax.sharding import Layout
from tests.conftest import MOE_FAMILIES, tiny

CONFIG = tiny(hidden_size=128, num_attention_heads=2)
KINDS = {
    "nf4": LoraConfig(rank=3, quantised="nf4"),
    "int8-dora": LoraConfig(rank=2, quantised="int8", dora=True, targets=("q", "o", "down")),
}


@pytest.fixture(scope="module", params=KINDS)
def drawn(request):
    """The config, a quantised base, the whole one it stands for, adapters that do something, and ids."""
    lora, noise = KINDS[request.param], np.random.default_rng(0)

    @jax.jit
    def make(key):
        base = models.lora.quantise(models.init(CONFIG, key), lora)
        return base, quantisation.dequantise_tree(base), models.lora.init(CONFIG, lora, key, base)

    base, whole, adapters = make(jax.random.key(0))
    away = lambda x: x + jnp.asarray(noise.normal(0, 0.1, x.shape), jnp.float32)
    ids = noise.integers(0, CONFIG.vocab_size, (2, 12)).astype(np.int32)
    return lora, base, whole, jax.tree.map(away, adapters), ids


def test_value_and_gradient_are_those_beside_the_whole_kernels(drawn):
    lora, base, whole, adapters, ids = drawn

    @jax.jit
    def both(adapters, base):
        loss = lambda adapters: models.sequence_log_probs(CONFIG, models.lora.join(base, adapters, lora), ids).mean()
        return jax.value_and_grad(loss)(adapters)

    (value, found), (same, expected) = both(adapters, base), both(adapters, whole)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-8), found, expected)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found)) > 0


def test_sampling_takes_the_quantised_model_with_or_without_adapters(drawn):
    lora, base, whole, adapters, ids = drawn
    write = lambda params: rollout.generate(
        CONFIG, params, ids[:, :5].tolist(), jax.random.key(0), max_new_tokens=6, temperature=0
    )
    joined = [models.lora.join(params, adapters, lora) for params in (base, whole)]
    for stored, plain in ((base, whole), joined):
        np.testing.assert_array_equal(write(stored).tokens, write(plain).tokens)


def test_what_is_stored_is_small_and_the_rest_untouched():
    lora = KINDS["nf4"]
    shapes, axes = models.lora.base(CONFIG, lora, Layout())
    q, o = (shapes["layers"]["attention"][name] for name in ("q", "o"))
    assert set(q) == {"codes", "scales", "bias"} and q["codes"].shape == (2, 64, 2, 16)
    assert q["scales"].shape == (2, 2, 2, 16) and o["scales"].shape == (2, 2, 1, 128)
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert shapes["embedding"] == models.abstract(CONFIG)["embedding"]


def test_routed_experts_are_refused():
    with pytest.raises(InputError, match="lora.quantised is 'nf4', but routed experts are not quantised"):
        models.lora.base(MOE_FAMILIES["qwen3-moe"], KINDS["nf4"], Layout())


def test_an_unknown_kind_is_one_line():
    with pytest.raises(InputError, match="lora.quantised is 'int3'; expected one of '', 'int8', 'nf4'"):
        LoraConfig(rank=1, quantised="int3")
