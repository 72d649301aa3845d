"""The model is the published one: equal to a naive numpy decoder, causal, blind across documents, same on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, sharding
from qwen_jax.sharding import Layout, MeshConfig
from tests.conftest import tiny
from tests.models import oracle


def perturbed(config, seed=0):
    """Parameters with no zeros or ones left, so that a forgotten bias or scale shows."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda x: jnp.asarray(draw(0.02, 0.15, x.shape), x.dtype),
        models.abstract(config),
    )


def tokens(config, shape, seed=7):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


def test_logits_equal_the_naive_decoder(family):
    params, ids = perturbed(family), tokens(family, (2, 9))
    expected = np.stack([oracle.logits(family, params, np.asarray(row)) for row in ids])
    np.testing.assert_allclose(models.forward(family, params, ids), expected, atol=1e-4, rtol=1e-4)


def test_packed_documents_equal_documents_alone(family):
    params = perturbed(family)
    first, second = tokens(family, (1, 5), 1), tokens(family, (1, 6), 2)
    pad = jnp.zeros((1, 3), jnp.int32)
    row = jnp.concatenate([pad, first, second, pad], axis=1)
    ids = jnp.array([[0] * 3 + [1] * 5 + [2] * 6 + [0] * 3])
    packed = models.forward(family, params, row, segment_ids=ids)
    np.testing.assert_allclose(packed[:, 3:8], models.forward(family, params, first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 8:14], models.forward(family, params, second), atol=1e-5)
    assert np.isfinite(packed).all()


