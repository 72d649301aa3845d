"""The part of config.json that tells how a model reads further than it was trained to.

`fields` is a `settings.Fields`. RoPE is read in two spellings: `rope_theta` with `rope_scaling`, and the
`rope_parameters` of transformers 5.
"""

import dataclasses

from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.long_context import DualChunk, V1Lengths, Yarn


def rope(fields, length: int) -> dict:
    """Returns rope_theta, yarn, and max_position_embeddings: `length`, or as far as YaRN stretches it."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        values = fields.get(name, {})
        if not isinstance(values, dict):
            raise fields.refused(f"{name} is {values!r}; expected an object")
        if values.get("partial_rotary_factor", 1.0) != 1.0:
            raise fields.refused(f"{name}.partial_rotary_factor is {values['partial_rotary_factor']}; expected 1.0")
        for field, value in (("rope_theta", values.get("rope_theta")), ("yarn", _yarn(fields, name, values, length))):
            if value is not None:
                if field == "rope_theta" and type(value) not in (int, float):
                    raise fields.refused(f"{name}.rope_theta is {value!r}; expected a number")
                found.setdefault(field, {})[f"{name}.{field}"] = value
    if fields.get("rope_theta") is not None or "rope_theta" not in found:
        found.setdefault("rope_theta", {})["rope_theta"] = fields.number("rope_theta")
    for values in found.values():
        if len(set(values.values())) > 1:
            raise fields.refused(f"{' and '.join(f'{name} {value}' for name, value in values.items())} differ")
    theta, yarn = (next(iter(found.get(field, {}).values()), Yarn()) for field in ("rope_theta", "yarn"))
    stretched = int(yarn.factor * yarn.original_max_position_embeddings) if yarn.on else 0
    return {"rope_theta": float(theta), "yarn": yarn, "max_position_embeddings": max(length, stretched)}


def _yarn(fields, name: str, rope: dict, length: int) -> Yarn | None:
    """Returns the YaRN of one spelling, None without. The factor is the one it states, whatever the lengths say."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise fields.refused(f"{name} is of type {kind!r}; expected default or yarn")
    if not rope.get("truncate", True):
        raise fields.refused(f"{name}.truncate is {rope['truncate']!r}; only True is supported")
    known = {field.name for field in dataclasses.fields(Yarn)}
    values = {field: value for field, value in rope.items() if field in known and value is not None}
    return _part(fields, name, Yarn, {"original_max_position_embeddings": length} | values, needed=("factor",))


def dual_chunk(fields) -> dict:
    """Reads dual_chunk_attention_config. Which keys to leave out for speed (its sparse_... fields) is not computed."""
    name = "dual_chunk_attention_config"
    values = fields.get(name)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise fields.refused(f"{name} is {values!r}; expected an object")
    published = {"chunk_size": 8192, "local_size": 1024}  # what the inference code takes where a field is missing
    known = {field.name for field in dataclasses.fields(DualChunk)}
    values = published | {field: value for field, value in values.items() if field in known and value is not None}
    return {"dual_chunk": _part(fields, name, DualChunk, values)}


def v1_lengths(fields) -> V1Lengths:
    """Reads what a model of Qwen v1 does beyond seq_length; a qwen2 folder that we made of one says it too."""
    on = {name: fields.get(name, False) for name in ("use_dynamic_ntk", "use_logn_attn")}
    if not any(on.values()):
        return V1Lengths()
    return _part(fields, "Qwen v1", V1Lengths, on | {"seq_length": fields.whole("seq_length")})


def _part(fields, name: str, kind: type, values: dict, needed: tuple[str, ...] = ()):
    """Returns `values` as the dataclass, each of them checked to be of the type that the dataclass says."""
    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if field.name in needed and value is None:
            raise fields.refused(f"{name} has no {field.name}")
        kinds = {int: (int,), str: (str,), bool: (bool,)}.get(field.type, (int, float))
        if field.name in values and (not isinstance(value, kinds) or isinstance(value, bool) != (field.type is bool)):
            raise fields.refused(f"{name}.{field.name} is {value!r}; expected {' or '.join(x.__name__ for x in kinds)}")
    try:
        return kind(**values)
    except InputError as error:
        raise fields.refused(str(error)) from None


def write(config: QwenConfig) -> dict:
    """The fields of how it reads further than it was trained to; those of Qwen v1 only we read in a qwen2 folder."""
    told, usual = dataclasses.asdict(config.yarn), dataclasses.asdict(Yarn())
    needed = ("factor", "original_max_position_embeddings")
    yarn = {name: value for name, value in told.items() if name in needed or value != usual[name]}
    out = {"rope_scaling": {"rope_type": "yarn", **yarn} if config.yarn.on else None}
    if config.dual_chunk.on:
        out["dual_chunk_attention_config"] = dataclasses.asdict(config.dual_chunk)
    if config.v1_lengths.on:
        out |= dataclasses.asdict(config.v1_lengths)
    return out
