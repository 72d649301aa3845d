"""The functional face of the models: config and parameters in, arrays out.

`params` is a plain nested dict, joined with LoRA adapters (`models.lora.join`) or not. Every function is pure and
compiled once per config and shape; `layout` says how the arrays are split over a mesh, and without one everything is on
one device.

Shapes: B batch, T length, D model width, V vocabulary rows.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax import sharding
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.models.decoder import ONE_DEVICE, Decoder, head, head_rows, score_head
from qwen_jax.ops import segments
from qwen_jax.ops.cross_entropy import token_log_probs
from qwen_jax.ops.dropout import Dropout
from qwen_jax.ops.routing import Routing
from qwen_jax.sharding import Layout

_compiled = functools.partial(jax.jit, static_argnames=("config", "layout"))


def init(config: QwenConfig, key: jax.Array, *, mesh: jax.sharding.Mesh | None = None) -> dict:
    """Returns fresh parameters: normal(initializer_range), biases 0, norms 1.

    With a mesh each device makes only its own part; the values do not depend on the mesh.
    """
    shardings = None
    if mesh is not None:
        shardings = sharding.tree_shardings(axes(config), abstract(config), Layout(mesh))
    return jax.jit(_unboxed, static_argnums=0, out_shardings=shardings)(config, key)


def with_score_head(config: QwenConfig, params: dict, key: jax.Array) -> dict:
    """Returns the parameters of a language model as those of a reward model that begins with it.

    The head of the vocabulary goes; the score's is drawn as `init` does.

    Args:
      config: of the reward model.
      params: of the language model; none is copied.
      key: of the new head.
    """
    kept = {name: leaf for name, leaf in params.items() if name != "head"}
    drawn = jax.random.normal(key, (1, config.hidden_size), jnp.float32) * config.initializer_range
    return kept | {"score": drawn.astype(config.param_dtype)}


def abstract(config: QwenConfig) -> dict:
    """Returns the tree of parameter shapes and dtypes, computing nothing."""
    return jax.eval_shape(lambda: _unboxed(config, jax.random.key(0)))


def axes(config: QwenConfig) -> dict:
    """Returns the tree of logical axis names, one tuple for each parameter."""
    boxed = jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def placed(config: QwenConfig, layout: Layout) -> dict:
    """Returns the parameters as structs that say where each lies: what `training.pretrained.load_params` reads to."""
    shapes = abstract(config)
    where = sharding.tree_shardings(axes(config), shapes, layout)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where)


def _unboxed(config: QwenConfig, key: jax.Array) -> dict:
    return nn.unbox(_boxed(config, key))


def _boxed(config: QwenConfig, key: jax.Array):
    token_11 = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, token_11, token_11, token_11)["params"]


def hidden_states(
    config: QwenConfig,
    params: dict,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    prompt_lengths_BT: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Returns final hidden states [B, T, D] in config.dtype; arguments as in `log_probs`."""
    return _run(config, params, tokens_BT, positions_BT, segment_ids_BT, prompt_lengths_BT, dropout, layout=layout)[0]


@_compiled
def _run(
    config, params, tokens_BT, positions_BT, segment_ids_BT, prompt_lengths_BT, dropout, *, layout
) -> tuple[jax.Array, Routing | None]:
    """Returns final hidden states, and what the routers did: arrays [layers with experts, B, ...]."""
    limit = config.max_position_embeddings
    if positions_BT is None and segment_ids_BT is None and tokens_BT.shape[1] > limit:
        raise InputError(
            f"tokens are rows of {tokens_BT.shape[1]}; the model reads at most {limit} (max_position_embeddings)"
        )
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = segments.positions(segment_ids_BT)
    hidden_BTD, _, routing = Decoder(config, layout).apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, None, prompt_lengths_BT, dropout
    )
    return hidden_BTD, routing


