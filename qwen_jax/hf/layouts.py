"""Which tensor of a published checkpoint is which parameter of ours: one table for each layout, read both ways.

Sources: the modeling files of transformers 4.51 (qwen2, qwen3, qwen2_moe, qwen3_moe) and of QwenLM/Qwen (Qwen v1).
"""

import itertools
import math
from typing import NamedTuple

from qwen_jax.config import QwenConfig
from qwen_jax.models.stacks import stacks


class Entry(NamedTuple):
    """One row of a table.

    Attributes:
      path: our parameter, "layers/mlp/gate/kernel". Those under "layers/" are stacked on a leading axis L.
      name: the file's tensor; {} is the layer, a second {} the expert, also a leading axis of ours.
      axes: "file axes -> our axes", without those leading ones. The letters are the sizes of `sizes`, a comma parts the
        file's axes: "NH,D->DNH" is a [N*H, D] tensor that we keep as [D, N, H].
      part: where the file packs several parameters along P, the outermost letter: which one this is.
      layers: which layers are stacked; `table` fills it in, and the name of their stack into the path.
    """

    path: str
    name: str
    axes: str
    part: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def leading(self) -> int:
        """How many of our leading axes number the file's tensors: 0, 1 (layers) or 2 (layers and experts)."""
        return self.name.count("{}")

    @property
    def groups(self) -> list[str]:
        """The letters of each axis in the file."""
        return self.axes.split("->")[0].split(",")

    @property
    def ours(self) -> str:
        """The letters of our axes, without L."""
        return self.axes.split("->")[1]

    def file_shape(self, config: QwenConfig) -> tuple[int, ...]:
        return tuple(math.prod(sizes(config)[letter] for letter in group) for group in self.groups)

    def tensor(self, place: tuple[int, ...]) -> str:
        """The file's tensor that is at this place of our leading axes."""
        return self.name.format(self.layers[place[0]], *place[1:]) if place else self.name

    def places(self, config: QwenConfig) -> list[tuple[int, ...]]:
        """All places of our leading axes, in order."""
        sizes = (len(self.layers), config.num_experts)[: self.leading]
        return list(itertools.product(*map(range, sizes)))

    def names(self, config: QwenConfig) -> list[str]:
        """The file's tensors this parameter is made of."""
        return [self.tensor(place) for place in self.places(config)]


