"""The sampling loop as pure functions: read the prompts, then one token a step until every row has stopped.

Here the batch stays as it is until its last row has stopped; `rollout.slots` refills rows, from the same parts.

Shapes: N prompts, B rows (N times the samples of each), T prompt slots, M answer slots, S = T + M cache slots, L
layers, D model width, K kv heads, H head dim, V vocabulary, E stop ids.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.config import QwenConfig
from qwen_jax.models import Decoder, KVCache
from qwen_jax.ops import sampling
from qwen_jax.rollout.choice import Knobs, Plan, Seen, choose
from qwen_jax.sharding import Layout, constrain

NO_TOKEN = -1  # fills the list of stop ids; equal to no token


class Request(NamedTuple):
    """What a program takes beside the weights. Nothing here is compiled in but the shapes.

    Attributes:
      tokens: [N, T] int32 left-padded prompts.
      lengths: [N] int32 their lengths, 0 for those that only fill the batch.
      key: row i draws with fold_in(key, first_row + i).
      first_row: scalar int32.
      stop_ids: [E] int32; a row ends with the first of these that it samples.
      limits: [N] int32, at most M tokens an answer to each prompt.
      knobs: values of the sampling.
    """

    tokens: jax.Array
    lengths: jax.Array
    key: jax.Array
    first_row: jax.Array
    stop_ids: jax.Array
    limits: jax.Array
    knobs: Knobs


class State(NamedTuple):
    """Everything that changes between two tokens.

    Attributes:
      step: scalar int32, how many tokens each unfinished row has.
      cache: keys and values of what the model has read: all but the last token.
      token: [B] int32 the last token of each row.
      done: [B] bool.
      seen: what the penalties need.
      tokens: [B, M] int32, 0 behind the end of an answer.
      log_probs, sampling_log_probs: [B, M] float32, 0 behind the end.
      lengths: [B] int32 tokens so far.
    """

    step: jax.Array
    cache: KVCache
    token: jax.Array
    done: jax.Array
    seen: Seen
    tokens: jax.Array
    log_probs: jax.Array
    sampling_log_probs: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Engine:
    """What is compiled in: one program for each of these and each shape.

    Attributes:
      config: the model, as its decoder for sampling runs it.
      layout: mesh and rules.
      plan: the steps of sampling.
      room: M, room for the answer.
      samples: answers to each prompt, which is read once for all of them.
      piece: how many tokens of a prompt are read at a time, about: activations of more never exist at once.
    """

    config: QwenConfig
    layout: Layout
    plan: Plan
    room: int
    samples: int
    piece: int

    def start(self, weights: dict, request: Request) -> State:
        """Reads the prompts and samples the first token of every row."""
        hidden_ND, cache, seen = self.read_prompts(weights, request.tokens, request.lengths)
        each = lambda x, axis=0: jnp.repeat(x, self.samples, axis)  # of one prompt side by side, on one device
        nothing_BM = jnp.zeros((len(request.tokens) * self.samples, self.room), jnp.float32)
        state = State(
            step=jnp.int32(0),
            cache=self._room_for_the_answer(over_rows(each, cache)),
            token=jnp.zeros(len(nothing_BM), jnp.int32),
            done=each(request.lengths == 0),
            seen=jax.tree.map(each, seen),
            tokens=nothing_BM.astype(jnp.int32),
            log_probs=nothing_BM,
            sampling_log_probs=nothing_BM,
            lengths=jnp.zeros(len(nothing_BM), jnp.int32),
        )
        return self._sample(state, each(hidden_ND), weights, request)

    def advance(self, weights: dict, request: Request, state: State, until: jax.Array) -> State:
        """Goes on until every row has stopped or has `until` tokens."""

        def unfinished(state):
            return (state.step < until) & ~jnp.all(state.done)

        lengths_B = jnp.repeat(request.lengths, self.samples)

        def step(state):
            positions_B1 = (lengths_B + state.step - 1)[:, None]
            alive_B1 = (~state.done).astype(jnp.int32)[:, None]
            hidden_BD, cache = self.read_token(weights, state.token, positions_B1, alive_B1, state.cache, lengths_B)
            return self._sample(state._replace(cache=cache), hidden_BD, weights, request)

        return jax.lax.while_loop(unfinished, step, state)

    def read_prompts(self, weights: dict, tokens_NT: jax.Array, lengths_N: jax.Array):
        """Reads left-padded prompts.

        Returns:
          The last hidden state of each, hidden_ND; a cache of exactly T slots; what the penalties have seen.
        """
        N, T = tokens_NT.shape
        size, layout = self._piece(T), self.layout
        real_NT = jnp.arange(T)[None, :] >= T - lengths_N[:, None]
        positions_NT = jnp.maximum(jnp.arange(T)[None, :] - (T - lengths_N[:, None]), 0)

        def read(i, state):
            cut = lambda x_NT: jax.lax.dynamic_slice_in_dim(x_NT, i * size, size, axis=1)
            read_NT = constrain(cut(tokens_NT), ("batch", "length"), layout)
            marks = cut(positions_NT), cut(real_NT.astype(jnp.int32))
            hidden_NTD, cache = self._read(weights, read_NT, *marks, state[1], lengths_N, layout)
            return hidden_NTD[:, -1], cache

        # A cache of exactly the prompts' size, so that no query meets a slot that is sure to be empty.
        state = jnp.zeros((N, self.config.hidden_size), jnp.dtype(self.config.dtype)), self.empty_cache(N, T)
        state = read(0, state) if size == T else jax.lax.fori_loop(0, T // size, read, state)
        return *state, Seen.of_prompts(self.plan, tokens_NT, real_NT, self.config.vocab_size)

    def read_token(self, weights: dict, token_B, positions_B1, alive_B1, cache: KVCache, lengths_B):
        """Reads one token a row, those of alive rows only. Returns hidden_BD and the cache."""
        layout = Layout(self.layout.mesh, dataclasses.replace(self.layout.rules, length=()))  # one cannot be split
        hidden_B1D, cache = self._read(weights, token_B[:, None], positions_B1, alive_B1, cache, lengths_B, layout)
        return hidden_B1D[:, 0], cache

    def draw(self, weights: dict, request: Request, hidden_BD: jax.Array, seen: Seen, rows_B, counts_B):
        """Chooses the next token of each row.

        Args:
          hidden_BD: what the model says.
          rows_B: [B] int32 numbers of the answers, which with `request.key` decide the draw.
          counts_B: [B] int32 tokens that each answer has so far.

        Returns:
          token_B, its log-probability under the policy and in the distribution that was drawn from, and whether it is
          a stop id.
        """
        logits_BV = jnp.einsum("BD,DV->BV", hidden_BD, weights["head"], preferred_element_type=jnp.float32)
        # The vocabulary is gathered here: a row of logits is small, and every filter needs all of it.
        logits_BV = constrain(logits_BV, ("batch", None), self.layout)
        fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, 0))
        keys_B = fold_in(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(request.key, rows_B), counts_B)
        token_B, sampling_log_prob_B = choose(logits_BV, seen, keys_B, self.plan, request.knobs)
        log_prob_B = sampling.log_probs_of(logits_BV, token_B)
        stopped_B = jnp.any(token_B[:, None] == request.stop_ids[None, :], axis=1)
        return token_B, log_prob_B, sampling_log_prob_B, stopped_B

    def _piece(self, T: int) -> int:
        """T halved until it is at most `piece`; as far as that leaves even parts for the mesh."""
        size, parts = T, self.layout.size("length")
        while size > self.piece and size % (2 * parts) == 0:
            size //= 2
        return size

    def _read(self, weights, tokens_BT, positions_BT, segment_ids_BT, cache, lengths_B, layout):
        decoder = Decoder(self.config, layout, fused=True)
        lengths_BT = jnp.broadcast_to(lengths_B[:, None], tokens_BT.shape)
        read = decoder.apply({"params": weights["decoder"]}, tokens_BT, positions_BT, segment_ids_BT, cache, lengths_BT)
        return read[:2]

    def _sample(self, state: State, hidden_BD: jax.Array, weights: dict, request: Request) -> State:
        rows_B = request.first_row + jnp.arange(len(hidden_BD))
        counts_B = jnp.full_like(rows_B, state.step)
        token_B, log_prob_B, sampling_log_prob_B, stopped_B = self.draw(
            weights, request, hidden_BD, state.seen, rows_B, counts_B
        )
        put = lambda into_BM, new_B: jax.lax.dynamic_update_slice_in_dim(
            into_BM, jnp.where(state.done, 0, new_B).astype(into_BM.dtype)[:, None], state.step, axis=1
        )
        full_B = state.step + 1 >= jnp.repeat(request.limits, self.samples)
        return State(
            step=state.step + 1,
            cache=state.cache,
            token=token_B,
            done=state.done | stopped_B | full_B,
            seen=state.seen.add(token_B),
            tokens=put(state.tokens, token_B),
            log_probs=put(state.log_probs, log_prob_B),
            sampling_log_probs=put(state.sampling_log_probs, sampling_log_prob_B),
            lengths=state.lengths + ~state.done,
        )

    def empty_cache(self, B: int, S: int) -> KVCache:
        """Returns one without a token."""
        c = self.config
        shape_BKSH = (B, c.num_key_value_heads, S, c.head_dim)
        axes = ("batch", "kv_heads", None, "head_dim")
        slots_BKSH = constrain(jnp.zeros(shape_BKSH, jnp.dtype(c.dtype)), axes, self.layout)
        L = c.num_hidden_layers
        kv = jnp.broadcast_to(slots_BKSH[None], (L, *shape_BKSH)) if c.scan_layers else (slots_BKSH,) * L
        empty_BS = jnp.zeros((B, S), jnp.int32)
        return KVCache(kv, kv, empty_BS, empty_BS, jnp.int32(0))

    def _room_for_the_answer(self, cache: KVCache) -> KVCache:
        more = lambda x, axis: jnp.pad(x, [(0, self.room if i == axis % x.ndim else 0) for i in range(x.ndim)])
        k, v = jax.tree.map(lambda x: more(x, -2), (cache.k, cache.v))
        return KVCache(k, v, more(cache.positions, 1), more(cache.segment_ids, 1), cache.index)


def over_rows(change, *trees):
    """Applies `change(*arrays, axis of rows)` to all arrays of like trees of caches and `Seen`; one number stays."""
    return jax.tree.map(lambda x, *more: x if x.ndim == 0 else change(x, *more, max(x.ndim - 4, 0)), *trees)
