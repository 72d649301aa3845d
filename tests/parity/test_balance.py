"""The pooled balancing loss is the auxiliary loss of transformers: of given logits, and of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "parity needs torch and transformers; tests/objectives/test_balance.py has the same loss by hand"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func  # noqa: E402

from qwen_jax import hf, models  # noqa: E402
from qwen_jax.objectives import balance  # noqa: E402
from qwen_jax.ops.routing import route  # noqa: E402
from tests.parity import reference  # noqa: E402
from tests.parity.batches import batch  # noqa: E402


def test_value_and_gradient_of_given_logits():
    L, B, T, E, K = 3, 2, 7, 5, 2
    draw = np.random.default_rng(0)
    logits, mask = draw.normal(0, 2, (L, B, T, E)).astype(np.float32), draw.random((B, T)) < 0.7

    def ours(logits):
        one = lambda logits_BTE: route(logits_BTE, jnp.asarray(mask), experts_per_token=K, normalize=True)[2]
        r = jax.vmap(one)(logits)
        return balance.pooled(r.counts, r.probs, r.tokens)

    theirs = torch.from_numpy(logits).requires_grad_()
    flat = tuple(layer.reshape(B * T, E) for layer in theirs)
    expected = load_balancing_loss_func(flat, E, K, attention_mask=torch.from_numpy(mask))
    expected.backward()
    found, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe-some-dense"])
def test_of_a_model(name, tmp_path):
    theirs = reference.make(name)
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    tokens, segments = batch("right-padded", config.vocab_size)
    ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(segments > 0).long()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_router_logits=True).aux_loss
    routing = models.log_probs_and_routing(
        config.replace(dtype="float32"),
        params,
        jnp.asarray(tokens),
        jnp.asarray(tokens),
        segment_ids=jnp.asarray(segments),
    )[1]
    found = balance.pooled(routing.counts, routing.probs, routing.tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
