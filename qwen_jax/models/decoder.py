"""The Qwen decoder: pre-norm blocks of grouped-query attention and a gated MLP, stacked and scanned.

Shapes: B batch, T length, S cache slots, L layers, D model width, N query heads, K kv heads, G = N/K query heads per kv
head, H head dim, F MLP width, V vocabulary; J things computed by one fused product.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import checkpoint_policies as policies

from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.models.attend import attend
from qwen_jax.models.layers import Linear, RMSNorm, declare
from qwen_jax.models.mlp import MLP, MoE
from qwen_jax.models.stacks import Stack, stacks
from qwen_jax.ops import segments
from qwen_jax.ops.attention import RESIDUALS
from qwen_jax.ops.dropout import Dropout, drop
from qwen_jax.ops.rope_scaling import Rotation, rotation
from qwen_jax.ops.routing import Routing
from qwen_jax.sharding import Layout, constrain

ONE_DEVICE = Layout()
REMAT_POLICIES = {
    "dots": policies.save_from_both_policies(  # keep matrix products and what attention gives, recompute the rest
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(RESIDUALS)
    ),
    "full": policies.nothing_saveable,  # keep a layer's input only
}


class KVCache(NamedTuple):
    """Keys and values of what has been read so far; unwritten slots have segment id 0.

    Attributes:
      k, v: [L, B, K, S, H] in config.dtype, or a tuple of L arrays [B, K, S, H] for a decoder whose layers are apart.
        Slots lie next to head_dim because a decode step's products run over one kv head's slots at a time.
      positions: [B, S] int32 position of the token in each slot.
      segment_ids: [B, S] int32, 0 where the slot is empty or padding.
      index: scalar int32, the slot the next token goes to (the same for all rows).
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    positions: jax.Array
    segment_ids: jax.Array
    index: jax.Array


class Where(NamedTuple):
    """What attention needs to know of queries and keys; shared by all layers."""

    rotation: Rotation
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    kv_positions_BS: jax.Array
    kv_segment_ids_BS: jax.Array
    index: jax.Array | None  # the cache slot to write to; None without a cache


class Attention(nn.Module):
    """Grouped-query attention with RoPE; bias on q, k, v (Qwen2) and QK-norm (Qwen3) as the config says."""

    config: QwenConfig
    layout: Layout
    fused: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, where: Where, cache: tuple[jax.Array, jax.Array] | None, dropout=None):
        c, layout = self.config, self.layout
        D, N, H = c.hidden_size, c.num_attention_heads, c.head_dim
        q_BTNH, k_BTKH, v_BTKH = self._fused_qkv(x_BTD) if self.fused else self._qkv(x_BTD, dropout)
        if c.qk_norm:
            q_BTNH = RMSNorm(H, c, name="q_norm")(q_BTNH)
            k_BTKH = RMSNorm(H, c, name="k_norm")(k_BTKH)
        q_axes = (*(None,) * c.dual_chunk.on, "batch", "length", "heads", "head_dim")
        q_BTNH = constrain(where.rotation.queries(q_BTNH), q_axes, layout)
        kv_axes = ("batch", "length" if cache is None else None, "kv_heads", "head_dim")
        k_BSKH = constrain(where.rotation.keys(k_BTKH), kv_axes, layout)
        v_BSKH = constrain(v_BTKH, kv_axes, layout)
        if cache is not None:
            cache = tuple(
                _write(slots_BKSH, jnp.swapaxes(new_BTKH, 1, 2), where.index, axis=2)
                for slots_BKSH, new_BTKH in zip(cache, (k_BSKH, v_BSKH), strict=True)
            )
            k_BSKH, v_BSKH = (jnp.swapaxes(slots_BKSH, 1, 2) for slots_BKSH in cache)
        marks = (where.positions_BT, where.kv_positions_BS, where.segment_ids_BT, where.kv_segment_ids_BS)
        out_BTNH = attend(
            q_BTNH, k_BSKH, v_BSKH, marks,
            backend=c.attention, layout=layout, stride=c.dual_chunk.stride, cached=cache is not None,
        )  # fmt: skip
        out_BTNH = constrain(out_BTNH, ("batch", "length", "heads", "head_dim"), layout)
        out = Linear("BTNH,NHD->BTD", (N, H, D), ("heads", "head_dim", "embed"), c, layout, name="o")
        return out(out_BTNH, dropout), cache

    def _qkv(self, x_BTD, dropout):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        bias = 2 if c.qkv_bias else 0
        q = Linear("BTD,DNH->BTNH", (D, N, H), ("embed", "heads", "head_dim"), c, self.layout, bias, name="q")
        k = Linear("BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"), c, self.layout, bias, name="k")
        v = Linear("BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"), c, self.layout, bias, name="v")
        return q(x_BTD, dropout), k(x_BTD, dropout), v(x_BTD, dropout)

    def _fused_qkv(self, x_BTD):
        """One product: each kv head with the G query heads it serves, so that splitting heads splits all three."""
        c = self.config
        D, K, H = c.hidden_size, c.num_key_value_heads, c.head_dim
        G, bias = c.num_attention_heads // K, 3 if c.qkv_bias else 0
        axes = ("embed", "kv_heads", None, "head_dim")
        qkv_BTKJH = Linear("BTD,DKJH->BTKJH", (D, K, G + 2, H), axes, c, self.layout, bias, name="qkv")(x_BTD)
        q_BTNH = qkv_BTKJH[..., :G, :].reshape(*x_BTD.shape[:2], K * G, H)
        return q_BTNH, qkv_BTKJH[..., G, :], qkv_BTKJH[..., G + 1, :]


