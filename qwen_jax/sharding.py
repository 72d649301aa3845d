"""Where arrays live: the mesh, the table from logical axes to mesh axes, and the constraint that applies it.

Model code names what an axis *means* ("heads", "batch"); `Rules` says over which mesh axes that meaning is split. A
`Layout` pairs one mesh with one table and is passed where it is needed: no ambient mesh, so a constraint cannot
silently do nothing.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis gets; one axis may be -1: all devices that the others leave.

    data: replicas of the parameters. fsdp: parameters and optimizer split, batch split. expert: experts split.
    context: sequences split. tensor: heads and widths split.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Returns the size of each axis in the order of AXES.

        Raises:
          InputError: where the axes do not multiply to the number of devices.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(f"mesh has {text}; expected positive sizes, at most one of them -1 (the rest)")
        known = 1
        for size in sizes:
            known *= size if size > 0 else 1
        sizes = [num_devices // known if size == -1 else size for size in sizes]
        if known * (num_devices // known if -1 in [getattr(self, axis) for axis in AXES] else 1) != num_devices:
            raise InputError(f"mesh has {text}, which does not divide the {num_devices} devices found")
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """Returns a mesh over all devices, or over `devices`, with the axes of AXES.

    Axes are Auto: the compiler propagates shardings. (`jax.make_mesh` alone would make them Explicit, where a
    constraint only asserts.) Devices of several TPU slices are laid out so that only one axis crosses from slice to
    slice: data, where the number of slices divides it, else fsdp.

    Raises:
      InputError: where the sizes do not multiply to the number of devices, or do not fit how a slice is wired.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    try:
        if slices > 1:
            within, across = _over_slices(sizes, slices)
            return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=types)
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)
    except NotImplementedError:  # an axis would have to be a part of one side of the slice
        text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)
        sides = "x".join(str(1 + max(side)) for side in zip(*(device.coords for device in devices), strict=True))
        raise InputError(
            f"mesh has {text}, which does not fit a slice of {sides} chips; expected each axis to be a product of some "
            "of its sides"
        ) from None


