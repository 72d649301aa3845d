"""Prompts from held-out rows, against the conversations and texts that the rows were made of."""

import numpy as np
import pytest

from qwen_jax import tokenizer
from qwen_jax.data import conversations, packing, prompts

TOK = tokenizer.train((f"{n} plus {m}" for n in range(40) for m in range(9)), 262)
CHATS = [
    [{"role": "user", "content": f"{n} plus 1?"}, {"role": "assistant", "content": f"It is {n + 1}<|im_end|>, yes."}]
    for n in range(6)
]  # fmt: skip


def rows(chats, loss):
    made = conversations.chat_documents(chats, TOK, generation="qwen2", loss=loss)
    return packing.PackedRows(made.documents, 256)


@pytest.mark.parametrize("loss", tokenizer.chat.LOSSES)
def test_a_chat_is_asked_up_to_its_answer_under_every_loss_mask(loss):
    found = prompts.from_rows({"chats": rows(CHATS, loss)}, 6, longest=200)
    asked = [tokenizer.chat.render(chat[:1], TOK, generation="qwen2", add_generation_prompt=True)[0] for chat in CHATS]
    assert sorted(prompt.ids for prompt in found) == sorted(asked)
    for prompt in found:
        chat = CHATS[asked.index(prompt.ids)]
        answer = [*TOK.encode(chat[1]["content"]), TOK.special_tokens["<|im_end|>"]]
        assert prompt.answer[: len(answer)] == answer and prompt.domain == "chats"


def test_a_text_is_asked_after_its_first_tokens():
    texts = ["1 plus 2 " * 20, "7 plus", "8"]
    rows = packing.PackedRows(conversations.text_documents(texts, TOK).documents, 128)
    found = {tuple(prompt.ids): prompt.answer for prompt in prompts.from_rows({"": rows}, 9, longest=200)}
    end = TOK.special_tokens["<|endoftext|>"]
    for text in texts:
        ids = [*TOK.encode(text), end]
        given = min(prompts.TEXT_PROMPT, len(ids) // 2)
        assert found.pop(tuple(ids[:given])) == ids[given:]
    assert not found


def test_domains_take_turns_and_long_prompts_are_passed_over():
    long = [[{"role": "user", "content": "1 plus " * 40}, CHATS[0][1]]]
    parts = {"a": rows(CHATS[:3], "assistant"), "b": rows(CHATS[3:4] + long, "assistant")}
    assert [prompt.domain for prompt in prompts.from_rows(parts, 9, longest=99)] == ["a", "b", "a", "a"]
    assert [prompt.domain for prompt in prompts.from_rows(parts, 9, longest=256)] == ["a", "b", "a", "b", "a"]
    assert [prompt.domain for prompt in prompts.from_rows(parts, 3, longest=99)] == ["a", "b", "a"]
    assert prompts.from_rows({"c": [packing.row((), 8)]}, 3, longest=99) == []


def test_the_longest_run_of_learned_tokens_is_found():
    for seed in range(50):
        flags = np.random.default_rng(seed).random(12) < 0.6
        runs = [
            (stop - start, -start) for start in range(12) for stop in range(start + 1, 13) if flags[start:stop].all()
        ]
        length, start = max(runs, default=(0, 0))
        assert prompts._longest_run(flags) == ((-start, -start + length) if runs else (0, 0))
