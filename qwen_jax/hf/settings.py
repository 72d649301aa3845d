"""config.json to QwenConfig and back. What shapes the computation is read; what we cannot compute is refused.

Two spellings are read: `rope_theta` with `rope_scaling` and `torch_dtype`, and the `rope_parameters` and `dtype` of
transformers 5. Fields of Qwen v1: modeling_qwen.py of the QwenLM/Qwen repository.
"""

import os
import pathlib

from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.hf import reach
from qwen_jax.hf.files import read_json
from qwen_jax.hf.layouts import TABLES

WHOLE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip

SCORED = "ForSequenceClassification"  # how transformers calls a reward model; with one label
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


class Fields:
    """The fields of one config.json; a field that is not there is told by its name."""

    def __init__(self, path: pathlib.Path):
        self.path, self.values = path, read_json(path)

    def get(self, name: str, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str, *kinds: type):
        """Returns a field that must be there and of one of these types."""
        value = self.values.get(name)
        if value is None:
            raise self.refused(f"has no {name}")
        if type(value) not in kinds:
            raise self.refused(f"{name} is {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def whole(self, name: str) -> int:
        value = self.need(name, int)
        if not 0 < value < 2**31:
            raise self.refused(f"{name} is {value}; expected 1 to {2**31 - 1}")
        return value

    def number(self, name: str) -> float:
        value = self.need(name, float, int)
        if not abs(value) < 1e38:  # also false of nan, and of integers that no float holds
            raise self.refused(f"{name} is {str(value)[:40]}; expected a finite number")
        return float(value)

    def shape(self) -> dict:
        """Returns the fields that every layout spells as QwenConfig does."""
        return {name: self.whole(name) for name in WHOLE} | {
            "tie_word_embeddings": self.need("tie_word_embeddings", bool),
            # how it was begun, not what it is: files may lack it
            "initializer_range": self.number("initializer_range")
            if self.get("initializer_range") is not None
            else 0.02,
        }

    def refused(self, reason: str) -> InputError:
        return InputError(f"{self.path}: {reason}")


def read_config(path: str | os.PathLike) -> QwenConfig:
    """Returns the config of a checkpoint folder without opening its weights.

    Raises:
      InputError: where config.json is missing or says what this package does not compute.
    """
    return read(pathlib.Path(path))[0]


def read(folder: pathlib.Path) -> tuple[QwenConfig, str]:
    """Reads a folder's config.json.

    Returns:
      The config and its model_type, a key of `layouts.TABLES`.

    Raises:
      InputError: where a field is missing, or says what this package does not compute; the message names the field.
    """
    fields = Fields(folder / "config.json")
    model_type = fields.need("model_type", str)
    if model_type not in TABLES:
        raise fields.refused(f"model_type is {model_type!r}; expected one of {', '.join(TABLES)}")
    _refuse_unsupported(fields, model_type)
    shape = _qwen(fields) if model_type == "qwen" else _qwen2_or_3(fields, model_type)
    shape["head"] = _head(fields)
    try:
        return QwenConfig(**shape), model_type
    except InputError as error:
        raise fields.refused(str(error)) from None


def _refuse_unsupported(fields: Fields, model_type: str) -> None:
    expected = {"use_sliding_window": False, "hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}
    if model_type.startswith("qwen3"):
        expected["attention_bias"] = False  # a bias on o as well, which no published Qwen has
    if model_type == "qwen2_moe":
        expected["qkv_bias"] = True
    if model_type == "qwen":
        expected |= {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
    for name, value in expected.items():
        if fields.get(name, value) != value:
            raise fields.refused(f"{name} is {fields.get(name)!r}; only {value!r} is supported")
    if fields.get("quantization_config"):
        raise fields.refused("quantization_config is set; only unquantised weights are supported")
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.refused(f"layer_types is {str(kinds)[:80]}; only a list of full_attention is supported")


def _qwen2_or_3(fields: Fields, model_type: str) -> dict:
    shape = fields.shape()
    if model_type.startswith("qwen3") or fields.get("head_dim"):
        shape["head_dim"] = fields.whole("head_dim")
    else:
        shape["head_dim"] = _divided(fields, "hidden_size", shape["num_attention_heads"])
    return shape | {
        "num_key_value_heads": fields.whole("num_key_value_heads"),
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "qkv_bias": model_type.startswith("qwen2"),
        "qk_norm": model_type.startswith("qwen3"),
        "v1_lengths": reach.v1_lengths(fields),
        **reach.rope(fields, shape["max_position_embeddings"]),
        **reach.dual_chunk(fields),
        **(_experts(fields, model_type) if model_type.endswith("_moe") else {}),
    }


def _head(fields: Fields) -> str:
    names = fields.get("architectures", [])
    if not isinstance(names, list) or not any(str(name).endswith(SCORED) for name in names):
        return "vocabulary"
    labels = fields.get("num_labels", len(fields.get("id2label", "??")))  # transformers' default is two
    if labels != 1:
        raise fields.refused(f"{names[0]} has {labels} labels; only a reward model's, which is 1, is supported")
    return "score"


def _experts(fields: Fields, model_type: str) -> dict:
    names = (*EXPERTS, *(["shared_expert_intermediate_size"] if model_type == "qwen2_moe" else []))
    if fields.get("num_local_experts") is not None:  # as transformers 5 spells it
        fields.values.setdefault("num_experts", fields.whole("num_local_experts"))
    return {name: fields.whole(name) for name in names} | {
        "norm_topk_prob": fields.need("norm_topk_prob", bool),
        "decoder_sparse_step": fields.whole("decoder_sparse_step"),
        "mlp_only_layers": tuple(fields.get("mlp_only_layers", ())),
    }


def _qwen(fields: Fields) -> dict:
    """Qwen v1."""
    shape = fields.shape()
    heads = shape["num_attention_heads"]
    head_dim = fields.whole("kv_channels") if fields.get("kv_channels") else _divided(fields, "hidden_size", heads)
    fields.whole("seq_length")  # the length of training: without it nobody knows where the tricks begin
    return shape | {
        "intermediate_size": _divided(fields, "intermediate_size", 2),  # the file counts gate and up together
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "rope_theta": fields.number("rotary_emb_base"),
        "rms_norm_eps": fields.number("layer_norm_epsilon"),
        "v1_lengths": reach.v1_lengths(fields),
    }


def _divided(fields: Fields, name: str, by: int) -> int:
    if fields.whole(name) % by:
        raise fields.refused(f"{name} {fields.whole(name)} is not a multiple of {by}")
    return fields.whole(name) // by


def write(config: QwenConfig, dtype: str) -> dict:
    """Returns the config.json of a model, in the spelling that transformers 4 and 5 both read.

    Args:
      config: the model.
      dtype: of the tensors.

    Raises:
      InputError: where no published layout has this mix of bias and QK-norm.
    """
    if config.qkv_bias == config.qk_norm:
        raise InputError(
            f"qkv_bias {config.qkv_bias} with qk_norm {config.qk_norm} is no published layout; "
            "qwen2 has the bias only, qwen3 the norm only"
        )
    kind = "Qwen3" if config.qk_norm else "Qwen2"
    moe = _written_experts(config, kind) if config.num_experts else {}
    return {
        "architectures": [f"{kind}{'Moe' * bool(moe)}{SCORED if config.head == 'score' else 'ForCausalLM'}"],
        "model_type": kind.lower() + "_moe" * bool(moe),
        **{name: getattr(config, name) for name in WHOLE},
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **reach.write(config),
        "initializer_range": config.initializer_range,
        **({"attention_bias": False} if config.qk_norm else {}),  # no field of qwen2, where q, k and v always have one
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **(dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}) if config.head == "score" else {}),
        **moe,
    }


def _written_experts(config: QwenConfig, kind: str) -> dict:
    shared = config.shared_expert_intermediate_size
    if (kind == "Qwen2") != bool(shared):
        raise InputError(
            f"shared_expert_intermediate_size {shared} with qk_norm {config.qk_norm} is no published layout; "
            "qwen2_moe has a shared expert, qwen3_moe has none"
        )
    return {name: getattr(config, name) for name in (*EXPERTS, "norm_topk_prob", "decoder_sparse_step")} | {
        **({"shared_expert_intermediate_size": shared, "qkv_bias": True} if shared else {}),
        "mlp_only_layers": list(config.mlp_only_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
