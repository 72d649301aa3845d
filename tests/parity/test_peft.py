"""Logits and adapters' gradients are those of peft, on adapters it wrote; and it loads what we write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "needs torch, transformers and peft"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

from qwen_jax import hf, models  # noqa: E402
from tests.hf import made_up  # noqa: E402
from tests.parity import reference  # noqa: E402
from tests.parity.batches import batch, scored  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "all": dict(r=4, lora_alpha=6, target_modules=ALL),
    "rslora": dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True),
    "dora": dict(r=3, lora_alpha=3, target_modules=ALL, use_dora=True),
    "tokens": dict(r=2, target_modules=ALL, trainable_token_indices={"embed_tokens": [3, 60], "lm_head": [3, 60]}),
    "tied-tokens": dict(r=2, target_modules=ALL, trainable_token_indices=[3, 60]),
    "moe": dict(r=2, target_modules=["q_proj", "o_proj", "shared_expert.gate_proj", "shared_expert.down_proj"]),
    "saved-modules": dict(r=2, target_modules=ALL, modules_to_save=["embed_tokens", "lm_head"]),
}
SHAPES = {"moe": "qwen2_moe", "tied-tokens": "qwen2-tied", "all": "qwen3"}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A peft model in which no trained tensor has its first value; ours, as loaded from what it saved."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    theirs = reference.make(SHAPES.get(kind, "qwen2-untied"))
    theirs.save_pretrained(folder / "base")
    tuned = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind])).eval()
    draw = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.from_numpy(draw.normal(0, 0.1, parameter.shape).astype(np.float32)))
    tuned.save_pretrained(folder / "adapter")
    config, params = hf.load(folder / "base")
    config = config.replace(dtype="float32")
    return folder, tuned, config, params, hf.load_adapter(folder / "adapter", config)


def test_logits_are_theirs(pair):
    _, tuned, config, params, adapter = pair
    tokens, segments = batch("whole", config.vocab_size)
    tokens[:, ::4] = 60
    with torch.no_grad():
        expected = reference.logits(tuned, tokens, segments).numpy()
    found = models.forward(config, adapter.join(params), jnp.asarray(tokens))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"worst relative logit error {error:.1e}")  # shown by pytest -rP
    assert error < 1e-5


def test_gradients_are_theirs(pair, tmp_path):
    """Ours are saved as if they were an adapter, to give them their names."""
    _, tuned, config, params, adapter = pair
    if len(adapter.lora.row_ids) == config.vocab_size:
        pytest.skip("whole matrices are merged, not trained")
    tokens, segments = batch("whole", config.vocab_size)
    tokens[:, ::4] = 60
    mask = jnp.asarray(scored(segments))

    def loss(tree):
        found = models.sequence_log_probs(config, adapter._replace(tree=tree).join(params), jnp.asarray(tokens))
        return -jnp.where(mask, found, 0).sum() / mask.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(adapter.tree)
    hf.save_adapter(tmp_path / "gradients", config, adapter._replace(tree=gradients))
    found = made_up.held(tmp_path / "gradients")
    expected, theirs = reference.loss_and_gradients(tuned, tokens, segments)
    theirs = {name.replace(".default", ""): x for name, x in theirs.items()}
    assert abs(value - expected) < 1e-5
    worst = {name: np.abs(x - theirs[named(name, theirs)]).max() / np.abs(x).max() for name, x in found.items()}
    print(f"worst relative gradient error {max(worst.values()):.1e}")
    assert max(worst.values()) < 1e-4, worst


def named(name, theirs):
    """Their parameter of a saved tensor."""
    candidates = [name, f"{name}.weight", f"{name}.default"]
    return next(candidate for candidate in candidates if candidate in theirs)


def test_peft_loads_what_we_save(pair, tmp_path):
    folder, tuned, config, params, adapter = pair
    if len(adapter.lora.row_ids) == config.vocab_size:
        pytest.skip("whole matrices are merged, not trained")
    hf.save_adapter(tmp_path / "ours", config, adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    tokens, segments = batch("whole", config.vocab_size)
    with torch.no_grad():
        found, expected = (reference.logits(model, tokens, segments).numpy() for model in (again, tuned))
    np.testing.assert_allclose(found, expected, atol=1e-5)
