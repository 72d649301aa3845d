"""Variations of a recipe that trade memory against time: remat, microbatches, pieces of the vocabulary, mesh."""

import dataclasses
import math
from collections.abc import Iterator

from launch.topologies import Topology
from qwen_jax.config import REMAT
from qwen_jax.errors import InputError
from qwen_jax.sharding import AXES, MeshConfig


def mesh_of(text: str, topology: Topology, config=None) -> MeshConfig:
    """Returns the mesh of "fsdp=64,tensor=2" on a topology; axes that are not named are 1, or the recipe's where empty.

    Raises:
      InputError: on an unknown axis, or where the axes do not multiply to the chips.
    """
    given = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit() or axis in given:
            raise InputError(f"--mesh has {part!r}; expected AXIS=SIZE, each once, AXIS one of {', '.join(AXES)}")
        given[axis] = int(size)
    mesh = MeshConfig(**{"fsdp": 1, **given}) if given else config.mesh
    sizes = dict(zip(AXES, (getattr(mesh, axis) for axis in AXES), strict=True))
    known = math.prod(size for size in sizes.values() if size > 0)
    if (known != topology.chips and -1 not in sizes.values()) or topology.chips % known:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
        raise InputError(f"the mesh {asked} is of {known} chips; {topology.name} has {topology.chips}")
    return MeshConfig(**dict(zip(AXES, mesh.sizes(topology.chips), strict=True)))


def written(mesh: MeshConfig) -> str:
    """Returns a mesh as --mesh takes it."""
    return ",".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "fsdp=1"


def has(config, name: str) -> bool:
    """Tells whether a recipe has this field."""
    return any(field.name == name for field in dataclasses.fields(config))


def remedies(config) -> Iterator[tuple[str, object]]:
    """Yields (the flag, the changed recipe), those first that cost little time as a rule; after single ones, pairs."""
    single = [*_cheap(config), *_remat(config), *_meshes(config)]
    yield from single
    for first, changed in [*_cheap(config), *_remat(config)]:
        for second, both in (*_remat(changed), *_cheap(changed), *_meshes(changed)):
            if second.split()[0] != first.split()[0]:
                yield f"{first} {second}", both


def _model(config, **fields):
    return dataclasses.replace(config, model=config.model.replace(**fields))


def _cheap(config) -> Iterator[tuple[str, object]]:
    chunks = config.model.vocabulary_chunks * 4
    yield f"--model.vocabulary-chunks {chunks}", _model(config, vocabulary_chunks=chunks)
    if has(config, "microbatches"):
        rows = config.batch_size // max(1, _batch_parts(config.mesh))
        for count in (config.microbatches * 2, config.microbatches * 4):
            if count <= rows and config.batch_size % count == 0 and rows % count == 0:
                yield f"--microbatches {count}", dataclasses.replace(config, microbatches=count)


def _remat(config) -> Iterator[tuple[str, object]]:
    for kind in REMAT[REMAT.index(config.model.remat) + 1 :]:
        yield f"--model.remat {kind}", _model(config, remat=kind)


def _meshes(config) -> Iterator[tuple[str, object]]:
    """Moves a factor from fsdp to an axis that splits activations."""
    for axis, factor in (("context", 2), ("tensor", 2), ("context", 4), ("tensor", 4)):
        mesh = config.mesh
        moved = dataclasses.replace(mesh, fsdp=mesh.fsdp // factor, **{axis: getattr(mesh, axis) * factor})
        if mesh.fsdp % factor == 0 and _possible(config, moved):
            yield f"--mesh {written(moved)}", dataclasses.replace(config, mesh=moved)


def _batch_parts(mesh: MeshConfig) -> int:
    return mesh.data * mesh.fsdp * mesh.expert


def _possible(config, mesh: MeshConfig) -> bool:
    """Tells whether the heads, the experts, the rows and the tokens of a row can be cut so."""
    model, cut = config.model, _batch_parts(mesh) * getattr(config, "microbatches", 1)
    return (
        model.num_key_value_heads % mesh.tensor == 0
        and config.length % (2 * mesh.context) == 0
        and (not model.num_experts or model.num_experts % mesh.expert == 0)
        and config.batch_size % cut == 0
    )


def search(config, topology: Topology) -> Iterator[tuple[str, object]]:
    """Yields (flags, recipe) over meshes, remat and microbatches: plainer meshes and less recomputation first."""
    kinds = ("dots", "full", "none")
    counts = sorted({1, 2, 4, config.microbatches}) if has(config, "microbatches") else [None]
    experts = [1, *(n for n in (4, 8, 16, 32, 64) if config.model.num_experts)]
    found = []
    for tensor in (1, 2, 4, 8):
        for context in (1, 2, 4, 8):
            for expert in experts:
                for data in sorted({1, topology.slices}):
                    rest, left = divmod(topology.chips, tensor * context * expert * data)
                    mesh = MeshConfig(data=data, fsdp=rest, expert=expert, context=context, tensor=tensor)
                    if not left and rest and (data * rest) % topology.slices == 0:
                        found += _with_mesh(config, mesh, kinds, counts, tensor * context)
    for _, flags, changed in sorted(found, key=lambda each: each[0]):
        yield flags, changed


def _with_mesh(config, mesh, kinds, counts, split) -> Iterator[tuple[tuple, str, object]]:
    for count in counts:
        fields = {} if count is None else {"microbatches": count}
        changed = dataclasses.replace(config, mesh=mesh, **fields)
        if _possible(changed, mesh):
            for order, kind in enumerate(kinds):
                flags = f"--mesh {written(mesh)} --model.remat {kind}" + (f" --microbatches {count}" if count else "")
                yield (split, order, mesh.expert, count or 1), flags, _model(changed, remat=kind)
