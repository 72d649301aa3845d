"""Sampling from models that read further than they were trained to: the answers are those of full forward passes."""

import jax
import numpy as np
import pytest

from qwen_jax import models, rollout
from qwen_jax.config import DualChunk
from qwen_jax.errors import InputError
from qwen_jax.rollout import generation
from qwen_jax.rollout.decoding import Engine
from qwen_jax.sharding import Layout
from tests.models.test_long_context import WAYS, sharp, small
from tests.rollout.test_generate import some_prompts

NEW, LENGTHS = 16, (3, 21, 12)
PROMPTS = some_prompts(LENGTHS)
KEY = jax.random.key(0)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_answers_and_log_probs_are_those_of_full_forward_passes(way):
    """Prompts of different lengths, read in pieces of 12, whose answers cross borders of chunks and steps of NTK."""
    config = small(**WAYS[way])
    params = sharp(config)
    out = rollout.generate(config, params, PROMPTS, KEY, max_new_tokens=NEW, temperature=0, piece=12)
    rows = np.zeros((len(PROMPTS), max(LENGTHS) + NEW), np.int32)
    for row, prompt in enumerate(PROMPTS):
        rows[row, : len(prompt) + NEW] = [*prompt, *out.tokens[row]]
    lengths = np.broadcast_to(np.array(LENGTHS)[:, None], rows.shape)
    logits = np.asarray(models.forward(config, params, rows, prompt_lengths=lengths))
    log_probs = np.asarray(models.sequence_log_probs(config, params, rows, prompt_lengths=lengths))
    for row, length in enumerate(LENGTHS):
        answer = slice(length - 1, length - 1 + NEW)
        np.testing.assert_array_equal(out.tokens[row], logits[row, answer].argmax(-1))
        np.testing.assert_allclose(out.log_probs[row], log_probs[row, answer], atol=1e-3)  # logits of up to 20


def test_any_mesh_samples_what_one_device_samples(mesh):
    config = small(num_hidden_layers=1, dual_chunk=DualChunk(10, 4, 10))
    params = sharp(config)
    answer = lambda **how: rollout.generate(config, params, PROMPTS, KEY, max_new_tokens=NEW, piece=12, **how)
    alone, split = answer(), answer(layout=Layout(mesh))
    np.testing.assert_array_equal(alone.tokens, split.tokens)
    np.testing.assert_allclose(alone.log_probs, split.log_probs, atol=1e-3)


@pytest.mark.parametrize("T, piece, size", [(16, 64, 16), (64, 64, 64), (96, 64, 48), (128, 20, 16), (24, 2, 3)])
def test_prompts_are_read_in_equal_pieces(T, piece, size):
    assert Engine(small(), Layout(), None, 16, 1, piece)._piece(T) == size


def test_a_long_prompt_needs_the_activations_of_a_piece():
    config = small(max_position_embeddings=4096, intermediate_size=512, dual_chunk=DualChunk(64, 16))

    def temporary(piece):
        arguments = generation._begin(
            config, models.init(config, KEY), [[1] * 1024], KEY, max_new_tokens=1, stop_ids=(), num_tokens=None,
            first_row=0, layout=Layout(), unroll=None, piece=piece, samples=1, slots=None,
        )  # fmt: skip
        return generation._start.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(128) < 0.5 * temporary(1024)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_before_compilation():
    config = small(max_position_embeddings=32, dual_chunk=DualChunk(10, 4))
    with pytest.raises(
        InputError, match=r"prompts\[0\] has 20 ids and max_new_tokens is 13, together 33; .* at most 32"
    ):
        rollout.generate(config, {}, [[1] * 20], KEY, max_new_tokens=13)
    with pytest.raises(InputError, match="piece is 0"):
        rollout.generate(config, {}, [[1]], KEY, max_new_tokens=1, piece=0)
