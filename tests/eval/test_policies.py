"""What a judge says of answers that people rated is what the reward model says of each alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, sharding, tokenizer
from qwen_jax.data.preferences import Answers
from qwen_jax.eval import policies, preferences
from qwen_jax.sharding import Layout
from qwen_jax.training import doctor
from tests.conftest import tiny


def test_scores_of_rated_answers_are_read_at_each_ones_end():
    tok = tokenizer.train(["Hi there, how are you?"] * 4, vocab_size=272)
    scorer = tiny(vocab_size=272, num_hidden_layers=1, head="score")
    params = models.init(scorer, jax.random.key(0))
    layout = Layout(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    end, draw = tok.special_tokens["<|im_end|>"], np.random.default_rng(0)
    rows = [np.array([*draw.integers(1, 250, int(size)), end], np.int32) for size in draw.integers(3, 40, 7)]
    documents = [types.SimpleNamespace(ids=row, loss_mask=np.arange(len(row)) > 1) for row in rows]
    answers = Answers(documents, np.arange(7, dtype=np.float32), np.array([0, 0, 0, 1, 1, 2, 2]), ["a"] * 3)
    judge = policies.Judge(tok, scorer, None, scorer, params, [], [], layout)
    found = judge.scores(answers, at_once=3)
    whole = jax.jit(lambda tokens, segments: models.scores(scorer, params, tokens, segment_ids=segments))
    for row, score in zip(rows, found, strict=True):
        alone = np.zeros((2, 1, 64), np.int32)
        alone[:, 0, : len(row)] = row, np.ones(len(row))
        assert score == pytest.approx(float(whole(*jnp.asarray(alone))[0, len(row) - 1]), abs=1e-5)
    pairs = preferences.scored(answers, found)
    evidence = doctor.Evidence(np.ones((1, 2)), np.ones((1, 2)), (end,), 0, tok.vocab_size,
                               chosen=pairs.chosen, rejected=pairs.rejected)  # fmt: skip
    told = {finding.name: finding.found for finding in doctor.examine(evidence)}["reward model"]
    right = [found[a] > found[b] for a, b in ((1, 0), (2, 0), (2, 1), (4, 3), (6, 5))]
    assert told.startswith(f"{np.mean(right):.3f} ± ") and "of 5 pairs" in told
