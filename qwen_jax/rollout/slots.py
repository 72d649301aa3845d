"""Continuous batching: a row whose answer has ended takes the next one, in one program that never leaves the device.

The static batch of `rollout.decoding` runs until its longest answer ends, its other rows idle. Here few rows, the
slots, work off a queue of many answers. When a row is free it is given the next answer: the keys and values of the
prompt are copied into it from a stage of prompts that were read ahead, a batch at a time. An answer to a prompt that
has several is dealt from the same reading.

Two things keep this simple. First, the room for answers is a ring: all rows write into the same slot of the cache,
T + step mod M, whenever they began. No answer has more than M tokens, so what a row overwrites is never its own; and
attention goes by positions and segment ids, which the cache holds for each slot, so the order of slots means nothing
to it. Second, a filled row first reads the last token of its prompt (again), so that one kind of step serves all rows.

On a mesh the rows are split in P parts, each with its own part of the stage, and all parts draw on one queue. Copying
thus stays on the device; only the numbers of rows and prompts are looked at by all.

Shapes: P parts, R rows in all, r of each part; G staged prompts in all, g of each part; N prompts in the queue, n
answers to each, A = N * n answers; T prompt slots, M answer slots, S = T + M cache slots, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.models import KVCache
from qwen_jax.rollout.choice import Seen
from qwen_jax.rollout.decoding import Engine, Request, over_rows
from qwen_jax.sharding import constrain

READ_AHEAD = 0.25  # prompts in the stage: what fills this share of the rows


class Stage(NamedTuple):
    """Prompts that are read and wait for rows.

    Attributes:
      cache: of G rows and T slots.
      seen: what the penalties need, of G rows.
      prompts: [P, g] int32 their numbers.
      ready: [P] int32, how many answers can be dealt from it.
      dealt: [P] int32, how many of these were.
    """

    cache: KVCache
    seen: Seen
    prompts: jax.Array
    ready: jax.Array
    dealt: jax.Array


class Answers(NamedTuple):
    """Answers so far; 0 behind the end.

    Attributes:
      tokens: [A, M] int32.
      log_probs: [A, M] float32.
      lengths: [A] int32.
      sampling_log_probs: [A, M] float32.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    sampling_log_probs: jax.Array


class State(NamedTuple):
    """Everything that changes.

    Attributes:
      step: scalar int32, tokens that were read since the start.
      next: scalar int32, the first prompt that was not read ahead.
      stage: prompts read ahead.
      cache: of R rows.
      seen: of R rows.
      answer: [R] int32, which answer a row works on; A if it is free.
      count: [R] int32, how many tokens that has.
      token: [R] int32, the last of these, or the prompt's last.
      answers: what comes out.
    """

    step: jax.Array
    next: jax.Array
    stage: Stage
    cache: KVCache
    seen: Seen
    answer: jax.Array
    count: jax.Array
    token: jax.Array
    answers: Answers


