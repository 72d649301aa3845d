"""Prompts in, completions out: what users call.

Shapes: N prompts, n samples of each, R = N * n answers, M tokens of each.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from qwen_jax import models, sharding
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.rollout import prompts as inputs
from qwen_jax.rollout.choice import plan
from qwen_jax.rollout.decoding import NO_TOKEN, Engine, Request
from qwen_jax.rollout.slots import SlotEngine
from qwen_jax.sharding import Layout

ONE_DEVICE = Layout()

# Weights whole on every device but for the tensor axis, so that no step gathers them. With the rules of training,
# `generate` gathers each weight at each token: slow, but it needs no more memory than training.
DECODE_RULES = sharding.Rules(embed=())

PIECE = 4096  # tokens of a prompt read at a time: enough rows for any matrix product

UNROLLED_LAYERS = 8  # deeper models compile one layer and scan it: 48 layers then compile as fast as 6


class Completions(NamedTuple):
    """What was sampled.

    Attributes:
      tokens: [R, max_new_tokens] int32, the samples of a prompt behind each other; the stop id included, 0 behind it.
      log_probs: [R, max_new_tokens] float32, log-probability of each token under the policy itself: temperature 1, no
        penalty, no filter, all V rows of the vocabulary. That is what `models.sequence_log_probs` gives for prompt and
        answer, so it is the old log-probability of a policy gradient. 0 behind the end.
      lengths: [R] int32, tokens of each answer, the stop id counted.
      sampling_log_probs: [R, max_new_tokens] float32, log-probability in the distribution the token was drawn from,
        after penalties, temperature, filters and without padded rows; 0 if greedy. An importance weight of the policy
        over what was sampled is exp(log_probs - sampling_log_probs). 0 behind the end.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    sampling_log_probs: jax.Array


@dataclass(frozen=True)
class Prepared:
    """Weights as sampling reads them, from `prepare`. Takes the place of params in `generate` and `stream`.

    Attributes:
      config: the model, as its decoder for sampling runs it.
      layout: where the weights are; the calls that are given these weights use it too.
      weights: the tree of `models.fuse`.
    """

    config: QwenConfig
    layout: Layout
    weights: dict


def prepare(config: QwenConfig, params: dict, *, layout: Layout = ONE_DEVICE, unroll: bool | None = None) -> Prepared:
    """Lays weights out for decoding, once for many calls: fused, in config.dtype, on the devices that use them.

    `generate` does so itself when it is given params; a chat, or several calls with the same weights, save that time.

    Args:
      config, params, layout, unroll: as in `generate`.
    """
    unroll = config.num_hidden_layers <= UNROLLED_LAYERS if unroll is None else unroll
    config = config.replace(scan_layers=not unroll, remat="none")
    return Prepared(config, layout, _fuser(config, layout)(params))


@functools.lru_cache(maxsize=32)
def _fuser(config: QwenConfig, layout: Layout):
    fuse = functools.partial(models.fuse, config)
    if layout.mesh is None:
        return jax.jit(fuse)
    shapes = jax.eval_shape(fuse, models.abstract(config))
    axes = models.fused_axes(config, models.axes(config))
    return jax.jit(fuse, out_shardings=sharding.tree_shardings(axes, shapes, layout))


