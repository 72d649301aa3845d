"""Answers depend on prompt, key and row only; their log-probabilities are the policy's; stops, padding and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, rollout
from qwen_jax.errors import InputError
from qwen_jax.rollout import generation
from qwen_jax.rollout.prompts import bucket
from qwen_jax.sharding import Layout
from tests.conftest import tiny

SMALL = tiny(num_hidden_layers=1, tie_word_embeddings=False)  # a tied one repeats its last token at random weights
KEY = jax.random.key(3)
NEW = 10
LENGTHS = (1, 5, 17, 3, 9)


def perturbed(config, seed=0):
    """Weights large enough that some tokens are much likelier than others, and answers differ from one another."""
    draw = np.random.default_rng(seed).normal
    params = jax.tree.map(lambda x: jnp.asarray(draw(0.02, 0.15, x.shape), x.dtype), models.abstract(config))
    return params | {"final_norm": {"scale": jnp.full(config.hidden_size, 3.0)}}


def some_prompts(lengths=LENGTHS, seed=1):
    draw = np.random.default_rng(seed).integers
    return [draw(0, 256, length).tolist() for length in lengths]


PARAMS = perturbed(SMALL)
PROMPTS = some_prompts()
FEW = [[token % 200 for token in prompt] for prompt in PROMPTS]


def answer(prompts=PROMPTS, key=KEY, params=PARAMS, config=SMALL, **options):
    out = rollout.generate(config, params, prompts, key, **{"max_new_tokens": NEW, **options})
    return rollout.Completions(*map(np.asarray, out))


def logits_behind(config, params, prompt, tokens):
    """Returns [len(tokens), V]: what the uncached model says before each token of an answer."""
    ids = jnp.asarray([[*prompt, *map(int, tokens)]])
    return np.asarray(models.forward(config, params, ids))[0, len(prompt) - 1 : -1]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_log_probs_are_those_of_teacher_forcing(family):
    params = perturbed(family)
    out = answer(params=params, config=family, temperature=0.7, unroll=family.qk_norm)
    assert (out.lengths == NEW).all()
    rows = np.zeros((len(PROMPTS), max(LENGTHS) + NEW), np.int32)
    for row, prompt in enumerate(PROMPTS):
        rows[row, : len(prompt) + NEW] = [*prompt, *out.tokens[row]]
    expected = models.sequence_log_probs(family, params, jnp.asarray(rows))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out.log_probs[row], expected[row, length - 1 : length - 1 + NEW], atol=1e-4)


def test_sampling_log_probs_are_of_the_distribution_that_was_drawn_from():
    out = answer(FEW, temperature=0.5, num_tokens=200)
    for row, prompt in enumerate(FEW[:2]):
        logits = logits_behind(SMALL, PARAMS, prompt, out.tokens[row])
        chosen = np.arange(NEW), out.tokens[row]
        np.testing.assert_allclose(out.sampling_log_probs[row], log_softmax(logits[:, :200] / 0.5)[chosen], atol=1e-4)
        np.testing.assert_allclose(out.log_probs[row], log_softmax(logits)[chosen], atol=1e-4)  # of all rows


def test_the_first_token_is_drawn_from_the_models_distribution():
    rows, prompt = 1024, PROMPTS[1]
    out = answer([prompt] * rows, max_new_tokens=1, temperature=2.0)
    probs = np.exp(log_softmax(logits_behind(SMALL, PARAMS, prompt, [0])[0] / 2.0))
    counts = np.bincount(out.tokens[:, 0], minlength=256)
    likely = probs > 0.01
    assert likely.sum() >= 4
    # 4.5 standard deviations: about 1 in 100,000 for each of a few counts, and the key is fixed.
    assert (np.abs(counts - rows * probs) < 4.5 * np.sqrt(rows * probs) + 1)[likely].all()


def test_an_answer_does_not_depend_on_batch_mates_padding_or_batch_size():
    everyone = answer()
    alone = answer(PROMPTS[1:2], first_row=1)
    np.testing.assert_array_equal(alone.tokens[0], everyone.tokens[1])
    np.testing.assert_allclose(alone.log_probs[0], everyone.log_probs[1], atol=1e-5)
    mates = answer([[7] * 40, *PROMPTS[1:]])
    np.testing.assert_array_equal(mates.tokens[1:], everyone.tokens[1:])


def test_samples_are_those_of_repeated_prompts():
    how = dict(temperature=0.8, repetition_penalty=1.3, stop_ids=range(9), first_row=7)
    several, repeated = answer(samples=3, **how), answer([p for p in PROMPTS for _ in range(3)], **how)
    assert several.tokens.shape == (3 * len(PROMPTS), NEW)
    np.testing.assert_array_equal(several.tokens, repeated.tokens)
    np.testing.assert_array_equal(several.lengths, repeated.lengths)
    np.testing.assert_allclose(several.log_probs, repeated.log_probs, atol=1e-5)
    assert len({tuple(row) for row in several.tokens.tolist()}) > 2 * len(PROMPTS)


def test_samples_share_the_reading_of_their_prompt():
    def flops(prompts, samples):
        request = generation._begin(
            SMALL, PARAMS, prompts, KEY, max_new_tokens=NEW, stop_ids=(), num_tokens=None, first_row=0,
            layout=Layout(), unroll=True, piece=128, samples=samples, slots=None,
        )  # fmt: skip
        return generation._start.lower(*request).compile().cost_analysis()["flops"]

    prompt = [1] * 96
    once = flops([prompt], 1)
    assert flops([prompt], 8) < 1.5 * once < 7 * once < flops([prompt] * 8, 1)


def test_any_mesh_gives_the_tokens_of_one_device(mesh):
    alone, split = (answer(samples=2, **how) for how in ({}, dict(layout=Layout(mesh))))
    np.testing.assert_array_equal(alone.tokens, split.tokens)
    np.testing.assert_allclose(alone.log_probs, split.log_probs, atol=1e-5)


def test_decode_rules_keep_weights_whole_where_fsdp_would_gather_them_at_every_token(mesh):
    layout = Layout(mesh, rollout.DECODE_RULES)
    prepared = rollout.prepare(SMALL, PARAMS, layout=layout)
    kernel = prepared.weights["decoder"]["layer_0"]["mlp"]["gate_up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.shape["tensor"] == kernel.size
    np.testing.assert_array_equal(answer(params=prepared).tokens, answer().tokens)


def test_the_key_alone_decides_what_is_drawn():
    same = [PROMPTS[1]] * 5
    first, again, other = answer(same), answer(same), answer(same, key=jax.random.key(4))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any(axis=1).all()
    assert len({tuple(row) for row in first.tokens.tolist()}) == 5  # rows with one prompt draw apart


def test_a_row_ends_with_its_first_stop_id_and_is_zero_behind_it():
    free = answer(temperature=0)
    stops = [int(free.tokens[0, 3]), int(free.tokens[2, 6])]
    out = answer(temperature=0, stop_ids=stops)
    for row in range(len(PROMPTS)):
        hits = np.flatnonzero(np.isin(free.tokens[row], stops))
        length = hits[0] + 1 if len(hits) else NEW
        assert out.lengths[row] == length
        np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
        assert not out.tokens[row, length:].any() and not out.log_probs[row, length:].any()
    assert out.lengths[0] <= 4 and len(set(out.lengths.tolist())) > 1


def test_padded_rows_of_the_vocabulary_are_never_sampled():
    params = dict(PARAMS, head=PARAMS["head"].at[200:].multiply(20.0))  # the likeliest, were they allowed
    assert answer(FEW, params=params, temperature=0).tokens.min() >= 200
    for temperature in (0, 1, 100):
        assert answer(FEW, params=params, temperature=temperature, num_tokens=200).tokens.max() < 200


def test_penalties_are_for_what_was_said_and_for_what_was_read():
    prompt = list(range(1, 110))
    tame = [prompt] * 3
    said = answer(tame, temperature=0, presence_penalty=1e4, max_new_tokens=16).tokens[0].tolist()
    assert len(set(said)) == 16 and set(said) & set(prompt)
    unread = answer(tame, temperature=0, repetition_penalty=1e3, max_new_tokens=16).tokens[0].tolist()
    assert len(set(unread)) == 16 and not set(unread) & set(prompt)


def test_candidates_shrink_to_the_greedy_choice():
    greedy = answer(temperature=0).tokens
    for options in (
        dict(top_k=1),
        dict(top_p=1e-6),
        dict(min_p=1.0),
        dict(top_k=4, top_p=1e-6),
        dict(temperature=1e-5),
    ):
        np.testing.assert_array_equal(answer(**options).tokens, greedy)
    assert (answer(top_k=4, top_p=0.9, min_p=0.05).tokens != greedy).any()


STREAM = dict(temperature=0.8, top_k=20, repetition_penalty=1.2, max_new_tokens=NEW)


def test_streaming_yields_what_generate_returns():
    whole = answer(PROMPTS[1:2], **STREAM)
    prepared = rollout.prepare(SMALL, PARAMS)
    assert list(rollout.stream(SMALL, prepared, PROMPTS[1], KEY, **STREAM)) == whole.tokens[0].tolist()
    stop = int(whole.tokens[0, 4])
    stopped = list(rollout.stream(SMALL, prepared, PROMPTS[1], KEY, stop_ids=[stop], **STREAM))
    assert stopped == whole.tokens[0, : whole.tokens[0].tolist().index(stop) + 1].tolist()


def test_the_loop_ends_when_every_row_has_stopped():
    stop = list(rollout.stream(SMALL, PARAMS, PROMPTS[1], KEY, **STREAM))[2]
    request = generation._begin(
        SMALL, PARAMS, PROMPTS[1:2], KEY, stop_ids=[stop], num_tokens=None, first_row=0, layout=Layout(), unroll=True,
        piece=64, samples=1, slots=None,
        **STREAM,
    )  # fmt: skip
    state = generation._advance(*request, generation._start(*request), np.int32(NEW))
    assert int(state.step) <= 3 and bool(state.done.all())


def test_a_new_length_batch_or_value_compiles_nothing_new():
    prepared = rollout.prepare(SMALL, PARAMS)
    prompts = lambda lengths: [[token % 200 for token in prompt] for prompt in some_prompts(lengths)]
    answer(prompts([16] * 8), params=prepared, max_new_tokens=16, stop_ids=[1, 2], top_p=0.5, num_tokens=200)
    before = generation._run._cache_size()
    for number, longest, new, p in ((7, 16, 16, 0.5), (8, 1, 9, 0.9), (7, 9, 1, 0.2)):
        lengths = np.random.default_rng(number).integers(1, longest + 1, number)
        key = jax.random.key(number)
        answer(
            prompts(lengths), key, params=prepared, max_new_tokens=new, stop_ids=[3, 4], top_p=p,
            temperature=p, first_row=number, num_tokens=240 + number,
        )  # fmt: skip
    assert generation._run._cache_size() == before


def test_without_unrolling_the_program_does_not_grow_with_depth():
    def lines(layers, unroll):
        config = tiny(num_hidden_layers=layers)
        engine, weights, request = generation._begin(
            config, models.init(config, KEY), PROMPTS, KEY, max_new_tokens=NEW, stop_ids=(), num_tokens=None,
            first_row=0, layout=Layout(), unroll=unroll, piece=64, samples=1, slots=None, temperature=0,
        )  # fmt: skip
        return len(generation._run.lower(engine, weights, request).as_text().splitlines())

    assert lines(6, unroll=False) <= 1.05 * lines(2, unroll=False)
    assert lines(6, unroll=True) > 1.5 * lines(2, unroll=True)


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = [bucket(n, 16) for n in range(1, 32_769)]
    assert len(set(sizes)) == 23  # 16, 24, 32, 48, ..., 32768
    assert all(size >= n and (size <= 16 or size < 1.5 * n) for n, size in enumerate(sizes, 1))
    assert {bucket(n, multiple=6) % 6 for n in range(1, 100)} == {0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[1], []]), r"prompts\[1\] is empty"),
        (dict(prompts=["text"]), r"prompts\[0\] is str"),
        (dict(prompts=[[1, 256]]), r"prompts\[0\] holds the id 256; expected ids from 0 to 255"),
        (dict(prompts=[[1, -1]]), r"prompts\[0\] holds the id -1"),
        (dict(prompts=[[1, 2.0]]), r"prompts\[0\] holds the id 2.0"),
        (dict(prompts=[[1, 200]], num_tokens=200), "expected ids from 0 to 199"),
        (dict(prompts=[[1] * 120]), r"prompts\[0\] has 120 ids .* together 130; the model reads at most 128"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(samples=0), "samples is 0; expected a whole number of at least 1"),
        (dict(samples=2.0), "samples is 2.0"),
        (dict(num_tokens=300), "num_tokens is 300; expected a whole number from 1 to 256"),
        (dict(stop_ids=[999]), "stop_ids holds the id 999"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature="hot"), "temperature is 'hot'"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(min_p=1.5), "min_p is 1.5"),
        (dict(presence_penalty=1e30), "presence_penalty is 1e.30; expected from -10000"),
        (dict(repetition_penalty=1e-50), "repetition_penalty is 1e-50; expected from 0.001"),
        (dict(repetition_penalty=0), "repetition_penalty is 0"),
        (dict(presence_penalty=float("inf")), "presence_penalty is inf"),
    ],
)
def test_bad_input_is_one_line_that_names_it(options, words):
    with pytest.raises(InputError, match=words) as caught:
        answer(**options)
    assert "\n" not in str(caught.value)


def test_weights_prepared_for_another_model_are_refused():
    with pytest.raises(InputError, match="prepare them again"):
        answer(config=SMALL.replace(rope_theta=1e4), params=rollout.prepare(SMALL, PARAMS))