@dataclass(frozen=True)
class SlotEngine:
    """What is compiled in.

    Attributes:
      engine: the parts shared with the static batch.
      rows: R, a multiple of P.
    """

    engine: Engine
    rows: int

    def run(self, weights: dict, request: Request) -> State:
        """Answers everything in the request, whose prompts without tokens are at its end."""

        def unfinished(state):
            return jnp.any(self._live(state)) | jnp.any(_left(state) > 0) | (state.next < _prompts(request))

        def steps_on(state):
            dealable = jnp.any((_left(state) > 0) & (self._free(state) > 0))
            return jnp.any(self._live(state)) & ~dealable & ~self._starves(state, request)

        # Loops that run once or not at all where a condition would do: what a loop carries stays where it is.
        def go_on(state):
            starves = lambda state: self._starves(state, request)
            state = jax.lax.while_loop(starves, lambda state: self._read_ahead(state, weights, request), state)
            state = self._deal(state, request)
            return jax.lax.while_loop(steps_on, lambda state: self._step(state, weights, request), state)

        return jax.lax.while_loop(unfinished, go_on, self._start(request))

    def _start(self, request: Request) -> State:
        engine, R, (N, T) = self.engine, self.rows, request.tokens.shape
        P, G = self._parts, self._parts * self._ahead
        A, M, V = N * engine.samples, engine.room, engine.config.vocab_size
        unseen = lambda rows: Seen.of_prompts(
            engine.plan, jnp.zeros((rows, T), jnp.int32), jnp.zeros((rows, T), bool), V
        )
        none_P, none_R, none_AM = jnp.zeros(P, jnp.int32), jnp.zeros(R, jnp.int32), jnp.zeros((A, M), jnp.float32)
        stage = Stage(engine.empty_cache(G, T), unseen(G), jnp.zeros((P, self._ahead), jnp.int32), none_P, none_P)
        answers = Answers(none_AM.astype(jnp.int32), none_AM, jnp.zeros(A, jnp.int32), none_AM)
        return State(
            step=jnp.int32(0), next=jnp.int32(0), stage=stage, cache=engine.empty_cache(R, T + M), seen=unseen(R),
            answer=none_R + A, count=none_R, token=none_R, answers=answers,
        )  # fmt: skip

    def _starves(self, state: State, request: Request) -> jax.Array:
        """Whether to read more prompts: all parts read together, so half of them should be in need."""
        starving_P = (_left(state) == 0) & (self._free(state) > 0)
        due = (2 * jnp.sum(starving_P) >= self._parts) | ~jnp.any(self._live(state))
        return (state.next < _prompts(request)) & jnp.any(starving_P) & due

    def _read_ahead(self, state: State, weights: dict, request: Request) -> State:
        """Reads the next prompts for the parts that have none."""
        P, g, T = self._parts, self._ahead, request.tokens.shape[1]
        empty_P = _left(state) == 0
        first_P = state.next + g * (jnp.cumsum(empty_P) - empty_P)
        prompts_Pg = first_P[:, None] + jnp.arange(g)[None, :]
        ready_P = self.engine.samples * jnp.clip(_prompts(request) - first_P, 0, g)
        of_queue = lambda x: x.at[prompts_Pg.reshape(-1)].get(mode="fill", fill_value=0)
        tokens_GT = constrain(of_queue(request.tokens), ("batch", "length"), self.engine.layout)
        _, cache, seen = self.engine.read_prompts(weights, tokens_GT, of_queue(request.lengths))
        # A row reads the last token of its prompt once more.
        cache = cache._replace(segment_ids=cache.segment_ids.at[:, T - 1].set(0), index=jnp.int32(0))
        new = Stage(cache, seen, prompts_Pg, ready_P, jnp.zeros_like(ready_P))
        if P > 1:  # parts that still have prompts keep them
            empty_G = jnp.repeat(empty_P, g)
            pick = lambda which, x, y, axis: jnp.where(jnp.expand_dims(which, _but(axis, x.ndim)), x, y)
            old = state.stage
            cache, seen = over_rows(functools.partial(pick, empty_G), (cache, seen), (old.cache, old.seen))
            rest = (pick(empty_P, *pair, 0) for pair in zip(new[2:], old[2:], strict=True))
            new = Stage(cache, seen, *rest)
        return state._replace(stage=new, next=state.next + g * jnp.sum(empty_P))

    def _deal(self, state: State, request: Request) -> State:
        """Gives each free row the next answer of its part's stage, as far as there are any."""
        stage, n, A, T = state.stage, self.engine.samples, len(state.answers.lengths), request.tokens.shape[1]
        free_Pr = (state.answer == A).reshape(self._parts, -1)
        turn_Pr = stage.dealt[:, None] + jnp.cumsum(free_Pr, axis=1) - 1
        taken_Pr = free_Pr & (turn_Pr < stage.ready[:, None])
        source_Pr = jnp.where(taken_Pr, turn_Pr // n, 0)
        prompt_R = jnp.take_along_axis(stage.prompts, source_Pr, axis=1).reshape(-1)
        taken_R = taken_Pr.reshape(-1)
        given = lambda new_R, old_R: jnp.where(taken_R, new_R, old_R)

        ring_1S = (jnp.arange(state.cache.positions.shape[1]) >= T)[None, :]
        segment_ids_RS = jnp.where(taken_R[:, None] & ring_1S, 0, state.cache.segment_ids)  # of the answer before
        rows = state.cache._replace(segment_ids=segment_ids_RS), state.seen
        cache, seen = self._copy(rows, (stage.cache, stage.seen), jnp.where(taken_Pr, source_Pr, -1).reshape(-1))
        return state._replace(
            stage=stage._replace(dealt=stage.dealt + jnp.sum(taken_Pr, axis=1)),
            cache=cache,
            seen=seen,
            answer=given(n * prompt_R + (turn_Pr % n).reshape(-1), state.answer),
            count=given(0, state.count),
            token=given(request.tokens.at[prompt_R, T - 1].get(mode="clip"), state.token),
        )

    def _copy(self, rows, staged, source_R: jax.Array):
        """Copies staged row source_R[i] of the same part, none if it is negative, into row i: its first T slots."""
        layout = self.engine.layout
        if layout.mesh is None:
            return _copy_rows(rows, staged, source_R)
        names = {4: ("batch", "kv_heads", None, "head_dim"), 2: ("batch", None), 0: ()}
        spec = lambda x: layout.rules.spec((None,) * (x.ndim - 4) + names[min(x.ndim, 4)])
        specs = tuple(jax.tree.map(spec, tree) for tree in (rows, staged, source_R[:, None]))
        local = lambda rows, staged, source_r1: _copy_rows(rows, staged, source_r1[:, 0])
        # Each device goes round as often as its own rows want; nothing is exchanged, so nobody waits.
        split = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
        return split(rows, staged, source_R[:, None])

    def _step(self, state: State, weights: dict, request: Request) -> State:
        """Reads and chooses one token of each row."""
        engine, A, (N, T) = self.engine, len(state.answers.lengths), request.tokens.shape
        live_R, prompt_R = state.answer < A, jnp.minimum(state.answer // engine.samples, N - 1)
        lengths_R = request.lengths[prompt_R]
        cache = state.cache._replace(index=T + state.step % engine.room)
        marks = (lengths_R + state.count - 1)[:, None], live_R.astype(jnp.int32)[:, None]
        hidden_RD, cache = engine.read_token(weights, state.token, *marks, cache, lengths_R)
        token_R, *log_probs, stopped_R = engine.draw(
            weights, request, hidden_RD, state.seen, request.first_row + state.answer, state.count
        )
        ended_R = stopped_R | (state.count + 1 >= request.limits[prompt_R])

        def put(into_AM, new_R):  # free rows write to answer A, which is none
            return constrain(into_AM.at[state.answer, state.count].set(new_R, mode="drop"), (None, None), engine.layout)

        old = state.answers
        answers = Answers(
            tokens=put(old.tokens, token_R),
            log_probs=put(old.log_probs, log_probs[0]),
            lengths=old.lengths.at[state.answer].set(state.count + 1, mode="drop"),
            sampling_log_probs=put(old.sampling_log_probs, log_probs[1]),
        )
        return state._replace(
            step=state.step + 1,
            cache=cache,
            seen=state.seen.add(token_R),
            answer=jnp.where(ended_R, A, state.answer),
            count=state.count + live_R,
            token=token_R,
            answers=answers,
        )

    def _live(self, state: State) -> jax.Array:
        return state.answer < len(state.answers.lengths)

    def _free(self, state: State) -> jax.Array:
        """Returns how many rows of each part are free, [P]."""
        return jnp.sum(~self._live(state).reshape(self._parts, -1), axis=1)

    @property
    def _parts(self) -> int:
        return self.engine.layout.size("batch")

    @property
    def _ahead(self) -> int:
        """g."""
        return max(1, math.ceil(self.rows // self._parts * READ_AHEAD / self.engine.samples))


def _left(state: State) -> jax.Array:
    """Returns how many answers each part can still deal from its stage, [P]."""
    return state.stage.ready - state.stage.dealt


def _prompts(request: Request) -> jax.Array:
    """Returns how many prompts there are beside those that fill the batch."""
    return jnp.sum(request.lengths > 0)


def _copy_rows(rows, staged, source_r: jax.Array):
    wanted_r = jnp.nonzero(source_r >= 0, size=len(source_r), fill_value=0)[0]

    def copy(i, rows):
        row = wanted_r[i]

        def put(x, y, axis):
            piece = jax.lax.dynamic_slice_in_dim(y, source_r[row], 1, axis)
            return jax.lax.dynamic_update_slice(x, piece, [row if i == axis else 0 for i in range(x.ndim)])

        return over_rows(put, rows, staged)

    return jax.lax.fori_loop(0, jnp.sum(source_r >= 0), copy, rows)


def _but(axis: int, ndim: int) -> list[int]:
    return [i for i in range(ndim) if i != axis]