class Block(nn.Module):
    """One layer: h += attention(norm(h)); h += mlp(norm(h)), or experts in the place of the mlp.

    Dropout falls on what is added, as GPT-2's residual one does.
    """

    config: QwenConfig
    layout: Layout
    sparse: bool
    fused: bool = False

    @nn.compact
    def __call__(self, h_BTD: jax.Array, cache, dropout: Dropout | None, where: Where):
        c, axes = self.config, ("batch", "length", "act_embed")
        normed_BTD = RMSNorm(c.hidden_size, c, name="attention_norm")(h_BTD)
        out_BTD, cache = Attention(c, self.layout, self.fused, name="attention")(normed_BTD, where, cache, dropout)
        h_BTD = constrain(h_BTD + drop(out_BTD, dropout, "attention"), axes, self.layout)
        normed_BTD, routing = RMSNorm(c.hidden_size, c, name="mlp_norm")(h_BTD), None
        if self.sparse:
            out_BTD, routing = MoE(c, self.layout, self.fused, name="moe")(normed_BTD, where.segment_ids_BT, dropout)
        else:
            out_BTD = MLP(c, self.layout, self.fused, c.intermediate_size, name="mlp")(normed_BTD, dropout)
        return constrain(h_BTD + drop(out_BTD, dropout, "mlp"), axes, self.layout), (cache, routing)


class Pattern(nn.Module):
    """Layers of different kinds that follow each other, as one step of a scan; arrays of each are stacked."""

    config: QwenConfig
    layout: Layout
    sparse: tuple[bool, ...]
    fused: bool

    @nn.compact
    def __call__(self, h_BTD: jax.Array, cache, dropout: Dropout | None, where: Where):
        made = []
        for place, sparse in enumerate(self.sparse):
            own = jax.tree.map(lambda x, place=place: x[place], (cache, dropout))
            block = _block(self.config)(self.config, self.layout, sparse, self.fused, name=f"block_{place}")
            h_BTD, of_layer = block(h_BTD, *own, where)
            made.append(of_layer)
        return h_BTD, tuple(_over_layers(jnp.stack, each) for each in zip(*made, strict=True))


