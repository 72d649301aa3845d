"""Questions of data sets and of tasks, and the host's rewards of answers given as ids."""

import numpy as np
import pytest

from qwen_jax import tokenizer
from qwen_jax.data import preferences
from qwen_jax.errors import InputError
from qwen_jax.rewards import RewardConfig
from qwen_jax.tokenizer import chat
from qwen_jax.training import questions

TOK = tokenizer.train(["What is 3 plus 4? 3 plus 4 is 7."] * 3, 272)
END = TOK.special_tokens["<|im_end|>"]


def rater(*terms, said=None):
    return questions.Rater(RewardConfig(terms), TOK, "qwen2", say=(said if said is not None else []).append)


def test_answers_to_a_task_are_rated_by_what_their_prompt_asked():
    config = RewardConfig(task="sums most=9")
    some = questions.load(questions.TASK, "train", config, most=3)
    source = rater("answer", "unfinished=0.5")
    prompts = source.render(some)
    assert prompts[0] == chat.render(some[0].messages, TOK, generation="qwen2", add_generation_prompt=True)[0]
    right = [TOK.encode(f"It is {one.reference['answer']}.") for one in some]
    found = source([prompts[2], prompts[0], prompts[1]], [[*right[2], END], right[0], [*TOK.encode("It is 99."), END]])
    assert found.tolist() == [1.0, 0.5, 0.0]
    assert source.metrics["reward/answer"] == pytest.approx(2 / 3)


def test_what_a_term_cannot_tell_is_not_finite_and_is_said():
    said = []
    source = rater("unfinished", "tests.rewards.functions:strings", said=said)
    asked = source.render([questions.Question([{"role": "user", "content": "Hi"}])])
    assert np.isnan(source(asked, [[END]])).all() and "reward tests.rewards.functions:strings failed" in said[0]
    source.close()


def test_the_reward_model_is_not_the_hosts():
    source = rater("model")
    asked = source.render([questions.Question([{"role": "user", "content": "Hi"}])])
    assert source(asked, [[END]]).tolist() == [0.0]


def test_answers_begin_with_the_first_words_of_the_data():
    some = questions.load("made-up-pairs", "train", RewardConfig(), most=5, begin=2)
    assert len({(one.messages[0]["content"], one.begin) for one in some}) == len(some) == 5
    told = preferences.beginnings("made-up-pairs", "train", words=2, most=5)
    assert [(messages, begin) for messages, begin in told] == [(one.messages, one.begin) for one in some]
    number, word, *_ = some[0].messages[0]["content"].removeprefix("What is ").split()
    assert some[0].begin == f"{number} {word}"
    ids = rater("unfinished").render(some[:1])[0]
    assert TOK.decode(ids).endswith(f"<|im_start|>assistant\n{some[0].begin}")
    assert preferences.beginnings("made-up-pairs", "train", words=50, most=5) == []


def test_each_source_gives_its_share(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Say a word, please.", "chosen": "Yes, of course.", "rejected": "No."}\n' * 3)
    found = questions.load(f"{path},made-up-pairs", "train", RewardConfig(), most=5)
    assert [one.messages[0]["content"] for one in found].count("Say a word, please.") <= 1 and 2 <= len(found) <= 3
    with pytest.raises(InputError, match="no.such.jsonl"):
        questions.load(str(tmp_path / "no.such.jsonl"), "train", RewardConfig(), most=5)