def generate(
    config: QwenConfig,
    params: dict | Prepared,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    max_new_tokens: int | Sequence[int],
    samples: int = 1,
    slots: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    stop_ids: Sequence[int] = (),
    num_tokens: int | None = None,
    first_row: int = 0,
    layout: Layout = ONE_DEVICE,
    unroll: bool | None = None,
    piece: int = PIECE,
) -> Completions:
    """Answers every prompt, in one program that samples token by token.

    Without `slots` it reads all prompts, then samples all answers side by side until the last has ended: for few
    answers, or such as are about equally long. With `slots` so many are in work at a time, and the next takes the place
    of each that ends: no row waits for the longest. The cache then is slots x (longest prompt + max_new_tokens), and a
    quarter of what of that is for prompts, whose next ones are read ahead.

    Several samples of a prompt share its reading; they are those of the same list with each prompt repeated.

    An answer depends on its prompt, `key` and its row only: not on the other prompts, their number, slots, padding or
    mesh. (As far as floating point goes: sums taken in another order can flip a choice between equals.)

    Programs are compiled per bucket of prompt length, batch size, number of stop ids and max_new_tokens
    (`prompts.bucket`), per number of samples, per top_k and per set of filters that are on; other values compile
    nothing new.

    Args:
      config: the model.
      params: its parameters, or `prepare` of them.
      prompts: lists of ids, of any lengths.
      key: row i draws with fold_in(key, first_row + i); rows are answers, sample s of prompt p is row p * samples + s.
      max_new_tokens: an answer ends here if no stop id came; one number for all or one for each prompt.
      samples: answers to each prompt.
      slots: how many answers are in work at a time, rounded up to what the mesh splits evenly; None for all at once.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p, top_k, min_p, repetition_penalty, presence_penalty: see `ops.sampling`. top_k 0 is off.
      stop_ids: any of these ends an answer.
      num_tokens: the tokenizer's vocab_size; the model's rows from there on are padding and never sampled. All rows
        are tokens if None.
      first_row: the row number of the first answer; lets a long list be answered in pieces as if it were one.
      layout: mesh and rules; DECODE_RULES suit decoding. In a multi-host run all processes pass the same prompts.
      unroll: compile every layer of its own: steps about a tenth faster on a CPU, compile time that grows with depth.
        None does so up to UNROLLED_LAYERS layers.
      piece: tokens of a prompt that are read at a time, about; fewer need less memory.

    Returns:
      Completions, whole on every device.

    Raises:
      InputError: an empty or too long prompt, an unknown id, a value out of range; the message names it.
    """
    engine, weights, request = _begin(
        config, params, prompts, key, samples=samples, slots=slots,
        max_new_tokens=max_new_tokens, stop_ids=stop_ids, num_tokens=num_tokens, first_row=first_row,
        layout=layout, unroll=unroll, piece=piece, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
    )  # fmt: skip
    R, M = len(prompts) * samples, int(np.max(max_new_tokens))
    if slots is None:
        answers = _run(engine, weights, request)
    else:
        parts, rows = engine.layout.size("batch"), min(slots, len(request.lengths) * samples)
        answers = _run_slots(SlotEngine(engine, -(-rows // parts) * parts), weights, request)
    return Completions(*(x[:R] if x.ndim == 1 else x[:R, :M] for x in answers))


def stream(
    config: QwenConfig,
    params: dict | Prepared,
    prompt: Sequence[int],
    key: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    num_tokens: int | None = None,
    layout: Layout = ONE_DEVICE,
    unroll: bool | None = None,
    piece: int = PIECE,
    **sampling: float,
) -> Iterator[int]:
    """Answers one prompt, token by token: those of `generate(config, params, [prompt], key, ...)`, as they come.

    Args:
      prompt: a list of ids; everything else, `sampling` included (temperature, top_p, ...), as in `generate`.

    Returns:
      The ids, lazily; a stop id is the last of them. It may be dropped at any point. Give it `prepare`d weights.

    Raises:
      InputError: as `generate`, before the first token is asked for.
    """
    engine, weights, request = _begin(
        config, params, [prompt], key, samples=1, slots=None,
        max_new_tokens=max_new_tokens, stop_ids=stop_ids, num_tokens=num_tokens, first_row=0,
        layout=layout, unroll=unroll, piece=piece, **sampling,
    )  # fmt: skip

    def tokens():
        state = _start(engine, weights, request)
        yield int(state.token[0])
        for count in range(2, max_new_tokens + 1):
            if state.done[0]:
                return
            state = _advance(engine, weights, request, state, np.int32(count))
            yield int(state.token[0])

    return tokens()


def _begin(
    config, params, prompts, key,
    *, max_new_tokens, stop_ids, num_tokens, first_row, layout, unroll, piece, samples, slots, **knobs,
):  # fmt: skip
    """Checks a request and puts it on the devices. Returns the engine, its weights, and the request."""
    size = config.vocab_size if num_tokens is None else num_tokens
    lists, most = inputs.check(config, prompts, max_new_tokens=max_new_tokens, num_tokens=size, stop_ids=stop_ids)
    for name, value in (("piece", piece), ("samples", samples), ("slots", 1 if slots is None else slots)):
        if not inputs.is_whole(value) or value < 1:
            raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
    steps, knobs = plan(num_tokens=size, vocab_size=config.vocab_size, **knobs)
    if not isinstance(params, Prepared):
        params = prepare(config, params, layout=layout, unroll=unroll)
    elif params.config != config.replace(scan_layers=params.config.scan_layers, remat="none"):
        raise InputError("config is not the one that the weights were prepared with; prepare them again")
    layout = params.layout
    padded = inputs.pad(lists, rows=layout.size("batch"), slots=layout.size("length"))
    stops = np.full(inputs.bucket(len(stop_ids), 4), NO_TOKEN, np.int32)
    stops[: len(stop_ids)] = stop_ids
    limits = np.zeros_like(padded.lengths)
    limits[: len(most)] = most
    request = Request(*padded, key, np.int32(first_row), stops, limits, knobs)
    engine = Engine(params.config, layout, steps, inputs.bucket(max(most), inputs.SHORTEST), samples, piece)
    return engine, params.weights, request


@functools.partial(jax.jit, static_argnames="engine")
def _run(engine: Engine, weights: dict, request: Request):
    state = engine.start(weights, request)
    state = engine.advance(weights, request, state, np.int32(engine.room))
    return _whole(engine, (state.tokens, state.log_probs, state.lengths, state.sampling_log_probs))


@functools.partial(jax.jit, static_argnames="engine")
def _run_slots(engine: SlotEngine, weights: dict, request: Request):
    return _whole(engine.engine, engine.run(weights, request).answers)


def _whole(engine: Engine, answers):
    if engine.layout.mesh is None:
        return answers
    return jax.lax.with_sharding_constraint(answers, sharding.replicated(engine.layout))


@functools.partial(jax.jit, static_argnames="engine")
def _start(engine: Engine, weights: dict, request: Request):
    return engine.start(weights, request)


@functools.partial(jax.jit, static_argnames="engine", donate_argnames="state")
def _advance(engine: Engine, weights: dict, request: Request, state, until: jax.Array):
    return engine.advance(weights, request, state, until)
