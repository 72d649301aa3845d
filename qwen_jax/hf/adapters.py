"""LoRA adapters as peft keeps them (adapter_config.json, adapter_model.safetensors), in and out.

Read are adapters of the qwen2, qwen3 and Qwen v1 layouts, with rsLoRA, DoRA, trained token rows and saved modules
(embed_tokens, lm_head, wte); written is the qwen2 layout. Several adapters share one base:

adapters = {name: hf.load_adapter(folder, config) for name, folder in folders.items()}
logits = models.forward(config, adapters["chat"].join(params), tokens)

Source: what peft 0.21 saves.
"""

import json
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax import models
from qwen_jax.config import LINEARS, LoraConfig, QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.hf import boxes, files, layouts
from qwen_jax.hf.layouts import Entry
from qwen_jax.hf.saving import on_host

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the computation in ways that ours does not have.
FOREIGN = (
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
SCORE = "score.weight"  # of a reward model: saved whole
MODULES = {"embedding": ("embed_tokens", "wte"), "head": ("lm_head",)}  # ours: theirs


class Adapter(NamedTuple):
    """An adapter with all it takes to use it."""

    lora: LoraConfig
    tree: dict

    def join(self, params: dict) -> dict:
        """Returns base parameters joined with this adapter, nothing copied: see `models.lora.join`."""
        return models.lora.join(params, self.tree, self.lora)

    def merge(self, params: dict) -> dict:
        """Returns plain parameters with this adapter added in: see `models.lora.merge`."""
        return models.lora.merge(params, self.tree, self.lora)


def load_adapter(path: str | os.PathLike, config: QwenConfig) -> Adapter:
    """Reads a peft folder onto the default device.

    Args:
      path: the folder.
      config: of the base model.

    Raises:
      InputError: in one line, on what is missing, does not fit the model, or is computed in a way that ours is not.
    """
    folder = pathlib.Path(path)
    fields = files.read_json(folder / CONFIG)
    _refuse_foreign(folder / CONFIG, fields)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: holds no {WEIGHTS} (pickled adapters are never opened: they can run code)")
    held = {tensor.name.removeprefix(PREFIX): tensor for tensor in files.headers(folder / WEIGHTS)}
    layout = "qwen" if any(name.startswith("transformer.") for name in held) else "qwen2_moe"
    sizes = layouts.sizes(config) | {"R": fields["r"]}
    leaves, used = {}, set()
    for entry in _entries(layout, config):
        names = entry.names(config)
        here = [name for name in names if name in held]
        if here and len(here) < len(names):
            raise InputError(f"{folder}: has {files.summary(here)} but not every layer of the model has it")
        if here:
            leaves[entry.path] = np.stack([_read(folder, held[name], entry, sizes) for name in names])
            used |= set(names)
    rows, ids, read = _rows(folder, fields, held, config)
    if SCORE in held and config.head == "score":
        leaves["score"] = held[SCORE].read((slice(None), slice(None)))
        read.add(SCORE)
    spare = sorted(held.keys() - used - read)
    if spare or not leaves:
        raise InputError(
            f"{folder}: holds {files.summary(spare) or 'no adapters'}; expected adapters of this model's layers"
        )
    tree = layouts.nested(leaves) | ({"rows": rows} if rows else {})
    lora = LoraConfig(
        rank=fields["r"], alpha=fields["lora_alpha"], dropout=fields.get("lora_dropout", 0.0),
        targets=tuple({path.split("/")[-2] for path in leaves if "/" in path}), rslora=fields.get("use_rslora", False),
        dora=fields.get("use_dora", False), row_ids=ids,
    )  # fmt: skip
    _check(folder, tree, models.lora.abstract(config, lora))
    return Adapter(lora, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree))


def save_adapter(path: str | os.PathLike, config: QwenConfig, adapter: Adapter, *, base: str = "") -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads; one that is there is replaced.

    In a multi-host run every process calls this; the first one writes.

    Args:
      path: the folder.
      config: of the base model.
      adapter: as `load_adapter` returns it, or what a run trained.
      base: where the base model is, for peft.

    Raises:
      InputError: where the folder holds something else than an adapter.
    """
    lora, leaves, tensors = adapter.lora, layouts.flat(adapter.tree), {}
    sizes = layouts.sizes(config) | {"R": lora.rank}
    for entry in _entries("qwen2_moe", config):
        if entry.path in leaves:
            shape = tuple(int(np.prod([sizes[letter] for letter in group])) for group in entry.groups)
            for name, layer in zip(entry.names(config), on_host(leaves[entry.path]), strict=True):
                tensors[PREFIX + name] = boxes.to_file(entry, shape, layer)
    for ours, (theirs, *_) in MODULES.items():
        if f"rows/{ours}" in leaves:
            place = f"{'model.' if ours == 'embedding' else ''}{theirs}"
            tensors[f"{PREFIX}{place}.token_adapter.trainable_tokens_delta"] = on_host(leaves[f"rows/{ours}"])
    if "score" in leaves:
        tensors[PREFIX + SCORE] = on_host(leaves["score"])
    if jax.process_index() == 0:
        _write(pathlib.Path(path), _fields(config, adapter, base), tensors)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("qwen_jax.hf.save_adapter")


def _write(folder: pathlib.Path, fields: dict, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    if folder.exists() and not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: exists and holds no {CONFIG}, so it is not replaced; choose another")
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
    (scratch / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(scratch, folder)


def _fields(config: QwenConfig, adapter: Adapter, base: str) -> dict:
    lora, ids, scored = adapter.lora, list(adapter.lora.row_ids), config.head == "score"
    fields = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if scored else "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none",
        "target_modules": _modules(config, adapter), "use_rslora": lora.rslora, "use_dora": lora.dora,
        "fan_in_fan_out": False, "modules_to_save": ["score"] if scored else None,
    }  # fmt: skip
    if ids and config.tie_word_embeddings:
        fields["trainable_token_indices"] = ids
    elif ids:
        fields["trainable_token_indices"] = {MODULES[name][0]: ids for name in adapter.tree["rows"]}
    return fields


def _modules(config: QwenConfig, adapter: Adapter) -> list[str]:
    """Returns peft's target_modules; with experts beside them, names that are not also those of the experts."""
    leaves = layouts.flat(adapter.tree)
    stems = [
        entry.name.removesuffix(".lora_A.weight") for entry in _entries("qwen2_moe", config) if entry.path in leaves
    ]
    parts = 2 if config.num_experts else 1
    return sorted({".".join(stem.split(".")[-parts:]) for stem in stems if not stem.endswith((".weight", "vector"))})