@_compiled
def forward(
    config: QwenConfig,
    params: dict,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Returns the logits of every position. For training use `log_probs`, which never holds them all.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B, T] int32.
      positions: [B, T] int32; each token's place in its segment if None.
      segment_ids: [B, T] int32, documents that share a row and do not see each other, 0 for padding (left or right);
        one document a row if None.
      prompt_lengths: [B, T] int32, of each token's document how many tokens were read at once before the answer was
        sampled; all of them if None. Beyond the length of training, Qwen v1's dynamic NTK and the temperature of
        Qwen2.5-1M depend on it: give it to score what such a model has sampled.
      layout: mesh and rules.

    Returns:
      [B, T, V] float32, padding rows of the vocabulary included.

    Raises:
      InputError: where a row is one document longer than the model reads.
    """
    hidden_BTD = hidden_states(
        config, params, tokens,
        positions_BT=positions, segment_ids_BT=segment_ids, prompt_lengths_BT=prompt_lengths, layout=layout,
    )  # fmt: skip
    return logits(config, params, hidden_BTD, layout=layout)


def logits(config: QwenConfig, params: dict, hidden_BTD: jax.Array, *, layout: Layout = ONE_DEVICE) -> jax.Array:
    """Returns the logits [B, T, V] float32 of final hidden states, which `hidden_states` returns."""
    head_VD = head(config, params, layout).astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
    if rows := head_rows(config, params):
        ids_n, rows_nD = rows
        own_BTn = jnp.einsum(
            "BTD,nD->BTn", hidden_BTD, rows_nD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
        )
        logits_BTV = logits_BTV.at[:, :, ids_n].set(own_BTn)
    return logits_BTV


def log_probs(
    config: QwenConfig,
    params: dict,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Returns log p(targets[b, t] | tokens[b, :t+1]) as [B, T] float32, chunked over the vocabulary.

    Args as in `forward`, and:
      targets: [B, T] int32, each a valid id.
      dropout: what to drop, and the key; None drops nothing.
    """
    return log_probs_and_routing(
        config, params, tokens, targets,
        positions=positions, segment_ids=segment_ids, prompt_lengths=prompt_lengths, layout=layout, dropout=dropout,
    )[0]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def log_probs_and_routing(
    config: QwenConfig,
    params: dict,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, Routing | None]:
    """Returns what `log_probs` does, and what the routers did, for `objectives.balance`.

    Args as in `log_probs`.

    Returns:
      log_probs_BT; `ops.routing.Routing` with arrays [layers with experts, B, ...], None of a dense model.
    """
    hidden_BTD, routing = _run(config, params, tokens, positions, segment_ids, prompt_lengths, dropout, layout=layout)
    joined = layout.one_cpu  # there products are dear and memory is not: with "dots" the logits are kept, too
    found_BT = token_log_probs(
        hidden_BTD, head(config, params, layout), targets, chunks=config.vocabulary_chunks, parts=layout.size("vocab"),
        joined=joined, keep=joined and config.remat == "dots", rows=head_rows(config, params),
    )  # fmt: skip
    return found_BT, routing


@_compiled
def sequence_log_probs(
    config: QwenConfig,
    params: dict,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Returns log p(tokens[b, t+1] | tokens[b, :t+1]) as [B, T-1] float32; arguments as in `forward`.

    Entries whose two tokens are of different segments, or are padding, mean nothing: mask them.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    every = log_probs(
        config, params, tokens, targets,
        positions=positions, segment_ids=segment_ids, prompt_lengths=prompt_lengths, layout=layout,
    )  # fmt: skip  # all T, so that a length split over the mesh stays even
    return every[:, :-1]


@_compiled
def scores(
    config: QwenConfig,
    params: dict,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Returns what a reward model thinks of the text up to each token, [B, T] float32; arguments as in `forward`.

    The score of an answer is the one at its last token, `<|im_end|>` (Qwen report, arXiv:2309.16609, section 3.2.1).
    It depends on nothing but the tokens of its document: not on padding, on other documents of its row, or on other
    rows. The head's product is in float32 whatever config.dtype is: small differences decide.

    Raises:
      InputError: where the model has no score head; also as `forward`.
    """
    head_1D = score_head(config, params)
    hidden_BTD = hidden_states(
        config, params, tokens, positions_BT=positions, segment_ids_BT=segment_ids, prompt_lengths_BT=prompt_lengths,
        layout=layout, dropout=dropout,
    )  # fmt: skip
    f32 = lambda x: x.astype(jnp.float32)
    return jnp.einsum("BTD,JD->BTJ", f32(hidden_BTD), f32(head_1D))[..., 0]
