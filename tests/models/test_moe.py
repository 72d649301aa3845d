"""Models with experts: the naive decoder, decoding with a cache, any mesh, layers of two kinds, bad meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, rollout, sharding
from qwen_jax.errors import InputError
from qwen_jax.models.stacks import stacks
from qwen_jax.sharding import Layout, MeshConfig
from tests.conftest import MOE_FAMILIES, tiny
from tests.models import oracle, test_decoder
from tests.models.test_decoder import perturbed, tokens

MESHES = [
    MeshConfig(fsdp=2, expert=4),
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(expert=2, fsdp=2, context=2),
    MeshConfig(expert=1, fsdp=2, context=2, tensor=2),
]
each_kind = pytest.mark.parametrize("name", MOE_FAMILIES)


@each_kind
def test_logits_equal_the_naive_decoder(name):
    config = MOE_FAMILIES[name]
    params, ids = perturbed(config), tokens(config, (2, 9))
    expected = np.stack([oracle.logits(config, params, np.asarray(row)) for row in ids])
    np.testing.assert_allclose(models.forward(config, params, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, how", [
    ("qwen2-moe-first-dense", "fused and stacked"), ("qwen3-moe-some-dense", "fused and stacked"),
    ("qwen3-moe-some-dense", "fused and apart"), ("qwen2-moe", "fused and apart"),
])  # fmt: skip
def test_cached_decoding_equals_the_full_forward(name, how):
    test_decoder.test_cached_decoding_equals_the_full_forward(MOE_FAMILIES[name], how)


@pytest.mark.parametrize("name", ["qwen2-moe-first-dense", "qwen3-moe-some-dense"])
@pytest.mark.parametrize("scan", [True, False])
def test_fused_parameters_keep_every_number_and_name_every_axis(name, scan):
    test_decoder.test_fused_parameters_keep_every_number_and_name_every_axis(MOE_FAMILIES[name], scan)


@each_kind
def test_every_parameter_has_one_name_per_axis(name):
    shapes, axes = models.abstract(MOE_FAMILIES[name]), models.axes(MOE_FAMILIES[name])
    jax.tree.map(lambda struct, names: [len(struct.shape)] == [len(names)] or pytest.fail(f"{names}"), shapes, axes)


def test_greedy_answers_are_those_of_the_full_forward():
    config = MOE_FAMILIES["qwen2-moe-first-dense"]
    params, prompts = perturbed(config), [[5, 6, 7], [9] * 11]
    answers = rollout.generate(config, params, prompts, jax.random.key(0), max_new_tokens=4, temperature=0).tokens
    for prompt, answer in zip(prompts, np.asarray(answers), strict=True):
        row = jnp.asarray([prompt + answer.tolist()])
        best = models.forward(config, params, row)[0].argmax(-1)
        np.testing.assert_array_equal(best[len(prompt) - 1 : -1], answer)


@pytest.fixture(scope="module", params=["qwen2-moe-first-dense", "qwen3-moe-some-dense"])
def on_one_device(request):
    config = MOE_FAMILIES[request.param]
    params, ids = perturbed(config), tokens(config, (8, 16))
    segment_ids = jnp.asarray(np.repeat([[1, 2, 0]], 8, axis=0).repeat([7, 6, 3], axis=1))
    arguments = config, params, ids, segment_ids
    return arguments, differentiated(*arguments, Layout())


def differentiated(config, params, ids, segment_ids, layout):
    """Losses, router sums, and the gradient of a function of both."""

    def loss(params):
        log_probs, routing = models.log_probs_and_routing(
            config, params, ids, jnp.roll(ids, -1, 1), segment_ids=segment_ids, layout=layout
        )
        chosen = jnp.where(segment_ids > 0, log_probs, 0.0).mean()
        return chosen + jnp.sin(routing.probs).mean() + 0.01 * routing.z.mean(), routing

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("cut", range(2))
def test_any_mesh_computes_what_one_device_computes(on_one_device, cut):
    arguments, expected = on_one_device
    cut = MESHES[2 * cut + (arguments[0].shared_expert_intermediate_size > 0)]  # each mesh under one of the models
    found = differentiated(*arguments, Layout(sharding.make_mesh(cut)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


def test_router_sums_count_each_token_of_a_document_once_a_choice():
    config = MOE_FAMILIES["qwen3-moe-some-dense"]
    ids = tokens(config, (2, 9))
    segment_ids = jnp.ones((2, 9), jnp.int32).at[1, 4:].set(0)
    routing = models.log_probs_and_routing(config, perturbed(config), ids, ids, segment_ids=segment_ids)[1]
    assert routing.counts.shape == (2, 2, config.num_experts)  # layers with experts, rows, experts
    np.testing.assert_array_equal(routing.tokens, [[9, 4]] * 2)
    np.testing.assert_allclose(routing.counts.sum(-1), 3 * routing.tokens)
    np.testing.assert_allclose(routing.probs.sum(-1), routing.tokens, rtol=1e-5)
    assert models.log_probs_and_routing(tiny(), perturbed(tiny()), ids, ids)[1] is None


@pytest.mark.parametrize("change", [dict(scan_layers=False), dict(remat="full")], ids=str)
def test_how_it_is_computed_changes_nothing(on_one_device, change):
    (config, *rest), expected = on_one_device
    found = differentiated(config.replace(**change), *rest, Layout())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@pytest.mark.parametrize("fields, expected", [
    (dict(num_hidden_layers=4), [("layers", (True,), 4)]),
    (dict(num_hidden_layers=6, decoder_sparse_step=3), [("layers", (False, False, True), 2)]),
    (dict(num_hidden_layers=4, mlp_only_layers=(0,)), [("layers_0", (False,), 1), ("layers_1", (True,), 3)]),
    (dict(num_hidden_layers=5, decoder_sparse_step=2), [("layers_0", (False, True), 2), ("layers_1", (False,), 1)]),
], ids=str)  # fmt: skip
def test_layers_are_scanned_by_the_longest_repetition(fields, expected):
    config = MOE_FAMILIES["qwen3-moe"].replace(**fields)
    found = stacks(config)
    assert [(stack.name, stack.sparse, stack.repeats) for stack in found] == expected
    layers = {
        layer: kind for stack in found for place, kind in enumerate(stack.sparse) for layer in stack.layers(place)
    }
    assert layers == {layer: config.is_sparse(layer) for layer in range(config.num_hidden_layers)}


def test_experts_that_the_mesh_does_not_divide_are_refused_by_name():
    config, mesh = MOE_FAMILIES["qwen3-moe"].replace(num_experts=6), sharding.make_mesh(MeshConfig(expert=4))
    with pytest.raises(InputError, match="moe/.*'experts' of size 6 cannot be split over mesh axes expert=4"):
        models.init(config, jax.random.key(0), mesh=mesh)
    with pytest.raises(InputError, match="experts' gate: axis 'experts' of size 6"):
        models.forward(config, perturbed(config), tokens(config, (8, 4)), layout=Layout(mesh))