QWEN2 = (  # Qwen1.5, Qwen2, Qwen2.5 (bias on q, k, v) and Qwen3 (q_norm, k_norm): each model has a part of the rows
    Entry("embedding", "model.embed_tokens.weight", "V,D->VD"),
    Entry("head", "lm_head.weight", "V,D->VD"),
    Entry("score", "score.weight", "J,D->JD"),  # of a reward model, which has no lm_head
    Entry("final_norm/scale", "model.norm.weight", "D->D"),
    Entry("layers/attention_norm/scale", "model.layers.{}.input_layernorm.weight", "D->D"),
    Entry("layers/attention/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "NH,D->DNH"),
    Entry("layers/attention/q/bias", "model.layers.{}.self_attn.q_proj.bias", "NH->NH"),
    Entry("layers/attention/q_norm/scale", "model.layers.{}.self_attn.q_norm.weight", "H->H"),
    Entry("layers/attention/k/kernel", "model.layers.{}.self_attn.k_proj.weight", "KH,D->DKH"),
    Entry("layers/attention/k/bias", "model.layers.{}.self_attn.k_proj.bias", "KH->KH"),
    Entry("layers/attention/k_norm/scale", "model.layers.{}.self_attn.k_norm.weight", "H->H"),
    Entry("layers/attention/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "KH,D->DKH"),
    Entry("layers/attention/v/bias", "model.layers.{}.self_attn.v_proj.bias", "KH->KH"),
    Entry("layers/attention/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "D,NH->NHD"),
    Entry("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "D->D"),
    Entry("layers/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "F,D->DF"),
    Entry("layers/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "F,D->DF"),
    Entry("layers/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "D,F->FD"),
)

QWEN_MOE = (  # Qwen1.5-MoE, Qwen2-57B (shared expert) and Qwen3-MoE: the same, with experts in some layers or all
    *QWEN2,
    Entry("layers/moe/router", "model.layers.{}.mlp.gate.weight", "E,D->DE"),
    Entry("layers/moe/gate", "model.layers.{}.mlp.experts.{}.gate_proj.weight", "I,D->DI"),
    Entry("layers/moe/up", "model.layers.{}.mlp.experts.{}.up_proj.weight", "I,D->DI"),
    Entry("layers/moe/down", "model.layers.{}.mlp.experts.{}.down_proj.weight", "D,I->ID"),
    Entry("layers/moe/shared/gate/kernel", "model.layers.{}.mlp.shared_expert.gate_proj.weight", "S,D->DS"),
    Entry("layers/moe/shared/up/kernel", "model.layers.{}.mlp.shared_expert.up_proj.weight", "S,D->DS"),
    Entry("layers/moe/shared/down/kernel", "model.layers.{}.mlp.shared_expert.down_proj.weight", "D,S->SD"),
    Entry("layers/moe/shared_gate/kernel", "model.layers.{}.mlp.shared_expert_gate.weight", "J,D->DJ"),
)

QWEN = (  # Qwen v1: q, k and v packed in thirds; the activation is on w2, so w2 is our gate and w1 our up
    Entry("embedding", "transformer.wte.weight", "V,D->VD"),
    Entry("head", "lm_head.weight", "V,D->VD"),
    Entry("final_norm/scale", "transformer.ln_f.weight", "D->D"),
    Entry("layers/attention_norm/scale", "transformer.h.{}.ln_1.weight", "D->D"),
    Entry("layers/attention/q/kernel", "transformer.h.{}.attn.c_attn.weight", "PNH,D->DNH", 0),
    Entry("layers/attention/q/bias", "transformer.h.{}.attn.c_attn.bias", "PNH->NH", 0),
    Entry("layers/attention/k/kernel", "transformer.h.{}.attn.c_attn.weight", "PKH,D->DKH", 1),
    Entry("layers/attention/k/bias", "transformer.h.{}.attn.c_attn.bias", "PKH->KH", 1),
    Entry("layers/attention/v/kernel", "transformer.h.{}.attn.c_attn.weight", "PKH,D->DKH", 2),
    Entry("layers/attention/v/bias", "transformer.h.{}.attn.c_attn.bias", "PKH->KH", 2),
    Entry("layers/attention/o/kernel", "transformer.h.{}.attn.c_proj.weight", "D,NH->NHD"),
    Entry("layers/mlp_norm/scale", "transformer.h.{}.ln_2.weight", "D->D"),
    Entry("layers/mlp/gate/kernel", "transformer.h.{}.mlp.w2.weight", "F,D->DF"),
    Entry("layers/mlp/up/kernel", "transformer.h.{}.mlp.w1.weight", "F,D->DF"),
    Entry("layers/mlp/down/kernel", "transformer.h.{}.mlp.c_proj.weight", "D,F->FD"),
)

TABLES = {"qwen2": QWEN2, "qwen3": QWEN2, "qwen2_moe": QWEN_MOE, "qwen3_moe": QWEN_MOE, "qwen": QWEN}  # by model_type

# Buffers that old files store beside the weights and that can be computed: never read.
IGNORED = r"(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)"


def sizes(config: QwenConfig) -> dict[str, int]:
    """The size of each axis letter."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "P": 3,
        "E": config.num_experts,
        "I": config.moe_intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "J": 1,
    }


def row(model_type: str, path: str) -> Entry:
    """Returns the row of one parameter."""
    return next(entry for entry in TABLES[model_type] if entry.path == path)


def table(model_type: str, config: QwenConfig, params: dict) -> list[tuple[Entry, object]]:
    """Pairs the rows of a layout with the leaves of a parameter tree.

    Args:
      model_type: a key of TABLES.
      config: the model: which layers are stacked together.
      params: plain nested dict, with anything as leaves.

    Returns:
      (row, leaf) for each parameter, in the table's order; a row of TABLES comes once for each stack of layers.

    Raises:
      KeyError: where the layout has no row for a parameter.
    """
    leaves = flat(params)
    blocks = [
        ("/".join(path) + "/", tuple(stack.layers(place)))
        for stack in stacks(config)
        for place, path in enumerate(stack.blocks())
    ]
    rows = []
    for entry in TABLES[model_type]:
        if entry.leading:
            rows += [entry._replace(path=entry.path.replace("layers/", prefix, 1), layers=layers)
                     for prefix, layers in blocks]  # fmt: skip
        else:
            rows.append(entry)
    known = [entry for entry in rows if entry.path in leaves]
    unknown = sorted(set(leaves) - {entry.path for entry in known})
    if unknown:
        raise KeyError(f"the {model_type} layout has no tensor for {', '.join(unknown)}")
    return [(entry, leaves[entry.path]) for entry in known]


def flat(params: dict, prefix: str = "") -> dict:
    """Returns {"a/b": leaf} of a nested dict."""
    leaves = {}
    for key, value in params.items():
        leaves |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def nested(leaves: dict) -> dict:
    """Inverse of `flat`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
