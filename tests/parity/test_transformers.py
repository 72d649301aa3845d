"""Logits and gradients are those of transformers, on random weights that it wrote, and it loads what we write.

Needs torch and transformers. Without them tests/golden/hf checks the same against kept figures.
"""

import jax
import ml_dtypes
import numpy as np
import pytest

REASON = "live parity needs torch and transformers; tests/golden/hf checks the same without them"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from qwen_jax import hf, models  # noqa: E402
from tests.hf import made_up  # noqa: E402
from tests.parity import ours, reference  # noqa: E402
from tests.parity.batches import KINDS, batch  # noqa: E402


@pytest.fixture(scope="module", params=reference.SHAPES)
def pair(request, tmp_path_factory):
    """A model of transformers, and ours as loaded from what it saved."""
    theirs, folder = reference.make(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder, max_shard_size="40KB")
    config, params = hf.load(folder)
    return theirs, config.replace(dtype="float32"), params


def test_float32_logits(pair):
    theirs, config, params = pair
    for kind in KINDS:
        tokens, segments = batch(kind, config.vocab_size)
        with torch.no_grad():
            expected = reference.logits(theirs, tokens, segments).numpy()
        error = ours.worst(ours.logits(config, params, tokens, segments), expected, segments)
        print(f"{kind}: worst logit error {error:.1e}")  # shown by pytest -rP
        assert error < 1e-4 and np.abs(expected).max() > 1


@pytest.mark.parametrize("kind", ["right-padded", "packed"])  # one shape: the second kind compiles nothing
def test_float32_gradients(pair, kind, tmp_path):
    theirs, config, params = pair
    tokens, segments = batch(kind, config.vocab_size)
    loss, gradients = reference.loss_and_gradients(theirs, tokens, segments)
    found, ours_by_name = ours.loss_and_gradients(config, params, tokens, segments, tmp_path / "gradients")
    assert abs(found - loss) < 1e-5
    relative = ours.worst_relative(ours_by_name, gradients)
    print(f"worst relative gradient error {relative:.1e}")
    assert relative < 1e-4


def test_positions_far_into_the_context(pair):
    """An angle is a frequency times a position: at 30,000 the last bit of a frequency counts."""
    theirs, config, params = pair
    if config.yarn.on or config.dual_chunk.on:
        pytest.skip("positions this far are told apart by the length of the document")
    tokens = batch("whole", config.vocab_size, rows=2, length=32)[0]
    far = np.broadcast_to(30_000 + np.arange(32, dtype=np.int32), tokens.shape)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(far.copy()).long()).logits
    found = models.forward(config.replace(max_position_embeddings=32_768), params, tokens, positions=far)
    assert np.abs(np.asarray(found) - expected.numpy()).max() < 1e-4


def test_log_probs_are_theirs(pair):
    theirs, config, params = pair
    tokens, segments = batch("whole", config.vocab_size)
    with torch.no_grad():
        log_p = reference.logits(theirs, tokens, segments)[:, :-1].log_softmax(-1).numpy()
    expected = np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(models.sequence_log_probs(config, params, tokens), expected, atol=1e-4)


def test_bfloat16_errs_no_more_than_transformers_does(pair, tmp_path):
    theirs, config, params = pair
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    tokens, segments = batch("whole", config.vocab_size, rows=16, length=32)
    exact = ours.logits(config, jax.tree.map(lambda x: x.astype(np.float32), rounded), tokens, segments)
    found = ours.logits(config.replace(dtype="bfloat16"), rounded, tokens, segments)
    theirs.save_pretrained(tmp_path)
    peer = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        peer = reference.logits(peer, tokens, segments).float().numpy()
    rms = lambda x: float(np.sqrt(np.mean((x - exact) ** 2)) / np.sqrt(np.mean(exact**2)))
    print(f"relative rms error of bfloat16: ours {rms(found):.4f}, theirs {rms(peer):.4f}")
    assert rms(found) < 1.2 * rms(peer) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_we_save(pair, dtype, tmp_path):
    theirs, config, params = pair
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    hf.save(tmp_path, config.replace(param_dtype=dtype), params, shard_bytes=30_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(theirs) and not any(report.values()), report
    assert again.dtype == getattr(torch, dtype)
    for name, x in again.state_dict().items():
        assert torch.equal(x, theirs.state_dict()[name].to(x.dtype)), name
    for field in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "vocab_size"):
        assert getattr(again.config, field) == getattr(theirs.config, field)


def test_a_round_trip_of_their_files_keeps_every_byte(pair, tmp_path):
    theirs, _, _ = pair
    theirs.save_pretrained(tmp_path / "theirs")
    hf.save(tmp_path / "ours", *hf.load(tmp_path / "theirs"))
    before, after = made_up.held(tmp_path / "theirs"), made_up.held(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
