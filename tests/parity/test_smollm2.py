"""Real weights: SmolLM2-135M loads, and gives transformers' logits and perplexity on real text.

Opt-in, for it downloads 98 MB: QWEN_JAX_DOWNLOADS=1. Needs torch, transformers and gguf.
"""

import os
import pydoc_data.topics

import jax
import numpy as np
import pytest

if os.environ.get("QWEN_JAX_DOWNLOADS") != "1":
    pytest.skip("downloads 98 MB of weights; set QWEN_JAX_DOWNLOADS=1", allow_module_level=True)
for package in ("torch", "transformers", "gguf"):
    pytest.importorskip(package, reason=f"real-weight parity needs {package}")

import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from qwen_jax import hf, models, rollout  # noqa: E402
from tests.hf import made_up  # noqa: E402
from tests.parity import ours, reference, smollm2  # noqa: E402

ROWS, LENGTH = 4, 256


@pytest.fixture(scope="module")
def text():
    """[ROWS, LENGTH] ids of English prose: the language reference that comes with Python."""
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2.folder() / "tokenizer.json"))
    prose = "\n".join(pydoc_data.topics.topics[name] for name in ("objects", "execmodel", "naming"))
    ids = tokenizer.encode(prose).ids
    assert tokenizer.decode(ids) == prose
    return np.array(ids[: ROWS * LENGTH], np.int32).reshape(ROWS, LENGTH)


def test_logits_and_perplexity_are_those_of_transformers(text):
    whole = np.ones_like(text)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32)
    config, params = hf.load(smollm2.folder(), dtype="float32")
    config = config.replace(dtype="float32")
    with torch.no_grad():
        expected = reference.logits(theirs, text, whole).numpy()
    found = ours.logits(config, params, text, whole)
    error, size = ours.worst(found, expected, whole), np.abs(expected).max()
    log_p = np.asarray(models.sequence_log_probs(config, params, text), np.float64)
    reference_log_p = torch.from_numpy(expected[:, :-1]).double().log_softmax(-1).numpy()  # float32 here errs by 1e-5
    expected_log_p = np.take_along_axis(reference_log_p, text[:, 1:, None], -1)[..., 0]
    perplexity, theirs_perplexity = np.exp(-log_p.mean()), np.exp(-expected_log_p.mean())
    print(f"worst logit error {error:.1e} of {size:.0f}; perplexity {perplexity:.5f}, theirs {theirs_perplexity:.5f}")
    assert error < 1e-5 * size  # 30 layers of float32 sums in another order
    assert abs(perplexity / theirs_perplexity - 1) < 1e-6 and perplexity < 40
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.999


def test_a_round_trip_keeps_every_byte(tmp_path):
    hf.save(tmp_path, *hf.load(smollm2.folder()), shard_bytes=100_000_000)
    before, after = made_up.held(smollm2.folder()), made_up.held(tmp_path)
    assert before.keys() == after.keys() and len(list(tmp_path.glob("*.safetensors"))) == 3
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_greedy_answers_are_those_of_transformers(text):
    prompts = [
        text.reshape(-1)[start : start + length].tolist() for start, length in ((0, 5), (40, 17), (90, 33), (200, 64))
    ]
    config, params = hf.load(smollm2.folder(), dtype="float32")
    config = config.replace(dtype="float32")
    found = rollout.generate(config, params, prompts, jax.random.key(0), max_new_tokens=32, temperature=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, np.asarray(found.tokens).tolist(), strict=True):
        with torch.no_grad():
            answer = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=32, min_new_tokens=32, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert tokens == answer[0, len(prompt) :].tolist()
