"""A model to start from, wherever it comes from: a published Hugging Face folder, or the workdir of a run of ours."""

import json
import os
import pathlib
from collections.abc import Callable

import jax

from qwen_jax import tokenizer
from qwen_jax.config import LINEARS, LoraConfig, QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.ops import lora, quantisation
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import checkpoint, hosts, workdir

BASE = "base"  # of a workdir: where a LoRA run that started from nothing keeps what its adapters stand beside


def is_run(path: str | os.PathLike) -> bool:
    """Tells a run's workdir (True) from a Hugging Face folder (False) by its config.json.

    Raises:
      InputError: where it is neither.
    """
    file = pathlib.Path(path) / "config.json"
    try:
        record = json.loads(file.read_text())
    except OSError:  # there is none, or path is a file
        raise InputError(f"{file} is missing; expected a Hugging Face folder or the workdir of a run") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if "experiment" in record:
        return True
    if "model_type" in record:
        return False
    raise InputError(f"{file} has neither model_type (Hugging Face) nor experiment (a run of qwen_jax)")


def read_config(path: str | os.PathLike) -> QwenConfig:
    """Returns the model's config without reading its weights."""
    if is_run(path):
        return workdir.model_config(path)
    from qwen_jax import hf

    return hf.read_config(path)


def load_params(path: str | os.PathLike, abstract=None, *, step: int | None = None) -> dict:
    """Reads parameters straight to where they belong.

    Args:
      path: Hugging Face folder or workdir; of a LoRA run the adapters are merged into its base, which is read too.
      abstract: tree of ShapeDtypeStructs with shardings, as in Program.state.params; None takes the parameters as they
        are kept, on the first device. What else there is than it names (the head of a vocabulary, say, that a reward
        model does not need) is left.
      step: of a run of a whole model, which checkpoint; the newest if None.

    Returns:
      The parameters, in the shapes, dtypes and shardings of `abstract`.

    Raises:
      InputError: where there is no such model, or it lacks a parameter: a score head, if it is no reward model.
    """
    shardings = None if abstract is None else jax.tree.map(lambda struct: struct.sharding, abstract)
    if is_run(path):
        trained = workdir.lora_config(path)
        if trained.rank:
            return _tuned(path, trained, abstract, shardings)
        params = checkpoint.load_params(path, step=step, shardings=shardings)[1]
    else:
        from qwen_jax import hf

        if abstract is None:
            return hf.load(path)[1]
        mesh = getattr(jax.tree.leaves(shardings)[0], "mesh", None)
        params = hf.load(path, dtype=str(jax.tree.leaves(abstract)[0].dtype), mesh=mesh)[1]
    if abstract is None:
        return params
    if missing := [name for name in abstract if name not in params]:
        told = {
            "score": "score head: expected a reward model",
            "head": "head of a vocabulary: expected a language model",
        }
        raise InputError(f"{path} has no {told.get(missing[0], missing[0])}")
    return jax.tree.map(_checked, {name: params[name] for name in abstract}, abstract)


def _tuned(path, trained: LoraConfig, abstract, shardings) -> dict:
    """Returns the base of a LoRA run with its adapters added in."""
    base = workdir.read(path)["config"]["base"]
    base = pathlib.Path(path) / BASE if base == "random" else base
    try:
        # The score head of a reward model is the run's own.
        wanted = abstract and {name: part for name, part in abstract.items() if name != "score"}
        params = load_params(base, wanted)
    except InputError as error:
        raise InputError(f"{path} is a LoRA run, and its base cannot be read: {error}") from None
    first = jax.tree.leaves(params)[0].sharding
    whole = jax.NamedSharding(first.mesh, jax.P()) if isinstance(first, jax.NamedSharding) else first
    adapters = checkpoint.load_params(path, shardings=whole)[1]
    scale = lora.scale(trained.rank, trained.alpha, rslora=trained.rslora)

    def merge(params, adapters):
        if trained.quantised:  # the adapters were trained beside what the codes stand for
            params = quantisation.quantise_tree(params, trained.quantised, LINEARS)
            params = quantisation.dequantise_tree(params)
        return lora.merge(lora.join(params, adapters, scale=scale, row_ids=trained.row_ids))

    return jax.jit(merge, out_shardings=shardings, donate_argnums=0)(params, adapters)


def tokenizer_path(path: str | os.PathLike) -> pathlib.Path:
    """Returns where the tokenizer of this model is: the folder itself, or the run's tokenizer/."""
    return pathlib.Path(path) / "tokenizer" if is_run(path) else pathlib.Path(path)


def keep_tokenizer(folder: pathlib.Path, make: Callable[[], Tokenizer], *, at_most: int) -> Tokenizer:
    """Returns the tokenizer kept in this folder; where there is none yet, keeps the one that `make` returns.

    It is saved whole or not at all, by the first process, so that a run stopped meanwhile makes it again.

    Raises:
      InputError: where it has more than `at_most` tokens, the model's vocab_size.
    """

    def save():
        if folder.exists():
            return
        made = make()
        if made.vocab_size > at_most:
            raise InputError(
                f"the tokenizer has {made.vocab_size} tokens, model.vocab_size is {at_most}; expected at least as many"
            )
        scratch = folder.with_name(f"{folder.name}.partial")
        made.save(scratch)
        scratch.rename(folder)

    hosts.once(save)
    return tokenizer.load(folder)


def _checked(array, struct):
    if array.shape != struct.shape:
        raise InputError(f"a parameter has shape {array.shape}, the model wants {struct.shape}")
    return array.astype(struct.dtype)
