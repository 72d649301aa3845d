"""Samples of fixed prompts while a model trains: on every mesh those of one device, compiled once; with adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, sharding, tokenizer
from qwen_jax.config import LoraConfig
from qwen_jax.data import conversations, packing
from qwen_jax.errors import InputError
from qwen_jax.rollout import generation
from qwen_jax.sharding import Layout
from qwen_jax.training import samples
from qwen_jax.training.samples import SamplesConfig
from tests.conftest import MESHES, tiny

TOK = tokenizer.train((f"{n} plus {m}" for n in range(40) for m in range(9)), 262)
MODEL = tiny(vocab_size=272, tie_word_embeddings=False, initializer_range=0.3)
CONFIG = SamplesConfig(prompts=3, max_new_tokens=5)
LORA = LoraConfig(rank=2, targets=("q", "down"), row_ids=(TOK.special_tokens["<|im_end|>"],))


@pytest.fixture(scope="module")
def rows():
    chats = [
        [{"role": "user", "content": f"{n} plus 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
        for n in range(4)
    ]
    made = conversations.chat_documents(chats, TOK, generation="qwen2")
    return {"chats": packing.PackedRows(made.documents, 128)}


def params(seed, lora=None):
    """The model, or a base and adapters whose B is not 0 any more."""
    model = models.init(MODEL, jax.random.key(seed))
    if lora is None:
        return (model,)
    adapters = models.lora.init(MODEL, lora, jax.random.key(seed), model)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(noise, adapters), model


@pytest.mark.parametrize("mesh, lora", [("alone", None), ("fsdp2-context2-tensor2", LORA)])
def test_they_are_greedy_answers_of_the_model_compiled_once(rows, mesh, lora):
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    layout = Layout(one if mesh == "alone" else sharding.make_mesh(MESHES[mesh]))
    sample = samples.sampler(MODEL, TOK, rows, config=CONFIG, layout=layout, lora=lora)
    axes = (models.axes(MODEL),) if lora is None else (models.lora.axes(MODEL, lora), models.axes(MODEL))
    place = lambda trees: jax.device_put(trees, sharding.tree_shardings(axes, trees, layout))
    found = [sample(*place(params(seed, lora))) for seed in (0, 1)]
    compiled = generation._run._cache_size()
    found.append(sample(*place(params(2, lora))))
    assert generation._run._cache_size() == compiled
    assert len({str(of_one) for of_one in found}) == 3
    for seed, of_one in enumerate(found):
        trees = params(seed, lora)
        joined = trees[0] if lora is None else models.lora.merge(trees[1], trees[0], lora)
        for made in of_one:
            expected = greedy(joined, TOK.encode(made["prompt"], allowed_special="all"))
            assert made["completion"] == TOK.decode(expected) and made["tokens"] == len(expected)
            assert made["finished"] == (expected[-1] in tokenizer.chat.stop_ids(TOK))
            assert made["domain"] == "chats" and made["reference"].startswith("It is ")


@functools.cache
def reader():
    return jax.jit(functools.partial(models.forward, MODEL))


def greedy(params, ids):
    """The likeliest token of a whole forward pass, again and again."""
    answer = []
    while len(answer) < CONFIG.max_new_tokens and not {*answer[-1:]} & {*tokenizer.chat.stop_ids(TOK)}:
        row = np.zeros((1, 96), np.int32)
        row[0, : len(ids) + len(answer)] = [*ids, *answer]
        logits = reader()(params, jnp.asarray(row))[0, len(ids) + len(answer) - 1, : TOK.vocab_size]
        answer.append(int(jnp.argmax(logits)))
    return answer


def test_without_a_prompt_there_is_no_sampler(rows):
    layout = Layout()
    assert samples.sampler(MODEL, TOK, rows, config=SamplesConfig(prompts=0), layout=layout) is None
    assert samples.sampler(MODEL, TOK, {"": [packing.row((), 8)]}, config=CONFIG, layout=layout) is None
    full = SamplesConfig(max_new_tokens=MODEL.max_position_embeddings)  # no room for a prompt before it
    assert samples.sampler(MODEL, TOK, rows, config=full, layout=layout) is None
    with pytest.raises(InputError, match="samples.prompts is -1; expected at least 0"):
        SamplesConfig(prompts=-1)


def test_files_are_read_back_as_written(tmp_path):
    kept = {step: [{"step": step, "completion": f"你好 {step}\n\u2028"}] for step in (0, 7, 100_000_000)}
    for step, lines in kept.items():
        samples.write(tmp_path, step, [{"completion": line["completion"]} for line in lines])
    assert samples.read(tmp_path) == kept
    assert "你好 7" in (tmp_path / "samples" / "step_00000007.jsonl").read_text("utf-8")
