"""A dense model becomes one with experts, whose neurons are copies of the dense MLP's (Qwen2 report, section 2.2.2).

A neuron is a column of gate, the same column of up and the same row of down; it is copied as one. The dense MLP's F
neurons are written down as often as the experts need, each copy in an order of its own; the list is cut into E experts
of I neurons, across the borders of copies, and what is left over is discarded. Then a part of each expert's neurons is
drawn anew. Sparse upcycling as first published (Komatsuzaki et al., arXiv:2212.05055) is the case I = F, shuffle=False,
reinitialize=0: every expert is the dense MLP. If the gates of a token sum to 1 and there is no shared expert, the model
then computes what the dense one does.

The report does not say of what the re-drawn half consists, nor how routers begin. Here it is whole neurons, so that the
others stay what they were; routers and the shared expert's gate are drawn like all new parameters.

Shapes: L layers with experts, E experts, I expert width, S shared expert width, D model width, F dense MLP width.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax import sharding
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.models.functional import abstract, axes
from qwen_jax.models.stacks import stacks
from qwen_jax.sharding import Layout

SAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "qkv_bias", "qk_norm",
    "tie_word_embeddings",
)  # fmt: skip
NEW = -1  # the origin of a neuron that was drawn anew


def upcycle(
    dense_config: QwenConfig,
    dense_params: dict,
    moe_config: QwenConfig,
    key: jax.Array,
    *,
    shuffle: bool = True,
    reinitialize: float = 0.5,
    mesh: jax.sharding.Mesh | None = None,
) -> dict:
    """Returns the parameters of a model with experts, made of a dense one's.

    Attention, norms, embedding and head, and the MLPs of layers without experts, are the dense model's.

    Args:
      dense_config, dense_params: the model to start from.
      moe_config: the model to make; of the same shape but for its experts. Its vocabulary may have fewer rows.
      key: of the shuffling, the choice of new neurons and their values.
      shuffle: whether each copy of the dense neurons is in an order of its own.
      reinitialize: share of each expert's neurons that is drawn anew, normal(initializer_range).
      mesh: where the parameters go; the default device if None.

    Raises:
      InputError: where the models do not fit; the message names the field.
    """
    _check(dense_config, moe_config, reinitialize)
    where = None
    if mesh is not None:
        where = sharding.tree_shardings(axes(moe_config), abstract(moe_config), Layout(mesh))
    make = jax.jit(_make, static_argnames=("dense", "moe", "shuffle", "reinitialize"), out_shardings=where)
    return make(dense_params, key, dense=dense_config, moe=moe_config, shuffle=shuffle, reinitialize=reinitialize)


def origins(
    dense_config: QwenConfig, moe_config: QwenConfig, key: jax.Array, *, shuffle: bool = True, reinitialize: float = 0.5
) -> jax.Array:
    """Returns which dense neuron each neuron of `upcycle` with these arguments is a copy of.

    Returns:
      [layers with experts, E, I] int32, NEW for those that were drawn anew.
    """
    E, width = moe_config.num_experts, moe_config.moe_intermediate_size
    layers = [layer for layer in range(moe_config.num_hidden_layers) if moe_config.is_sparse(layer)]

    def of_layer(layer):
        key_order, key_new, _ = _keys(key, layer)
        origin_EI = _copies(key_order, dense_config.intermediate_size, E * width, shuffle).reshape(E, width)
        rank_EI = jax.random.uniform(key_new, (E, width)).argsort(axis=-1).argsort(axis=-1)
        return jnp.where(rank_EI < round(reinitialize * width), NEW, origin_EI)

    return jax.vmap(of_layer)(jnp.asarray(layers))


def _keys(key: jax.Array, layer):
    return jax.random.split(jax.random.fold_in(key, layer), 3)


def _copies(key: jax.Array, size: int, count: int, shuffle: bool) -> jax.Array:
    """Returns `count` numbers: 0 … size - 1 again and again, each time in another order if shuffled."""
    copies = -(-count // size)
    order = lambda key: jax.random.permutation(key, size) if shuffle else jnp.arange(size)
    return jax.vmap(order)(jax.random.split(key, copies)).reshape(-1)[:count]


def _make(params, key, *, dense: QwenConfig, moe: QwenConfig, shuffle: bool, reinitialize: float) -> dict:
    origin_LEI = origins(dense, moe, key, shuffle=shuffle, reinitialize=reinitialize)
    sparse = [layer for layer in range(moe.num_hidden_layers) if moe.is_sparse(layer)]
    made = {name: params[name][: moe.vocab_size] for name in ("embedding", "head") if name in params}
    made["final_norm"] = params["final_norm"]
    for stack in stacks(moe):
        for place, path in enumerate(stack.blocks()):
            layers = jnp.asarray(stack.layers(place))
            block = jax.tree.map(lambda x, layers=layers: x[layers], params["layers"])
            if stack.sparse[place]:
                mlp = block.pop("mlp")
                origins_LEI = origin_LEI[jnp.asarray([sparse.index(layer) for layer in stack.layers(place)])]
                of_layer = functools.partial(_experts, dense=dense, moe=moe, shuffle=shuffle)
                block["moe"] = jax.vmap(of_layer)(mlp, origins_LEI, jax.vmap(lambda i: _keys(key, i)[2])(layers))
            functools.reduce(lambda node, name: node.setdefault(name, {}), path, made).update(block)
    return jax.tree.map(lambda x: x.astype(jnp.dtype(moe.param_dtype)), made)


def _experts(mlp: dict, origin_EI, key, *, dense: QwenConfig, moe: QwenConfig, shuffle: bool) -> dict:
    """The parameters of `models.mlp.MoE` in one layer."""
    keys = iter(jax.random.split(key, 6))
    D, E = moe.hidden_size, moe.num_experts
    normal = lambda *shape: moe.initializer_range * jax.random.normal(next(keys), shape)
    gate_DF, up_DF, down_FD = (mlp[name]["kernel"] for name in ("gate", "up", "down"))
    kept_EI = origin_EI != NEW
    of_columns = lambda w_DF: jnp.moveaxis(w_DF[:, origin_EI], 0, 1)
    gate_EDI, up_EDI, down_EID = of_columns(gate_DF), of_columns(up_DF), down_FD[origin_EI]
    made = {
        "gate": jnp.where(kept_EI[:, None, :], gate_EDI, normal(*gate_EDI.shape)),
        "up": jnp.where(kept_EI[:, None, :], up_EDI, normal(*up_EDI.shape)),
        "down": jnp.where(kept_EI[:, :, None], down_EID, normal(*down_EID.shape)),
        "router": normal(D, E),
    }
    if moe.shared_expert_intermediate_size:
        order_S = _copies(next(keys), dense.intermediate_size, moe.shared_expert_intermediate_size, shuffle)
        shared = {"gate": gate_DF[:, order_S], "up": up_DF[:, order_S], "down": down_FD[order_S]}
        made["shared"] = {name: {"kernel": kernel} for name, kernel in shared.items()}
        made["shared_gate"] = {"kernel": normal(D, 1)}
    return made


def _check(dense: QwenConfig, moe: QwenConfig, reinitialize: float) -> None:
    if dense.num_experts or not moe.num_experts:
        raise InputError(
            f"upcycling goes from num_experts {dense.num_experts} to {moe.num_experts}; expected from 0 to some"
        )
    sparse = [moe.is_sparse(layer) for layer in range(moe.num_hidden_layers)]
    for name in (*SAME, *(() if all(sparse) else ("intermediate_size",))):
        if getattr(dense, name) != getattr(moe, name):
            raise InputError(
                f"upcycling: {name} is {getattr(dense, name)} in the dense model and {getattr(moe, name)} in the one "
                "with experts; expected the same"
            )
    if moe.vocab_size > dense.vocab_size:
        raise InputError(f"upcycling: vocab_size {moe.vocab_size} is more than the dense model's {dense.vocab_size}")
    width, count, F = moe.moe_intermediate_size, moe.num_experts, dense.intermediate_size
    if not width <= F <= count * width:
        raise InputError(
            f"upcycling: {count} experts of moe_intermediate_size {width} do not fit the dense intermediate_size {F}; "
            f"expected a width of {-(-F // count)} to {F}, so that no expert holds a neuron twice and none is lost"
        )
    if not 0 <= reinitialize <= 1:
        raise InputError(f"upcycling: reinitialize is {reinitialize}; expected a share between 0 and 1")
