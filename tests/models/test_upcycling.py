"""Upcycling: every neuron is where it should be, whole; plain sparse upcycling keeps the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, sharding
from qwen_jax.errors import InputError
from qwen_jax.models import upcycling
from tests.conftest import tiny
from tests.models.test_decoder import perturbed, tokens

DENSE = tiny(tie_word_embeddings=False)  # 2 layers, MLP 48 wide
FINE = DENSE.replace(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=56)
COPIES = DENSE.replace(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)
KEY = jax.random.key(3)


def upcycled(moe=FINE, **how):
    params = perturbed(DENSE)
    return params, models.upcycle(DENSE, params, moe, KEY, **how)


def test_the_tree_is_that_of_the_model_and_all_but_the_mlps_is_the_dense_models():
    dense, moe = upcycled()
    expected = models.abstract(FINE)
    jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype) or pytest.fail(f"{x.shape} {s}"), moe, expected)
    for name in ("embedding", "head", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, moe[name], dense[name])
    for name in ("attention", "attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, moe["layers"][name], dense["layers"][name])


@pytest.mark.parametrize("how", [dict(), dict(shuffle=False), dict(reinitialize=0.0)], ids=str)
def test_every_neuron_is_its_origin_whole_or_new(how):
    dense, moe = upcycled(**how)
    mlp, experts = jax.tree.map(np.asarray, (dense["layers"]["mlp"], moe["layers"]["moe"]))
    origin = np.asarray(upcycling.origins(DENSE, FINE, KEY, **how))
    for layer, expert, i in np.ndindex(origin.shape):
        mine = (
            experts["gate"][layer, expert, :, i],
            experts["up"][layer, expert, :, i],
            experts["down"][layer, expert, i],
        )
        n = origin[layer, expert, i]
        theirs = mlp["gate"]["kernel"][layer, :, n], mlp["up"]["kernel"][layer, :, n], mlp["down"]["kernel"][layer, n]
        same = [np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)]
        assert not any(same) if n == upcycling.NEW else all(same)


def test_experts_are_cut_from_the_copies_one_behind_the_other():
    origin = np.asarray(upcycling.origins(DENSE, FINE, KEY, shuffle=False, reinitialize=0.0))
    np.testing.assert_array_equal(origin.reshape(2, -1), [np.arange(8 * 20) % 48] * 2)  # the last 32 are discarded
    shuffled = np.asarray(upcycling.origins(DENSE, FINE, KEY, reinitialize=0.0)).reshape(2, -1)
    orders = [row[start : start + 48] for row in shuffled for start in (0, 48, 96)]
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6  # each copy of each layer has an order of its own


def test_half_of_each_expert_is_new_with_the_models_spread():
    dense, moe = upcycled()
    origin = np.asarray(upcycling.origins(DENSE, FINE, KEY))
    assert ((origin == upcycling.NEW).sum(-1) == 10).all()
    assert (
        len({tuple(row) for row in (origin == upcycling.NEW).reshape(-1, 20)}) == 16
    )  # not the same places everywhere
    new = np.moveaxis(np.asarray(moe["layers"]["moe"]["gate"]), 2, -1)[origin == upcycling.NEW]
    assert abs(new.std() / FINE.initializer_range - 1) < 0.05 and abs(new.mean()) < 2e-3
    router = np.asarray(moe["layers"]["moe"]["router"])
    assert abs(router.std() / FINE.initializer_range - 1) < 0.15
    assert not np.array_equal(router[0], router[1])


def test_the_shared_expert_holds_dense_neurons_in_turn():
    dense, moe = upcycled(shuffle=False)
    kernel = lambda name: np.asarray(dense["layers"]["mlp"][name]["kernel"])
    shared = jax.tree.map(np.asarray, moe["layers"]["moe"]["shared"])
    order = np.arange(56) % 48
    np.testing.assert_array_equal(shared["up"]["kernel"], kernel("up")[:, :, order])
    np.testing.assert_array_equal(shared["down"]["kernel"], kernel("down")[:, order])


@pytest.mark.parametrize("changes", [dict(), dict(decoder_sparse_step=2), dict(mlp_only_layers=(0,))], ids=str)
def test_experts_that_are_the_dense_mlp_keep_the_function(changes):
    moe = COPIES.replace(**changes)
    dense, params = upcycled(moe, shuffle=False, reinitialize=0.0)
    ids = tokens(DENSE, (2, 9))
    expected = models.forward(DENSE, dense, ids)
    np.testing.assert_allclose(models.forward(moe, params, ids), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    shuffled = models.upcycle(DENSE, dense, moe, KEY, reinitialize=0.0)  # the order of neurons changes nothing
    np.testing.assert_allclose(models.forward(moe, shuffled, ids), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    changed = models.forward(moe, models.upcycle(DENSE, dense, moe, KEY), ids)
    assert jnp.abs(changed - expected).max() > 1e-3


def test_a_mesh_and_fewer_rows_of_the_vocabulary():
    moe = FINE.replace(vocab_size=240)
    alone = models.upcycle(DENSE, perturbed(DENSE), moe, KEY)
    mesh = sharding.make_mesh(sharding.MeshConfig(expert=4, fsdp=2))
    split = models.upcycle(DENSE, perturbed(DENSE), moe, KEY, mesh=mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone, split)
    assert split["layers"]["moe"]["up"].addressable_shards[0].data.shape == (2, 2, 16, 20)
    np.testing.assert_array_equal(alone["head"], perturbed(DENSE)["head"][:240])


@pytest.mark.parametrize("dense, moe, how, says", [
    (DENSE, FINE.replace(moe_intermediate_size=49), {}, "8 experts of moe_intermediate_size 49 .* dense .* 6 to 48"),
    (DENSE, FINE.replace(moe_intermediate_size=5), {}, "8 experts of moe_intermediate_size 5 do not fit"),
    (DENSE, FINE.replace(hidden_size=64), {}, "hidden_size is 32 in the dense model and 64"),
    (DENSE, FINE.replace(decoder_sparse_step=2, intermediate_size=64), {}, "intermediate_size is 48 .* and 64"),
    (DENSE, FINE.replace(vocab_size=300), {}, "vocab_size 300 is more"),
    (DENSE, DENSE, {}, "num_experts 0 to 0"), (FINE, FINE, {}, "num_experts 8 to 8"),
    (DENSE, FINE, dict(reinitialize=50), "reinitialize is 50"),
], ids=str)  # fmt: skip
def test_models_that_do_not_fit_are_refused_by_field(dense, moe, how, says):
    with pytest.raises(InputError, match=says):
        models.upcycle(dense, {}, moe, KEY, **how)
