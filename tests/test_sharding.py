"""The mesh and its rules: what divides, what is refused, and the traps that fail silently elsewhere."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qwen_jax import models, sharding
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout, MeshConfig, Rules
from tests.conftest import tiny


@pytest.mark.parametrize(
    "config, devices, sizes",
    [
        (MeshConfig(), 8, (1, 8, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2), 8, (4, 2, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=1, expert=2, context=1, tensor=2), 8, (2, 1, 2, 1, 2)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config, devices, sizes):
    assert config.sizes(devices) == sizes


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(fsdp=3), "fsdp=3.*does not divide the 8 devices"),
        (MeshConfig(tensor=3), "tensor=3.*does not divide the 8 devices"),
        (MeshConfig(data=16), "data=16.*does not divide the 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of them -1"),
        (MeshConfig(tensor=0), "expected positive sizes"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(config)


def test_a_mesh_that_cannot_be_laid_on_a_slice_is_refused_with_its_sides():
    """Devices as jax describes those of a v5p slice: 8 is no product of sides 4, 4, 4."""
    places = np.ndindex(4, 4, 4)
    chips = [
        types.SimpleNamespace(
            id=i, platform="tpu", device_kind="TPU v5", coords=place, core_on_chip=0, process_index=0, slice_index=0
        )
        for i, place in enumerate(places)
    ]
    with pytest.raises(InputError, match="fsdp=8, expert=8, which does not fit a slice of 4x4x4 chips"):
        sharding.make_mesh(MeshConfig(expert=8), chips)


def test_mesh_axes_are_auto():
    """Under Explicit axes, jax.make_mesh's own default, a constraint asserts instead of constraining."""
    assert set(sharding.make_mesh(MeshConfig()).axis_types) == {AxisType.Auto}


def test_rules_give_the_partition():
    assert Rules().spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
    assert Rules().spec(("batch", None)) == PartitionSpec(("data", "fsdp", "expert"), None)


@pytest.mark.parametrize(
    "rules, names, message",
    [
        (Rules(), ("heds",), "no rule for the logical axis 'heds'"),
        (Rules(), ("heads", "mlp"), "'heads' and 'mlp'.*both split over mesh axis 'tensor'"),
        (Rules(mlp=("model",)), ("mlp",), "rule mlp names the mesh axis 'model'"),
    ],
)
def test_rules_refuse_what_they_cannot_mean(rules, names, message):
    with pytest.raises(InputError, match=message):
        rules.spec(names)


@pytest.mark.parametrize("layout", [Layout(), Layout(sharding.make_mesh(MeshConfig()))], ids=["no mesh", "mesh"])
def test_constrain_refuses_unknown_names_with_and_without_a_mesh(layout):
    with pytest.raises(InputError, match="no rule for the logical axis 'bacth'"):
        constrain = lambda x: sharding.constrain(x, ("bacth", "length"), layout)
        jax.eval_shape(constrain, jnp.zeros((8, 4)))
    with pytest.raises(InputError, match="given 1 logical axes"):
        sharding.constrain(jnp.zeros((8, 4)), ("batch",), layout)


def test_constrain_refuses_an_axis_that_the_mesh_does_not_divide():
    layout = Layout(sharding.make_mesh(MeshConfig(tensor=4)))
    with pytest.raises(InputError, match="axis 'heads' of size 6.*tensor=4.*multiple of 4$"):
        sharding.constrain(jnp.zeros((8, 6)), ("batch", "heads"), layout)


@pytest.mark.parametrize("manual", [{"fsdp"}, set(sharding.AXES)], ids=["over one axis", "over all axes"])
def test_constrain_inside_a_shard_map_is_an_error_and_beside_it_is_not(manual):
    """jax itself takes some of these in silence (check_vma=False) and refuses others in words about its internals."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4))
    rows, x = PartitionSpec("fsdp"), jnp.arange(16.0).reshape(16, 1)
    within = lambda layout: jax.shard_map(
        lambda part: sharding.constrain(2 * part, ("batch", None), layout),
        mesh=mesh, in_specs=rows, out_specs=rows, axis_names=manual,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"\('batch', None\)\) inside a shard_map over .*fsdp.*shape \(8, 1\)"):
        jax.jit(within(Layout(mesh)))(x)
    before_and_after = lambda x: sharding.constrain(
        within(Layout())(sharding.constrain(x, ("batch", None), Layout(mesh))), ("batch", None), Layout(mesh)
    )
    np.testing.assert_array_equal(jax.jit(before_and_after)(x), 2 * x)


def test_constraints_reach_the_compiler():
    """Counted in the lowered program: a constraint outside of jax's mesh context silently vanishes in flax."""
    config = tiny()
    params, ids = models.abstract(config), jax.ShapeDtypeStruct((8, 16), jnp.int32)

    def constraints(layout):
        return models.forward.lower(config, params, ids, layout=layout).as_text().count("@Sharding") + (
            models.forward.lower(config, params, ids, layout=layout).as_text().count("sdy.sharding_constraint")
        )

    assert constraints(Layout()) == 0
    assert constraints(Layout(sharding.make_mesh(MeshConfig()))) >= 8


def test_looking_up_the_embedding_moves_the_table_and_not_the_activations(capfd):
    """The compiler warns of an 'involuntary full rematerialization' where a gather from split columns defeats it."""
    config, layout = tiny(), Layout(sharding.make_mesh(MeshConfig(fsdp=2, context=2, tensor=2)))
    params = models.init(config, jax.random.key(0), mesh=layout.mesh)
    loss = lambda params, ids: models.sequence_log_probs(config, params, ids, layout=layout).mean()
    ids = jax.device_put(jnp.ones((8, 16), jnp.int32), layout.sharding(("batch", "length"), (8, 16)))
    jax.jit(jax.grad(loss)).lower(params, ids).compile()
    assert "rematerialization" not in capfd.readouterr().err


def test_parameters_leave_init_as_plain_arrays():
    params = models.init(tiny(), jax.random.key(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert all(type(key) is str for path, _ in jax.tree.leaves_with_path(params) for key in [path[-1].key])


def test_put_gives_every_device_its_rows():
    layout = Layout(sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2)))
    rows = np.arange(8 * 4).reshape(8, 4)
    where = layout.sharding(("batch", "length"), rows.shape)
    struct = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=where)
    assert sharding.share(struct) == dict(process_index=0, process_count=1)
    array = sharding.put(rows, struct)
    np.testing.assert_array_equal(array, rows)
    assert array.addressable_shards[0].data.shape == (2, 2)


@pytest.mark.parametrize("sizes, within, across", [
    ((2, 4, 1, 1, 2), [1, 4, 1, 1, 2], [2, 1, 1, 1, 1]), ((4, 2, 1, 1, 1), [2, 2, 1, 1, 1], [2, 1, 1, 1, 1]),
    ((1, 8, 1, 1, 2), [1, 4, 1, 1, 2], [1, 2, 1, 1, 1]),
])  # fmt: skip
def test_one_axis_goes_from_slice_to_slice(sizes, within, across):
    assert sharding._over_slices(sizes, 2) == (within, across)


def test_slices_that_no_batch_axis_can_join_are_refused():
    with pytest.raises(InputError, match="data=1, fsdp=3 over 2 slices; expected one of them to be a multiple of that"):
        sharding._over_slices((1, 3, 1, 1, 4), 2)
