"""A reward model is transformers' sequence classification with one label: scores, gradients, and both ways of saving.

Needs torch and transformers. Without them tests/hf/test_reward.py checks the folders by names written by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "live parity needs torch and transformers; tests/hf/test_reward.py checks the folders without them"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from qwen_jax import hf, models  # noqa: E402
from qwen_jax.objectives import reward  # noqa: E402

PAD = 66
KINDS = {"Qwen2": dict(tie_word_embeddings=True), "Qwen3": dict(head_dim=16)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A classifier of transformers, ours as loaded from its folder."""
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=67, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="eager", num_labels=1, pad_token_id=PAD,
        **KINDS[request.param],
    )  # fmt: skip
    theirs = getattr(transformers, f"{request.param}ForSequenceClassification")(config).eval()
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(draw.normal("norm" in name, 0.2, parameter.shape).astype(np.float32)))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    config, params = hf.load(folder)
    return theirs, config.replace(dtype="float32"), params


def batch(rows=4, length=12):
    tokens = np.random.default_rng(1).integers(0, PAD, (rows, length)).astype(np.int32)
    lengths = np.array([12, 7, 9, 4])
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, tokens, PAD), mask.astype(np.int32), lengths


def test_scores_and_the_gradient_of_the_ranking_loss(pair):
    theirs, config, params = pair
    tokens, mask, lengths = batch()
    expected = theirs(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()).logits[:, 0]
    loss = -torch.nn.functional.logsigmoid(expected[:2] - expected[2:]).mean()
    loss.backward()

    def ours(params):
        scores_BT = models.scores(config, params, jnp.asarray(tokens), segment_ids=jnp.asarray(mask))
        found = scores_BT[jnp.arange(4), lengths - 1]
        return reward.loss(found[:2], found[2:])[0], found

    (value, found), gradients = jax.value_and_grad(ours, has_aux=True)(params)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(value, float(loss.detach()), atol=1e-5)
    for name, gradient in (("score", theirs.score.weight.grad), ("embedding", theirs.model.embed_tokens.weight.grad)):
        gradient = gradient.numpy()
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


def test_transformers_loads_what_we_save(pair, tmp_path):
    theirs, config, params = pair
    hf.save(tmp_path, config, params, pad_token_id=PAD)
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert type(again) is type(theirs) and not any(report.values()), report
    assert (again.config.num_labels, again.config.pad_token_id) == (1, PAD)
    tokens, mask, _ = (torch.from_numpy(np.asarray(x)).long() for x in batch())
    with torch.no_grad():
        found, expected = (model(tokens, attention_mask=mask).logits for model in (again, theirs))
    torch.testing.assert_close(found, expected)