def test_no_token_sees_a_later_one(family):
    params, ids = perturbed(family), tokens(family, (1, 8))
    changed = ids.at[0, 5].set((ids[0, 5] + 1) % family.vocab_size)
    before, after = models.forward(family, params, ids), models.forward(family, params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


@pytest.mark.parametrize("change", [dict(scan_layers=False), dict(remat="dots"), dict(remat="full")], ids=str)
def test_how_it_is_computed_changes_nothing(change):
    config = tiny(num_hidden_layers=3)
    params, ids = perturbed(config), tokens(config, (2, 8))
    loss = lambda config: lambda params: models.sequence_log_probs(config, params, ids).mean()
    expected = jax.jit(jax.value_and_grad(loss(config)))(params)
    found = jax.jit(jax.value_and_grad(loss(config.replace(**change))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_remat_full_keeps_less_than_none():
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def temporary_bytes(remat):
        config = tiny(num_hidden_layers=8, remat=remat)
        loss = lambda params, ids: models.sequence_log_probs(config, params, ids).mean()
        compiled = jax.jit(jax.grad(loss)).lower(models.abstract(config), ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.5 * temporary_bytes("none")


def test_remat_dots_runs_attention_once():
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)  # long enough for blocks, which are loops

    def loops(remat):
        loss = lambda params, ids: models.sequence_log_probs(tiny(remat=remat), params, ids).mean()
        return jax.jit(jax.grad(loss)).lower(models.abstract(tiny()), ids).as_text().count("stablehlo.while")

    assert loops("dots") == loops("none") < loops("full")


@pytest.mark.parametrize("how", ["stacked", "fused and stacked", "fused and apart"])
def test_cached_decoding_equals_the_full_forward(family, how):
    params, ids = perturbed(family), tokens(family, (2, 8))
    config, L, S = family.replace(scan_layers=how != "fused and apart"), family.num_hidden_layers, 12
    slots = jnp.zeros((2, config.num_key_value_heads, S, config.head_dim))
    kv = jnp.stack([slots] * L) if config.scan_layers else (slots,) * L
    empty = jnp.zeros((2, S), jnp.int32)
    cache = models.KVCache(kv, kv, empty, empty, jnp.int32(0))
    expected = models.hidden_states(config, params, ids)
    if how != "stacked":
        params = models.fuse(config, params)["decoder"]
    hidden, start, apply = [], 0, jax.jit(models.Decoder(config, fused=how != "stacked").apply)
    for stop in (5, 6, 8):  # a prompt, one token, two tokens
        position = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        piece = ids[:, start:stop]
        out, cache, _ = apply({"params": params}, piece, position, jnp.ones_like(piece), cache)
        hidden.append(out)
        start = stop
    np.testing.assert_allclose(jnp.concatenate(hidden, axis=1), expected, atol=1e-5)
    assert int(cache.index) == 8


@pytest.mark.parametrize("scan", [True, False])
def test_fused_parameters_keep_every_number_and_name_every_axis(family, scan):
    config = family.replace(scan_layers=scan)
    shapes = jax.eval_shape(lambda params: models.fuse(config, params), models.abstract(config))
    axes = models.fused_axes(config, models.axes(config))
    jax.tree.map(lambda struct, names: [len(struct.shape)] == [len(names)] or pytest.fail(f"{names}"), shapes, axes)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    tied = shapes["head"].size if config.tie_word_embeddings else 0
    assert count(shapes) == count(models.abstract(config)) + tied


def test_any_mesh_computes_what_one_device_computes(family_on_mesh):
    family, mesh = family_on_mesh
    params, ids = perturbed(family), tokens(family, (8, 16))
    grad = lambda layout: jax.jit(jax.value_and_grad(
        lambda params: models.sequence_log_probs(family, params, ids, layout=layout).mean()
    ))  # fmt: skip
    expected, found = grad(Layout())(params), grad(Layout(mesh))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def tensor_axis(size):
    return Layout(sharding.make_mesh(MeshConfig(tensor=size), jax.devices()[:size]))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("what", ["log_probs and gradients", "forward"])
def test_each_tensor_device_does_its_share_of_the_head(what, tied):
    """The compiler's count of one device's work. The vocabulary is so large that the head is nearly all of it."""
    config = tiny(vocab_size=8192, num_hidden_layers=1, num_key_value_heads=4, tie_word_embeddings=tied)

    def flops(layout):
        params, ids = models.abstract(config), jax.ShapeDtypeStruct((4, 16), jnp.int32)
        if layout.mesh is not None:
            where = sharding.tree_shardings(models.axes(config), params, layout)
            params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, where)
        if what == "forward":
            lowered = models.forward.lower(config, params, ids, layout=layout)
        else:
            loss = lambda params, ids: models.log_probs(config, params, ids, ids, layout=layout).sum()
            lowered = jax.jit(jax.value_and_grad(loss)).lower(params, ids)
        return lowered.compile().cost_analysis()["flops"]

    assert flops(Layout()) / flops(tensor_axis(4)) > 3.5  # 4, less what every device does: norms, one-hot targets


def test_a_tied_head_that_the_mesh_does_not_divide_is_computed_whole():
    config = tiny(vocab_size=250, num_key_value_heads=4)
    params, ids = perturbed(config), tokens(config, (2, 8))
    for function in (models.forward, models.sequence_log_probs):
        expected, found = function(config, params, ids), function(config, params, ids, layout=tensor_axis(4))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_parameters_do_not_depend_on_the_mesh_and_are_split_by_it(family_on_mesh):
    """To the bit, compiled as for users: under the tests' own preset two programs may round the last digit apart."""
    family, mesh = family_on_mesh
    key, as_for_users = jax.random.key(0), {"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"}
    made = lambda mesh: jax.jit(functools.partial(models.init, family, mesh=mesh)).lower(key)
    alone, split = (made(where).compile(compiler_options=as_for_users)(key) for where in (None, mesh))
    jax.tree.map(np.testing.assert_array_equal, alone, split)
    kernel = split["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == kernel.size


def test_dtype_is_computed_in_and_param_dtype_is_stored():
    config = tiny(dtype="bfloat16", param_dtype="float32")
    params = models.init(config, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert models.hidden_states(config, params, tokens(config, (1, 4))).dtype == jnp.bfloat16
    assert models.forward(config, params, tokens(config, (1, 4))).dtype == jnp.float32


def test_every_parameter_has_one_name_per_axis(family):
    shapes, axes = models.abstract(family), models.axes(family)
    jax.tree.map(lambda struct, names: [len(struct.shape)] == [len(names)] or pytest.fail(f"{names}"), shapes, axes)
    assert axes["layers"]["attention"]["q"]["kernel"] == ("layers", "embed", "heads", "head_dim")
