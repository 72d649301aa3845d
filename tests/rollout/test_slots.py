"""Continuous batching samples what the static batch samples, in as few steps as its rows allow, on any mesh."""

import heapq
import re

import jax
import numpy as np
import pytest

from qwen_jax import rollout, sharding
from qwen_jax.errors import InputError
from qwen_jax.rollout import generation
from qwen_jax.rollout.slots import SlotEngine
from qwen_jax.sharding import Layout
from tests.conftest import MESHES
from tests.rollout.test_generate import KEY, PARAMS, SMALL, answer, some_prompts

PROMPTS = some_prompts(np.random.default_rng(7).integers(1, 21, 11))
HOW = dict(max_new_tokens=14, stop_ids=range(5, 256, 20), temperature=0.9, first_row=5)
ONE_DEVICE = Layout()
FILTERS = dict(top_k=40, repetition_penalty=1.2, presence_penalty=0.1)  # what is said is known of each row


def same(found, expected, atol=1e-5):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=atol)
    np.testing.assert_allclose(found.sampling_log_probs, expected.sampling_log_probs, atol=atol)


@pytest.mark.parametrize(("slots", "samples", "options"), [(1, 1, {}), (3, 2, FILTERS), (100, 3, {})])
def test_slots_sample_what_the_static_batch_samples(slots, samples, options):
    """Fewer rows than answers, a group of samples that is dealt in parts, and more rows than there are answers."""
    how = HOW | options | dict(prompts=PROMPTS, samples=samples)
    expected = answer(**how)
    assert len(set(expected.lengths.tolist())) > 5  # rows end at many times
    same(answer(slots=slots, **how), expected)


def test_any_mesh_samples_what_one_device_samples(mesh):
    how = HOW | dict(prompts=PROMPTS, samples=2)
    same(answer(slots=8, layout=Layout(mesh, rollout.DECODE_RULES), **how), answer(**how))


def test_devices_of_a_split_batch_exchange_numbers_of_rows_and_no_caches():
    layout = Layout(sharding.make_mesh(MESHES["fsdp8"]), rollout.DECODE_RULES)
    request = begun(some_prompts([30] * 64), slots=16, layout=layout, max_new_tokens=60)
    program = generation._run_slots.lower(*request).compile().as_text()
    sizes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", program)
    assert sizes and max(np.prod([int(n) for n in size.split(",") if n]) for size in sizes) <= 2 * 16


def begun(prompts, slots, layout=ONE_DEVICE, **how):
    """Returns a slot engine, weights and a request."""
    engine, *rest = generation._begin(
        SMALL, PARAMS, prompts, KEY, samples=1, slots=slots, stop_ids=(), num_tokens=None, first_row=0,
        layout=layout, unroll=True, piece=64, **how,
    )  # fmt: skip
    return SlotEngine(engine, slots), *rest


def test_no_row_waits_while_there_is_an_answer_to_begin():
    """The steps are those of the plainest schedule: whoever is free first takes the next answer."""
    lengths = np.random.default_rng(0).integers(1, 15, 24).tolist()
    prompts = some_prompts([2] * len(lengths))
    engine, weights, request = begun(prompts, slots=4, max_new_tokens=lengths)
    ends = [0] * 4
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    state = jax.jit(engine.run)(weights, request)
    assert int(state.step) == max(ends) < 0.75 * sum(max(lengths[i : i + 4]) for i in range(0, 24, 4))
    np.testing.assert_array_equal(state.answers.lengths, lengths)


def test_the_cache_is_of_the_slots_and_the_stage_and_not_of_the_queue():
    engine, _, request = begun(some_prompts([30] * 200), slots=8, max_new_tokens=60)
    state = jax.eval_shape(engine._start, request)
    assert [x.shape for x in state.cache.k] == [(8, 2, 32 + 64, 16)]
    assert [x.shape for x in state.stage.cache.k] == [(2, 2, 32, 16)]


def test_another_number_of_prompts_or_other_limits_compile_nothing_new():
    prepared = rollout.prepare(SMALL, PARAMS)
    answer(some_prompts([16] * 8), params=prepared, max_new_tokens=16, slots=4)
    before = generation._run_slots._cache_size()
    for count, new in ((7, 9), (8, [3, 12, 1, 16, 2, 2, 2, 2])):
        answer(some_prompts([5] * count), jax.random.key(count), params=prepared, max_new_tokens=new, slots=4)
    assert generation._run_slots._cache_size() == before


@pytest.mark.parametrize("slots", [None, 4])
def test_each_prompt_may_have_a_limit_of_its_own(slots):
    limits = [1, 14, 3, 8, 5, 2, 14, 9, 1, 7, 4]
    free, held = (answer(PROMPTS, max_new_tokens=new, slots=slots) for new in (14, limits))
    np.testing.assert_array_equal(held.lengths, limits)
    for row, length in enumerate(limits):
        np.testing.assert_array_equal(held.tokens[row, :length], free.tokens[row, :length])
        assert not held.tokens[row, length:].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(slots=0), "slots is 0; expected a whole number of at least 1"),
        (dict(slots=1.5), "slots is 1.5"),
        (dict(slots=4, samples=-1), "samples is -1"),
        (dict(slots=4, stop_ids=[256]), "stop_ids holds the id 256; expected ids from 0 to 255"),
        (dict(slots=4, prompts=[]), "prompts is empty"),
        (dict(slots=4, prompts=[[1], []]), r"prompts\[1\] is empty"),
        (dict(slots=4, prompts=[[1] * 120]), r"prompts\[0\] has 120 ids .* together 130; the model reads at most 128"),
        (
            dict(max_new_tokens=[3, 4], prompts=[[1]]),
            "max_new_tokens has 2 numbers; expected one, or one for each of 1",
        ),
        (dict(max_new_tokens=[3, 0], prompts=[[1], [2]]), r"max_new_tokens\[1\] is 0"),
        (dict(max_new_tokens=[1, 100], prompts=[[1], [2] * 30]), r"prompts\[1\] has 30 ids and .* 100, together 130"),
    ],
)
def test_bad_input_is_one_line_that_names_it(options, words):
    with pytest.raises(InputError, match=words) as caught:
        answer(**options)
    assert "\n" not in str(caught.value)