def _entries(layout: str, config: QwenConfig) -> list[Entry]:
    """The tensors of an adapter, from the layout's rows of the kernels: "NH,D->DNH" has A "R,D->DR", B "NH,R->RNH"."""
    entries = []
    for kernel, _ in layouts.table(layout, config, models.abstract(config)):
        path, _, leaf = kernel.path.rpartition("/")
        if leaf != "kernel" or path.split("/")[-1] not in LINEARS:
            continue
        stem = kernel.name.removesuffix(".weight")
        out, inner = kernel.groups
        ours = out.replace("P", "")
        entries += [
            Entry(f"{path}/a", f"{stem}.lora_A.weight", f"R,{inner}->{inner}R", None, kernel.layers),
            Entry(f"{path}/b", f"{stem}.lora_B.weight", f"{out},R->R{ours}", kernel.part, kernel.layers),
            Entry(f"{path}/magnitude", f"{stem}.lora_magnitude_vector", f"{out}->{ours}", kernel.part, kernel.layers),
        ]
    return entries


def _read(folder: pathlib.Path, tensor: files.Tensor, entry: Entry, sizes: dict[str, int]) -> np.ndarray:
    shape = tuple(int(np.prod([sizes[letter] for letter in group])) for group in entry.groups)
    if tensor.shape != shape:
        raise InputError(f"{folder}: {tensor.name} is {list(tensor.shape)}; the model wants {list(shape)}")
    found = boxes.cut(entry, sizes, tuple(range(sizes[letter]) for letter in entry.ours))
    return boxes.to_ours(entry, found, tensor.read(found.slices))


def _rows(folder: pathlib.Path, fields: dict, held: dict, config: QwenConfig):
    """Returns the trained rows, their ids, and the names of the tensors they were read from."""
    indices = fields.get("trainable_token_indices") or {}
    by_module = indices if isinstance(indices, dict) else dict.fromkeys(MODULES["embedding"], indices)
    rows, ids, read = {}, {}, set()
    for ours, theirs in MODULES.items():
        for name, tensor in held.items():
            module, _, kind = name.rpartition(".")
            module = module.removesuffix(".token_adapter").split(".")[-1]
            if module in theirs and kind in ("trainable_tokens_delta", "weight"):
                rows[ours] = tensor.read(tuple(map(slice, tensor.shape)))
                every = tuple(range(config.vocab_size))
                ids[ours] = every if kind == "weight" else tuple(by_module.get(module, ()))
                read.add(name)
    if len(set(ids.values())) > 1 or (config.tie_word_embeddings and "head" in rows):
        raise InputError(f"{folder}: trains other rows of the head than of the embedding, which ours are not")
    return rows, next(iter(ids.values()), ()), read


def _refuse_foreign(file: pathlib.Path, fields: dict) -> None:
    if fields.get("peft_type") != "LORA" or not isinstance(fields.get("r"), int):
        raise InputError(f"{file}: is of peft_type {fields.get('peft_type')!r}; expected LORA, with its r")
    found = [name for name in FOREIGN if fields.get(name)]
    if fields.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise InputError(f"{file}: has {', '.join(f'{name} = {fields[name]!r}' for name in found)}, not computed here")


def _check(folder: pathlib.Path, tree: dict, expected: dict) -> None:
    found, wanted = layouts.flat(tree), layouts.flat(expected)
    partial = {"rows/head"} - found.keys()  # rows of the embedding alone
    wrong = [
        path for path in sorted((found.keys() | wanted.keys()) - partial) if path not in found or path not in wanted
    ]
    wrong += [path for path in found.keys() & wanted.keys() if found[path].shape != wanted[path].shape]
    if wrong:
        raise InputError(f"{folder}: missing, unexpected or mis-shaped: {', '.join(wrong)}")
