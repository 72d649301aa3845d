"""Data that is gone: before a run goes on it is one line, in the middle of a run it is not missed."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import sft
from qwen_jax import sharding, tokenizer
from qwen_jax.data import sources
from qwen_jax.errors import InputError
from qwen_jax.training import checkpoint, metrics, supervised

RUN = dataclasses.replace(sft.smoke(), dataset="chats.jsonl", validation_dataset="held_out.jsonl")


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A run on files that, and whose cached tokens, are gone when its first step begins."""
    folder = tmp_path_factory.mktemp("lost")
    for name, split in (("chats", "train"), ("held_out", "validation")):
        lines = (json.dumps({"messages": chat}) for chat in sources.load("made-up", split))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    fit, read = supervised.fit, {}

    def fit_without(built, train, validation, *args, **options):
        shutil.rmtree(folder / "cache")
        (folder / "chats.jsonl").unlink()
        read.update(train=[*train], validation=validation["held_out"])
        return fit(built, train, validation, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("QWEN_JAX_CACHE", str(folder / "cache"))
        patch.setattr(sharding.jax, "devices", lambda: jax.local_devices()[:1])
        patch.setattr(supervised, "fit", fit_without)
        sft.run(RUN, folder / "lost", "smoke")
        yield folder / "lost", read


def test_in_the_middle_of_a_run_they_are_not_missed(lost):
    """Rows hold on to their tokens: they are those of the same chats in memory, which no file can take away."""
    folder, read = lost
    kept = dict.fromkeys(["dataset", "validation_dataset"], "made-up")
    train, validation = sft.rows(dataclasses.replace(RUN, **kept), tokenizer.load(folder / "tokenizer"))
    for found, expected in ((read["train"], train), (read["validation"], validation["made-up"])):
        assert len(found) == len(expected)
        jax.tree.map(np.testing.assert_array_equal, found, [*expected])
    assert [row["step"] for row in metrics.read(folder)] == [0, 1, 1, 2, 2]


def test_before_a_run_goes_on_they_are_missed_in_a_line_and_its_checkpoint_loads(lost):
    folder, _ = lost
    with pytest.raises(InputError, match=r"chats\.jsonl") as told:
        sft.run(RUN, folder, "smoke")
    assert "\n" not in str(told.value)
    config, params = checkpoint.load_params(folder)
    assert params["embedding"].shape == (config.vocab_size, config.hidden_size)
