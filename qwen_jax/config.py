"""The shape of every published Qwen, as plain data: `QwenConfig` and the registry of names; and LoRA's `LoraConfig`.

Field names are those of the published config.json files. Sizes: the Qwen, Qwen2, Qwen2.5 and Qwen3 reports
(arXiv:2309.16609 table 1, 2407.10671 table 1, 2412.15115 table 1, 2505.09388 table 1) and the config.json files of the
base models (of the 1M models, the instruct ones: no others exist).
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Literal

from qwen_jax.errors import InputError
from qwen_jax.long_context import DualChunk, V1Lengths, Yarn

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "dots", "full")
HEADS = ("vocabulary", "score")
REACH = {"yarn": Yarn, "dual_chunk": DualChunk, "v1_lengths": V1Lengths}  # fields that are dataclasses themselves
# The matrices of a layer; of how many axes their inputs are.
LINEARS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
QUANTISED = ("", "int8", "nf4")
LORA_TARGETS = {
    **{name: (name,) for name in LINEARS},
    **{f"{name}_proj": (name,) for name in LINEARS},
    **{"c_attn": ("q", "k", "v"), "c_proj": ("o", "down"), "w1": ("up",), "w2": ("gate",)},
}


@dataclass(frozen=True)
class QwenConfig:
    """One decoder: its shape, the variations between Qwen generations, and how it is computed.

    Raises:
      InputError: on a value that no model can have; the message names the field.
    """

    vocab_size: int = 151_936  # rows of the embedding, padding rows included: not the tokenizer's length
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 32_768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = True  # Qwen, Qwen1.5, Qwen2, Qwen2.5; Qwen3 has none
    qk_norm: bool = False  # Qwen3: RMSNorm over head_dim on q and k, before RoPE
    initializer_range: float = 0.02
    head: str = "vocabulary"  # or "score": a reward model's, one number for each position
    # How it reads further than it was trained to; at most one of them.
    yarn: Yarn = Yarn()
    dual_chunk: DualChunk = DualChunk()
    v1_lengths: V1Lengths = V1Lengths()

    # Mixture of experts (Qwen1.5-MoE, Qwen2-57B, Qwen3-MoE); num_experts 0 is a dense model.
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # width of one expert; intermediate_size is that of layers without experts
    shared_expert_intermediate_size: int = 0  # Qwen2-MoE: an expert of every token, with a sigmoid gate; 0 for none
    norm_topk_prob: bool = False  # whether the gates of a token sum to 1
    decoder_sparse_step: int = 1  # layers step - 1, 2 step - 1, ... have experts, the others an ordinary MLP
    mlp_only_layers: tuple[int, ...] = ()  # and these have none either

    # How it is computed. None of these changes what the model is.
    dtype: str = "bfloat16"  # activations and matrix products
    param_dtype: str = "float32"  # parameters as stored
    remat: str = "none"  # what the backward pass recomputes of layers ("dots": all but matrix products and attention)
    scan_layers: bool = True  # one compiled layer run num_hidden_layers times; False unrolls
    attention: str = "auto"  # back end of ops.attention
    vocabulary_chunks: int = 8  # pieces in which the vocabulary is scored: more hold less memory

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings", "vocabulary_chunks"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"QwenConfig.{name} is {value!r}; expected a whole number of at least 1")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                raise InputError(f"QwenConfig.{name} is {value!r}; expected a finite number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"QwenConfig.num_attention_heads is {self.num_attention_heads}, not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; every kv head serves a whole group of q heads"
            )
        if self.head_dim % 2:
            raise InputError(f"QwenConfig.head_dim is {self.head_dim}; RoPE rotates pairs, expected an even number")
        for name, allowed in (
            ("dtype", DTYPES), ("param_dtype", DTYPES), ("remat", REMAT), ("head", HEADS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise InputError(f"QwenConfig.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name, kind in REACH.items():
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"QwenConfig.{name} is {getattr(self, name)!r}; expected a {kind.__name__}")
        on = [name for name in REACH if getattr(self, name).on]
        if len(on) > 1:
            raise InputError(f"QwenConfig has {' and '.join(on)} on; each stretches positions by itself, expected one")
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))  # a list, where it is read from JSON
        self._check_experts()

    def _check_experts(self):
        least = dict.fromkeys(("num_experts", "shared_expert_intermediate_size"), 0) | {"decoder_sparse_step": 1}
        if self.num_experts:
            least |= {"num_experts_per_tok": 1, "moe_intermediate_size": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise InputError(f"QwenConfig.{name} is {value!r}; expected a whole number of at least {smallest}")
        if self.num_experts_per_tok > self.num_experts > 0:
            raise InputError(
                f"QwenConfig.num_experts_per_tok is {self.num_experts_per_tok}, more than num_experts "
                f"{self.num_experts}; a token goes to different experts"
            )
        unknown = [i for i in self.mlp_only_layers if i not in range(self.num_hidden_layers)]
        if unknown:
            raise InputError(f"QwenConfig.mlp_only_layers has {unknown}; there are {self.num_hidden_layers} layers")

    def is_sparse(self, layer: int) -> bool:
        """Tells whether a layer (from 0) has experts in the place of its MLP."""
        on_step = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and on_step and layer not in self.mlp_only_layers

    def replace(self, **fields) -> "QwenConfig":
        """Returns a copy with these fields changed; a field that is a dataclass may be given as a dict, as JSON has it.

        Raises:
          InputError: on a name that is no field; the message lists the nearest ones.
        """
        _check_names(type(self), fields)
        for name, kind in REACH.items():
            if isinstance(fields.get(name), dict):
                _check_names(kind, fields[name])
                fields[name] = kind(**fields[name])
        return dataclasses.replace(self, **fields)

    def param_counts(self) -> dict[str, int]:
        """Counts parameters from the shapes.

        Returns:
          "total"; "non_embedding" (without the embedding and the head, as the reports count); "active" and
          "active_non_embedding" (without the experts that a token does not go to: the same for a dense model).
        """
        D, H = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * H, self.num_key_value_heads * H
        attention = D * q + 2 * D * kv + q * D
        attention += (q + 2 * kv) * self.qkv_bias + 2 * H * self.qk_norm
        sparse = sum(self.is_sparse(layer) for layer in range(self.num_hidden_layers))
        shared = self.shared_expert_intermediate_size
        expert = 3 * D * self.moe_intermediate_size
        others = D * self.num_experts + (3 * D * shared + D) * bool(shared)  # router, shared expert and its gate
        dense = (self.num_hidden_layers - sparse) * 3 * D * self.intermediate_size
        non_embedding = self.num_hidden_layers * (attention + 2 * D) + dense + D
        non_embedding += sparse * (others + self.num_experts * expert)
        head = D if self.head == "score" else self.vocab_size * D * (not self.tie_word_embeddings)
        total = non_embedding + self.vocab_size * D + head
        idle = sparse * (self.num_experts - self.num_experts_per_tok) * expert
        return {
            "total": total,
            "non_embedding": non_embedding,
            "active": total - idle,
            "active_non_embedding": non_embedding - idle,
        }


def _check_names(kind: type, fields: dict) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names
            raise InputError(f"{kind.__name__} has no field {name!r}; nearest: {', '.join(near)}")


@dataclass(frozen=True)
class LoraConfig:
    """What is trained beside a frozen model (arXiv:2106.09685). Rank 0: nothing, the model itself is trained.

    Targets are ours (q, k, v, o, gate, up, down) or published names: q_proj and its like, and Qwen v1's c_attn
    (q, k, v), c_proj (o and down), w1 (up), w2 (gate).

    Raises:
      InputError: on a value out of range or an unknown target; the message names the field.
    """

    rank: int = 0
    alpha: float = 16.0  # A·B is scaled by alpha / rank
    dropout: float = 0.0  # of the adapters' input while training
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead (arXiv:2312.03732)
    dora: bool = False  # a trained length for each output (arXiv:2402.09353)
    b_rate: float = 1.0  # LoRA+ (arXiv:2402.12354): how many times the learning rate of the others B has; 16 there
    # Rows of embedding and head of the control tokens that chats are made of. "auto" trains those that the base has not
    # trained, "train" all of them, "freeze" none: refused where the base has not trained them.
    control_rows: Literal["auto", "train", "freeze"] = "auto"
    row_ids: tuple[int, ...] = ()  # which rows that came to; a run fills it in
    # Q-LoRA (arXiv:2305.14314): how the frozen kernels are kept, see ops.quantisation; "" as param_dtype has them.
    quantised: Literal[QUANTISED] = ""

    def __post_init__(self):
        if self.rank < 0:
            raise InputError(f"lora.rank is {self.rank}; expected 1 or more, or 0 for no LoRA")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; expected 0 to less than 1")
        if self.quantised not in QUANTISED:
            raise InputError(f"lora.quantised is {self.quantised!r}; expected one of {', '.join(map(repr, QUANTISED))}")
        for name in ("alpha", "b_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"lora.{name} is {getattr(self, name)}; expected a finite number above 0")
        wanted = set()
        for name in self.targets:
            if name not in LORA_TARGETS:
                raise InputError(f"lora.targets names {name!r}; expected some of {', '.join(LORA_TARGETS)}")
            wanted |= set(LORA_TARGETS[name])
        if not wanted:
            raise InputError(f"lora.targets is empty; expected some of {', '.join(LORA_TARGETS)}")
        object.__setattr__(self, "targets", tuple(name for name in LINEARS if name in wanted))


def _qwen(hidden, layers, heads, intermediate, *, kv_heads=None, tied=False, vocab=151_936, **fields):
    """A Qwen v1 or Qwen1.5 shape: as Qwen2, but every head has keys of its own unless `kv_heads` says otherwise."""
    return _qwen2(hidden, layers, heads, kv_heads or heads, intermediate, tied=tied, vocab=vocab, **fields)


def _qwen2(hidden, layers, heads, kv_heads, intermediate, *, tied=False, vocab=151_936, **fields):
    """A Qwen2 or Qwen2.5 shape: bias on q, k, v; head_dim = hidden / heads."""
    return QwenConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, intermediate_size=intermediate,
        tie_word_embeddings=tied, **fields,
    )  # fmt: skip


def _qwen3(hidden, layers, heads, intermediate, *, tied=False):
    """A Qwen3 shape: QK-norm, no bias, 8 kv heads of 128 whatever the hidden size."""
    return QwenConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        intermediate_size=intermediate, tie_word_embeddings=tied, qkv_bias=False, qk_norm=True,
        max_position_embeddings=40_960,
    )  # fmt: skip


def _experts(config: QwenConfig, count: int, chosen: int, width: int, *, shared: int = 0, **fields) -> QwenConfig:
    """The shape with experts in every layer. Qwen3's gates sum to 1; Qwen2's do not, and it has a shared expert."""
    return config.replace(
        num_experts=count, num_experts_per_tok=chosen, moe_intermediate_size=width,
        shared_expert_intermediate_size=shared, norm_topk_prob=not shared, **fields,
    )  # fmt: skip


def _registry() -> dict[str, QwenConfig]:
    """The base models. Instruct variants share the shape; rms_norm_eps and context are read from their config.json."""
    long, wide = dict(max_position_embeddings=131_072), dict(vocab=152_064)
    loose = dict(rms_norm_eps=1e-5)  # what the large Qwen2.5 base models were trained with
    # 14B was trained at 2,048 and reads 8,192; raise max_position_embeddings to have the others stretch as well.
    tricks = lambda length: V1Lengths(length, use_dynamic_ntk=True, use_logn_attn=True)
    v1 = lambda length: dict(max_position_embeddings=8192, rope_theta=1e4, v1_lengths=tricks(length))
    chunks = DualChunk(262_144, local_size=8_192, original_max_position_embeddings=262_144)
    million = dict(max_position_embeddings=1_010_000, rope_theta=1e7, rms_norm_eps=1e-5, dual_chunk=chunks)
    return {
        "qwen-1.8b": _qwen(2048, 24, 16, 5504, **v1(8192)),
        "qwen-7b": _qwen(4096, 32, 32, 11008, **v1(8192)),
        "qwen-14b": _qwen(5120, 40, 40, 13696, **wide, **v1(2048)),
        "qwen-72b": _qwen(8192, 80, 64, 24576, **wide),  # trained at 32,768 with theta 1e6, without tricks
        "qwen1.5-0.5b": _qwen(1024, 24, 16, 2816, tied=True),
        "qwen1.5-1.8b": _qwen(2048, 24, 16, 5504),
        "qwen1.5-4b": _qwen(2560, 40, 20, 6912, rope_theta=5e6),
        "qwen1.5-7b": _qwen(4096, 32, 32, 11008),
        "qwen1.5-14b": _qwen(5120, 40, 40, 13696, **wide),
        "qwen1.5-32b": _qwen(5120, 64, 40, 27392, kv_heads=8, **wide),
        "qwen1.5-72b": _qwen(8192, 80, 64, 24576, **wide),
        "qwen1.5-110b": _qwen(8192, 80, 64, 49152, kv_heads=8, **wide),
        "qwen2-0.5b": _qwen2(896, 24, 14, 2, 4864, tied=True, **long),
        "qwen2-1.5b": _qwen2(1536, 28, 12, 2, 8960, tied=True, **long),
        "qwen2-7b": _qwen2(3584, 28, 28, 4, 18944, **wide, **long),
        "qwen2-72b": _qwen2(8192, 80, 64, 8, 29568, **wide, **long, **loose),
        "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, tied=True),
        "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, tied=True, **long),
        "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, tied=True),
        "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, **wide, **long),
        "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, **wide, **long, **loose),
        "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, **wide, **long, **loose),
        "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29568, **wide, **long, **loose),
        "qwen2.5-7b-1m": _qwen2(3584, 28, 28, 4, 18944, **wide, **million),
        "qwen2.5-14b-1m": _qwen2(5120, 48, 40, 8, 13824, **wide, **million),
        "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
        "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
        "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
        "qwen3-8b": _qwen3(4096, 36, 32, 12288),
        "qwen3-14b": _qwen3(5120, 40, 40, 17408),
        "qwen3-32b": _qwen3(5120, 64, 64, 25600),
        "qwen1.5-moe-a2.7b": _experts(_qwen(2048, 24, 16, 5632), 60, 4, 1408, shared=5632),
        "qwen2-57b-a14b": _experts(_qwen2(3584, 28, 28, 4, 18944, **long), 64, 8, 2560, shared=20480),
        "qwen3-30b-a3b": _experts(_qwen3(2048, 48, 32, 6144), 128, 8, 768, num_key_value_heads=4),
        "qwen3-235b-a22b": _experts(_qwen3(4096, 94, 64, 12288), 128, 8, 1536, num_key_value_heads=4),
    }


_CONFIGS = _registry()


def names() -> list[str]:
    """Returns the published names that `get` knows."""
    return list(_CONFIGS)


def get(name: str) -> QwenConfig:
    """Returns the config of a published model.

    Raises:
      InputError: on an unknown name; the message lists the nearest ones.
    """
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name.lower(), _CONFIGS, n=3) or list(_CONFIGS)
        raise InputError(f"no Qwen is called {name!r}; nearest: {', '.join(near)} (config.names() lists all)")
    return _CONFIGS[name]
