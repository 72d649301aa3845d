"""What follows attention in a layer: a gated MLP, or a router and its experts.

Shapes: B batch, T length, D model width, F MLP width, J things computed by one fused product, E experts, K experts per
token; R = B * T of one device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import QwenConfig
from qwen_jax.models.layers import Linear, declare
from qwen_jax.ops.dropout import Dropout
from qwen_jax.ops.exchange import exchanged_experts
from qwen_jax.ops.experts import Weights, experts
from qwen_jax.ops.routing import Routing, route
from qwen_jax.sharding import AXES, Layout, constrain

GATE, DOWN = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")  # logical axes of the experts' kernels


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202), `width` wide."""

    config: QwenConfig
    layout: Layout
    fused: bool
    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        c, D, F = self.config, self.config.hidden_size, self.width
        if self.fused:
            both_BTJF = Linear("BTD,DJF->BTJF", (D, 2, F), ("embed", None, "mlp"), c, self.layout, name="gate_up")(
                x_BTD
            )
            gate_BTF, up_BTF = both_BTJF[:, :, 0], both_BTJF[:, :, 1]
        else:
            gate_BTF = Linear("BTD,DF->BTF", (D, F), ("embed", "mlp"), c, self.layout, name="gate")(x_BTD, dropout)
            up_BTF = Linear("BTD,DF->BTF", (D, F), ("embed", "mlp"), c, self.layout, name="up")(x_BTD, dropout)
        h_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, ("batch", "length", "mlp"), self.layout)
        return Linear("BTF,FD->BTD", (F, D), ("mlp", "embed"), c, self.layout, name="down")(h_BTF, dropout)


class MoE(nn.Module):
    """Routed experts, and with them the shared expert that Qwen2-MoE has (qwen2_moe and qwen3_moe of transformers).

    out = sum_k gate_k expert_k(x)  [+ sigmoid(x . shared_gate) shared(x)]
    """

    config: QwenConfig
    layout: Layout
    fused: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, dropout: Dropout | None = None
    ) -> tuple[jax.Array, Routing]:
        c, D, E, F = self.config, self.config.hidden_size, self.config.num_experts, self.config.moe_intermediate_size
        kernel = lambda name, shape, axes: declare(
            self, name, nn.initializers.normal(c.initializer_range), shape, axes, c
        ).astype(jnp.dtype(c.dtype))
        router_DE = kernel("router", (D, E), ("embed", None))
        shapes = (("gate", (E, D, F), GATE), ("up", (E, D, F), GATE), ("down", (E, F, D), DOWN))
        weights = Weights(*(kernel(*shape) for shape in shapes))
        out_BTD, routing = _routed(x_BTD, segment_ids_BT, router_DE, weights, c, self.layout)
        if c.shared_expert_intermediate_size:
            width = c.shared_expert_intermediate_size
            shared_BTD = MLP(c, self.layout, self.fused, width, name="shared")(x_BTD, dropout)
            gate_BT1 = Linear("BTD,DJ->BTJ", (D, 1), ("embed", None), c, self.layout, name="shared_gate")(x_BTD)
            out_BTD += jax.nn.sigmoid(gate_BT1) * shared_BTD
        return out_BTD, routing


def _routed(x_BTD, segment_ids_BT, router_DE, weights: Weights, config: QwenConfig, layout: Layout):
    """Routes each device's own tokens by hand-written `shard_map`: sorting is nothing the compiler can split."""
    local = functools.partial(_local, config=config, layout=layout)
    if layout.mesh is None:
        return local(x_BTD, segment_ids_BT, router_DE, *weights)
    spec = layout.rules.spec
    rows, row = spec(("batch", "length", None)), spec(("batch",))
    for name, w, axes in zip(Weights._fields, weights, (GATE, GATE, DOWN), strict=True):
        layout.sharding(axes, w.shape, what=f"experts' {name}")  # refuses what the mesh does not divide
    split = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(rows, spec(("batch", "length")), spec((None, None)), spec(GATE), spec(GATE), spec(DOWN)),
        out_specs=(rows, Routing(row, row, row, row)),
        check_vma=False,  # as `ops.experts` asks
    )
    return split(x_BTD, segment_ids_BT, router_DE, *weights)


def _local(x_BTD, segment_ids_BT, router_DE, *weights, config: QwenConfig, layout: Layout):
    """One device's tokens through the router and the experts, wherever these are."""
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, router_DE, preferred_element_type=jnp.float32)
    gates_BTK, experts_BTK, routing = route(
        logits_BTE, segment_ids_BT != 0, experts_per_token=config.num_experts_per_tok, normalize=config.norm_topk_prob
    )
    flat = lambda x: x.reshape(-1, x.shape[-1])
    arguments = flat(x_BTD), flat(gates_BTK), flat(experts_BTK)
    if layout.mesh is None:
        return experts(*arguments, Weights(*weights)).reshape(x_BTD.shape), routing
    rules = layout.rules
    # The width is gathered here, not on the way in: the transpose of this is a reduce-scatter of the gradient.
    gather = lambda w, axis: jax.lax.all_gather(w, rules.embed, axis=axis, tiled=True) if rules.embed else w
    weights = Weights(*(gather(w, axes.index("embed")) for w, axes in zip(weights, (GATE, GATE, DOWN), strict=True)))
    if layout.size("experts") == 1:
        out_RD = experts(*arguments, weights)
    else:
        out_RD = exchanged_experts(*arguments, weights, axis=rules.experts, lockstep=AXES)
    out_RD = jax.lax.psum(out_RD, rules.mlp)  # each device along these had its part of the experts' width
    routing = jax.tree.map(lambda x: jax.lax.psum(x, rules.length), routing)
    return out_RD.reshape(x_BTD.shape), routing
