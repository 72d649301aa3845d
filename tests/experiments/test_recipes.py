"""Every experiment: its smoke takes two steps and agrees on every mesh, its published recipes resolve at full size."""

import dataclasses

import jax
import pytest

from experiments import pretrain, quickstart, sft
from qwen_jax import sharding
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import metrics
from tests.conftest import MESHES

TRAINING = {"pretrain": pretrain, "sft": sft}
FULL_SIZE = [(name, recipe) for name, module in TRAINING.items() for recipe in module.RECIPES if recipe != "smoke"]


def losses(folder):
    return [(row.get("loss"), row.get("validation/loss")) for row in metrics.read(folder)]


@pytest.fixture(scope="module", params=TRAINING)
def alone(request, tmp_path_factory):
    """A smoke run on a mesh of one device in use: everything on the data axis would still be split, so size 1."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    module = TRAINING[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: [jax.local_devices()[0]])
        module.run(module.smoke(), folder, "smoke")
    return module, losses(folder)


@pytest.mark.parametrize("mesh", MESHES)
def test_smoke_trains_alike_on_every_mesh(alone, mesh, tmp_path):
    module, expected = alone
    config = dataclasses.replace(module.smoke(), mesh=MESHES[mesh])
    module.run(config, tmp_path / "run", "smoke")
    found = losses(tmp_path / "run")
    assert len(found) == len(expected) == 4
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert (tmp_path / "run" / "report.md").read_text().startswith("# ")
    assert (tmp_path / "run" / "plots" / "loss.png").stat().st_size > 5000


def test_quickstart_smoke_reaches_its_report(tmp_path, capsys):
    config = quickstart.smoke()
    one = MeshConfig(data=-1, fsdp=1)
    config = dataclasses.replace(
        config, pretrain=dataclasses.replace(config.pretrain, mesh=one), sft=dataclasses.replace(config.sft, mesh=one)
    )
    quickstart.run(config, tmp_path / "run", "smoke")
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| pretrain |" in text and "| sft |" in text and "| What is 3 plus 4? |" in text
    assert "done: " in capsys.readouterr().out


@pytest.mark.parametrize("name, recipe", FULL_SIZE)
def test_recipes_resolve_at_full_size_without_touching_a_device(name, recipe):
    config = TRAINING[name].RECIPES[recipe]()
    built = TRAINING[name].build(
        config, sharding.make_mesh(MeshConfig(fsdp=2, tensor=4) if "qwen" in recipe else MeshConfig(data=2, fsdp=4))
    )
    state, figures = jax.eval_shape(built.train_step, built.state, built.batch)
    jax.tree.map(lambda new, old: new.shape == old.shape or pytest.fail(f"{new} {old}"), state, built.state)
    assert figures["loss"].shape == ()


def test_a_row_longer_than_the_model_can_read_is_refused():
    config = dataclasses.replace(pretrain.smoke(), length=2048)
    with pytest.raises(InputError, match="length is 2048, over model.max_position_embeddings 1024"):
        pretrain.build(config, sharding.make_mesh(MeshConfig()))


def test_fine_tuning_needs_a_base_that_is_one(tmp_path):
    config = dataclasses.replace(sft.smoke(), base="")
    with pytest.raises(InputError, match="--base is missing"):
        sft.run(config, tmp_path / "run", "smoke")
    with pytest.raises(
        InputError, match="nowhere/config.json is missing; expected a Hugging Face folder or the workdir"
    ):
        sft.run(dataclasses.replace(config, base="nowhere"), tmp_path / "run", "smoke")
    assert not (tmp_path / "run").exists()


def test_an_unknown_dataset_is_told_the_known_ones(tmp_path):
    config = dataclasses.replace(pretrain.smoke(), dataset="chitchatt")
    with pytest.raises(InputError, match="'chitchatt'; expected one of chitchat, made-up"):
        pretrain.run(config, tmp_path / "run", "smoke")
