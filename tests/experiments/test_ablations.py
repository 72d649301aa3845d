"""The tokenizer comparison: its smoke runs and resumes, and its figures are those of the runs it is made of."""

import math

import jax
import numpy as np
import pytest

from experiments.ablations import tokenizers
from qwen_jax import models, tokenizer
from qwen_jax.data import conversations, sources
from qwen_jax.training import checkpoint, metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [jax.local_devices()[0]])
        with pytest.warns(UserWarning, match="not 288"):
            return folder, tokenizers.run(tokenizers.smoke(), folder, "smoke")


@pytest.fixture(scope="module")
def texts():
    return [conversations.plain_text(chat) for chat in sources.load("made-up", "validation")]


def test_all_are_scored_on_the_same_bytes_and_trained_alike(finished, texts):
    folder, results = finished
    size = sum(len(text.encode()) for text in texts)
    assert {name: result.held_out.size for name, result in results.items()} == dict.fromkeys(tokenizers.TRAINERS, size)
    configs = [(folder / name / "config.json").read_text() for name in results]
    first, second = (text[text.index('"model"') : text.index('"tokenizer"')] for text in configs)
    assert first == second
    kinds = {name: type(tokenizer.load(folder / name / "tokenizer")) for name in results}
    assert kinds == {"byte-bpe": tokenizer.ByteBPE, "unigram": tokenizer.SentencePiece}


@pytest.mark.parametrize("name", tokenizers.TRAINERS)
def test_bits_per_byte_are_those_of_the_model_on_whole_texts(finished, texts, name):
    """Each text from its first token to its end, read alone by the trained model.

    The smoke's rows of 64 tokens cut texts, and a model that cannot look across a cut predicts a little differently,
    so that the oracle cuts where the rows do.
    """
    folder, results = finished
    config, params = checkpoint.load_params(folder / name)
    tok = tokenizer.load(folder / name / "tokenizer")
    end = tok.special_tokens["<|endoftext|>"]
    order = np.random.default_rng(tokenizers.smoke().pretrain.seed).permutation(len(texts))
    length, position, bits = tokenizers.smoke().pretrain.length, 0, 0.0
    read = jax.jit(lambda tokens: jax.nn.log_softmax(models.forward(config, params, tokens)))
    for index in order.tolist():
        ids = [*tok.encode(texts[index]), end]
        bits += math.log2(config.vocab_size)  # the first token: one of so many
        start = 0
        while start < len(ids):
            stop = min(len(ids), start + length - (position + start) % length)
            seen = np.zeros((1, length), np.int32)
            seen[0, : stop - start] = ids[start:stop]
            log_probs = np.asarray(read(seen))[0]
            following = ids[start + 1 : stop + 1]
            bits -= sum(float(log_probs[place, token]) for place, token in enumerate(following)) / math.log(2)
            start = stop
        position += len(ids)
    # float32 losses, summed in another order over some thousand tokens
    assert results[name].curve[-1][1] == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5)


@pytest.mark.parametrize("name", tokenizers.TRAINERS)
def test_training_bytes_are_steps_times_what_a_step_of_tokens_spells(finished, name):
    folder, results = finished
    tok, config = tokenizer.load(folder / name / "tokenizer"), tokenizers.smoke().pretrain
    texts = [conversations.plain_text(chat) for chat in sources.load("made-up", "train")]
    rate = sum(len(text.encode()) for text in texts) / sum(len(tok.encode(text)) + 1 for text in texts)
    steps = [row["step"] for row in metrics.read(folder / name) if "validation/loss" in row]
    assert steps == [0, 1, 2]
    expected = [step * config.batch_size * config.length * rate for step in steps]
    np.testing.assert_allclose([seen for seen, _ in results[name].curve], expected, rtol=1e-12)


def test_bits_per_byte_of_a_uniform_model_count_every_token():
    """Four texts of 25 tokens, 20 of them predicted at ln 16 nats: 4 bits a token, first tokens and ends included."""
    text = tokenizers.Text(size=50, tokens=25, targets=21)
    assert tokenizers.bits_per_byte(math.log(16), text, 16) == pytest.approx(25 * 4 / 50)


def test_the_report_says_what_was_found_and_a_second_start_trains_nothing(finished, capsys):
    folder, results = finished
    report = (folder / "report.md").read_text()
    for name, result in results.items():
        assert f"| {name} | {result.vocab_size} |" in report and f"| {result.curve[-1][1]:.4f} |" in report
    assert (folder / "plots" / "bits_per_byte.png").read_bytes()[:4] == b"\x89PNG"
    before = [(folder / name / "metrics.jsonl").read_text() for name in results]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [jax.local_devices()[0]])
        assert tokenizers.run(tokenizers.smoke(), folder, "smoke") == results
    assert [(folder / name / "metrics.jsonl").read_text() for name in results] == before
    assert (folder / "report.md").read_text() == report
    printed = capsys.readouterr().out
    assert printed.count("nothing to train") == 2 and f"done: {folder / 'report.md'}" in printed