class Decoder(nn.Module):
    """Tokens in, final hidden states out.

    The logits of a whole vocabulary are never formed here: training takes `ops.cross_entropy.token_log_probs` of the
    hidden states and the head, sampling takes the logits of the last position only.

    Attributes:
      config: the model.
      layout: mesh and rules.
      fused: the parameters are those of `models.fuse`: fewer, larger products, and with config.scan_layers False also
        one tree a layer, so that no step slices them out of a stack. For decoding; training keeps them apart.
    """

    config: QwenConfig
    layout: Layout = ONE_DEVICE
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KVCache | None = None,
        prompt_lengths_BT: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, KVCache | None, Routing | None]:
        """Runs the stack.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 position of each token in its document.
          segment_ids_BT: int32 document of each token, 0 for padding.
          cache: what came before; the T new tokens are written behind it.
          prompt_lengths_BT: int32 length of the prompt of each token's document (see `ops.rope_scaling`); None takes
            every document as whole in this call.
          dropout: of the embeddings, of what each layer adds, and of the adapters' inputs; None drops nothing.

        Returns:
          hidden_BTD after the final norm, in config.dtype; the cache with the new tokens (None without one); what the
          routers did, arrays [layers with experts, B, ...] (None if there are none).

        Raises:
          InputError: where the cache has no room for the tokens.
        """
        _check_room(tokens_BT, cache)
        c, init = self.config, nn.initializers.normal(self.config.initializer_range)
        shape_VD = (c.vocab_size, c.hidden_size)
        embedding_VD = declare(self, "embedding", init, shape_VD, ("vocab_in", "embed"), c)
        if c.head == "score":  # a head's product is the caller's: see `head` and `score_head`
            declare(self, "score", init, (1, c.hidden_size), (None, "embed"), c)
        elif not c.tie_word_embeddings and not self.fused:
            declare(self, "head", init, shape_VD, ("vocab", "embed"), c)

        if prompt_lengths_BT is None:
            prompt_lengths_BT = segments.lengths(positions_BT, segment_ids_BT)
        rotations = rotation(
            positions_BT, prompt_lengths_BT,
            head_dim=c.head_dim, theta=c.rope_theta, yarn=c.yarn, chunks=c.dual_chunk, v1=c.v1_lengths,
        )  # fmt: skip
        where = Where(rotations, positions_BT, segment_ids_BT, positions_BT, segment_ids_BT, None)
        if cache is not None:
            where = where._replace(
                kv_positions_BS=_write(cache.positions, positions_BT, cache.index),
                kv_segment_ids_BS=_write(cache.segment_ids, segment_ids_BT, cache.index),
                index=cache.index,
            )
        # Gathered whole before the look-up, like every other fsdp weight before its use: a look-up in split columns
        # makes the compiler replicate the activations instead.
        table_VD = constrain(embedding_VD.astype(jnp.dtype(c.dtype)), ("vocab_in", "act_embed"), self.layout)
        h_BTD = table_VD[tokens_BT]
        if self.has_variable("params", "rows"):
            h_BTD = _look_up_rows(h_BTD, tokens_BT, c.vocab_size, self.get_variable("params", "rows"))
        h_BTD = constrain(drop(h_BTD, dropout, "embedding"), ("batch", "length", "act_embed"), self.layout)
        layers_cache = None if cache is None else (cache.k, cache.v)
        run = self._layers_apart if self.fused and not c.scan_layers else self._layers_stacked
        of_layers = None if dropout is None else dropout.split(c.num_hidden_layers)
        h_BTD, layers_cache, routing = run(h_BTD, layers_cache, of_layers, where)
        if cache is not None:
            index = cache.index + tokens_BT.shape[1]
            cache = KVCache(*layers_cache, where.kv_positions_BS, where.kv_segment_ids_BS, index)
        return RMSNorm(c.hidden_size, c, name="final_norm")(h_BTD), cache, routing

    def _layers_stacked(self, h_BTD, cache, dropout, where):
        c, made = self.config, []
        for stack in stacks(c):
            own = stack.cut((cache, dropout))
            h_BTD, of_stack = _scanned(c, stack, self.layout, self.fused)(h_BTD, *own, where)
            made.append(stack.joined(of_stack))
        return h_BTD, *(_over_layers(jnp.concatenate, each) for each in zip(*made, strict=True))

    def _layers_apart(self, h_BTD, cache, dropout, where):
        made = []
        for i in range(self.config.num_hidden_layers):
            of_layer = None if cache is None else (cache[0][i], cache[1][i])
            block = Block(self.config, self.layout, self.config.is_sparse(i), True, name=f"layer_{i}")
            h_BTD, of_layer = block(h_BTD, of_layer, jax.tree.map(lambda x, i=i: x[i], dropout), where)
            made.append(of_layer)
        caches, routings = zip(*made, strict=True)
        cache = None if cache is None else tuple(zip(*caches, strict=True))
        return h_BTD, cache, _over_layers(jnp.stack, routings)