def _over_slices(sizes: tuple[int, ...], slices: int) -> tuple[list[int], list[int]]:
    """Returns the sizes of the axes within a slice, and over how many slices each goes."""
    within, across = list(sizes), [1] * len(AXES)
    for index, axis in enumerate(AXES):
        if axis in ("data", "fsdp") and sizes[index] % slices == 0:
            within[index], across[index] = sizes[index] // slices, slices
            return within, across
    raise InputError(
        f"mesh has data={sizes[0]}, fsdp={sizes[1]} over {slices} slices; expected one of them to be a multiple of that"
    )


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes it is split over, outermost first; () leaves it whole."""

    # Parameters. `embed` is the model width as a parameter axis: that is what fsdp splits.
    layers: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp",)
    vocab_in: tuple[str, ...] = ()  # rows of the embedding: a gather from split rows would rematerialise the table
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()  # scales of the norms: small, and needed whole everywhere
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    # Activations; heads, kv_heads, mlp and vocab serve both.
    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("context",)
    act_embed: tuple[str, ...] = ()

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """Returns the partition of an array whose axes have these logical names (None: not split).

        Raises:
          InputError: on an unknown logical name or mesh axis, or where two axes of one array want one mesh axis.
        """
        known = [field.name for field in dataclasses.fields(self)]
        taken: dict[str, str] = {}
        parts = []
        for name in names:
            if name is not None and name not in known:
                raise InputError(f"no rule for the logical axis {name!r} of {names}; known: {', '.join(known)}")
            axes = () if name is None else getattr(self, name)
            for axis in axes:
                if axis not in AXES:
                    raise InputError(f"rule {name} names the mesh axis {axis!r}; known: {', '.join(AXES)}")
                if axis in taken:
                    raise InputError(
                        f"axes {taken[axis]!r} and {name!r} of {names} are both split over mesh axis {axis!r}"
                    )
                taken[axis] = name
            parts.append(axes or None)
        return PartitionSpec(*parts)


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that hold on it. `Layout()` is one device: names are checked, nothing is split."""

    mesh: Mesh | None = None
    rules: Rules = Rules()

    @property
    def one_cpu(self) -> bool:
        """Whether all is on one CPU, or nobody has said where: products are then of matrices (`ops.products`)."""
        return self.mesh is None or (self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu")

    def sharding(self, names: tuple[str | None, ...], shape: tuple[int, ...], what: str = "array") -> NamedSharding:
        """Returns where an array of this shape and these logical axes lives.

        Raises:
          InputError: where the mesh does not divide an axis; the message names array, axis and sizes.
        """
        spec = self.rules.spec(names)
        for name, size in zip(names, shape, strict=True):
            if size % self.size(name):
                axes = ", ".join(f"{axis}={self.mesh.shape[axis]}" for axis in getattr(self.rules, name))
                raise InputError(
                    f"{what}: axis {name!r} of size {size} cannot be split over mesh axes {axes}; "
                    f"expected a multiple of {self.size(name)}"
                )
        return NamedSharding(self.mesh, spec)

    def size(self, name: str | None) -> int:
        """Returns into how many parts the logical axis `name` is split."""
        axes = () if self.mesh is None or name is None else getattr(self.rules, name)
        return math.prod(self.mesh.shape[axis] for axis in axes)


def constrain(x: jax.Array, names: tuple[str | None, ...], layout: Layout) -> jax.Array:
    """Tells the compiler how `x` is split; without a mesh it only checks the names.

    Raises:
      InputError: on an unknown name, the wrong number of names, or an axis the mesh does not divide.
      RuntimeError: inside `shard_map`, where `x` is already one device's part: split again it would mean another array.
    """
    if len(names) != x.ndim:
        raise InputError(f"array of shape {x.shape} was given {len(names)} logical axes {names}; expected {x.ndim}")
    if layout.mesh is None:
        layout.rules.spec(names)
        return x
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual:
        raise RuntimeError(
            f"constrain(…, {names}) inside a shard_map over {', '.join(manual)}: the array of shape {x.shape} is one "
            "device's part already; constrain before or after the shard_map, or pass Layout() inside it"
        )
    return jax.lax.with_sharding_constraint(x, layout.sharding(names, x.shape))


def tree_shardings(axes, shapes, layout: Layout):
    """Maps a tree of logical axes and the tree of the arrays' shapes to a tree of shardings.

    Args:
      axes: tree whose leaves are tuples of logical names.
      shapes: the same tree with anything that has `.shape` as leaves.
      layout: with a mesh.
    """

    def leaf(path, struct, names):
        return layout.sharding(names, struct.shape, what=jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(leaf, shapes, axes)


def replicated(layout: Layout) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(layout.mesh, PartitionSpec())


def put(tree, structs):
    """Moves host arrays to the mesh in one step; in a multi-host run each process hands over its own rows.

    Args:
      tree: numpy arrays [rows of this process, ...], see `share`.
      structs: the global arrays as ShapeDtypeStructs with shardings, split over processes in their first axis only.
    """
    move = lambda struct, x: jax.make_array_from_process_local_data(struct.sharding, x, struct.shape[:1] + x.shape[1:])
    return jax.tree.map(move, structs, tree)


def share(struct) -> dict[str, int]:
    """Returns which rows of a global array this process has to hand over, as {process_index, process_count}.

    Processes whose devices differ only in axes that do not split rows (context, tensor) need the same rows, so the
    number of shares may be smaller than the number of processes.

    Raises:
      InputError: where the rows of this process are not one even share of all rows.
    """
    rows = struct.shape[0]
    places = struct.sharding.addressable_devices_indices_map(struct.shape).values()
    held = sorted({row for place in places for row in range(*place[0].indices(rows))})
    start, count = held[0], len(held)
    if held != list(range(start, start + count)) or rows % count or start % count:
        raise InputError(
            f"the devices of process {jax.process_index()} hold {count} of {rows} rows, which are no even share in one "
            "piece; expected batch axes whose devices lie host by host"
        )
    return dict(process_index=start // count, process_count=rows // count)