def head(config: QwenConfig, params, layout: Layout = ONE_DEVICE) -> jax.Array:
    """Returns the head of the vocabulary, [V, D]: the embedding itself where the two are tied.

    The embedding is stored whole along its rows (see `Rules.vocab_in`); as a head its rows are split like those of a
    head of its own, where the mesh divides them: otherwise every device would compute every logit.

    Raises:
      InputError: where the model is a reward model, which has none.
    """
    if config.head != "vocabulary":
        raise InputError('the model has a score head in the place of the vocabulary\'s (config.head is "score"): it '
                         "gives scores and no log-probabilities")  # fmt: skip
    if not config.tie_word_embeddings:
        return params["head"]
    if config.vocab_size % layout.size("vocab"):
        return params["embedding"]
    return constrain(params["embedding"], ("vocab", "embed"), layout)


def score_head(config: QwenConfig, params) -> jax.Array:
    """Returns the head of a reward model, [1, D].

    Raises:
      InputError: where the model is none.
    """
    if config.head != "score":
        raise InputError('the model has no score head (config.head is "vocabulary"); expected a reward model')
    return params["score"]


def _check_room(tokens_BT: jax.Array, cache: KVCache | None) -> None:
    """A write behind the last slot would silently overwrite the last ones."""
    if cache is None:
        return
    slots, new = cache.positions.shape[1], tokens_BT.shape[1]
    written = 0 if isinstance(cache.index, jax.core.Tracer) else int(cache.index)  # traced: known at run time only
    if written + new > slots:
        raise InputError(f"the cache has {slots} slots, {written} of them written; no room for {new} more tokens")


def head_rows(config: QwenConfig, params) -> tuple[jax.Array, jax.Array] | None:
    """Returns the ids [n] and the rows [n, D] of the head that are trained apart (`ops.lora`); None where none are."""
    rows, name = params.get("rows", {}), "embedding" if config.tie_word_embeddings else "head"
    return (rows["ids"], rows[name]) if name in rows else None


def _look_up_rows(h_BTD: jax.Array, tokens_BT: jax.Array, vocab_size: int, rows: dict) -> jax.Array:
    """Puts the rows that are trained apart in the place of the table's: the table has no gradient of theirs."""
    count = rows["ids"].shape[0]
    place_V = jnp.full((vocab_size,), count).at[rows["ids"]].set(jnp.arange(count))
    place_BT = place_V[tokens_BT]
    own_BTD = rows["embedding"].astype(h_BTD.dtype)[jnp.minimum(place_BT, count - 1)]
    return jnp.where((place_BT < count)[..., None], own_BTD, h_BTD)


def _write(slots: jax.Array, new: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(slots, new, index, axis)


def _over_layers(join, trees):
    """Joins arrays of layers, passing over those that have none (layers without experts); None where all have none."""
    trees = [tree for tree in trees if tree is not None]
    return jax.tree.map(lambda *x: join(x), *trees) if trees else None


def _block(config: QwenConfig):
    if config.remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)


def _scanned(config: QwenConfig, stack: Stack, layout: Layout, fused: bool):
    """The layers of a stack as one module: parameters and cache carry a leading axis, the repeats of its pattern."""
    alone = len(stack.sparse) == 1
    scanned = nn.scan(
        _block(config) if alone else Pattern,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=stack.repeats,
        unroll=1 if config.scan_layers else stack.repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, layout, stack.sparse[0] if alone else stack.sparse, fused, name=stack.name)
