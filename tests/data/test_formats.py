"""Formats: each is recognised and read as what it says, and what cannot be learned from is told by kind."""

import contextlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_jax.data import formats
from qwen_jax.data.formats import BadRecord

U, A, S = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("system", "s")))

RECORDS = {
    "messages": {"messages": [S, U, A]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
    "qwen": {
        "id": "1",
        "conversations": [{"from": n, "value": v} for n, v in (("system", "s"), ("user", "q"), ("assistant", "a"))],
    },
}


def read(record, format=None):
    return formats.conversation(record, format or formats.detect(record))


@pytest.mark.parametrize("name", formats.NAMES)
def test_each_format_is_recognised_and_read_alike(name):
    assert formats.detect(RECORDS[name]) == name
    assert read(RECORDS[name]) == ([S, U, A], None)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ([U, A], [U, A]),
        ({"messages": [U | {"name": "x", "tool_calls": None, "weight": 1}, A | {"id": 3}]}, [U, A]),
        ({"messages": [U | {"content": [{"type": "text", "text": "q"}]}, A]}, [U, A]),
        ({"messages": [S | {"role": "developer"}, U, A]}, [S, U, A]),
        ({"conversations": [U, A]}, [U, A]),
        ({"conversations": [{"from": "gpt", "value": "a"}], "system": ""}, [A]),
        ({"instruction": "q", "input": "more", "output": "a"}, [U | {"content": "q\nmore"}, A]),
        ({"instruction": "q", "history": [["q", "a"]], "output": "a", "input": None}, [U, A, U, A]),
        ({"messages": [U, A | {"reasoning_content": ""}]}, [U, A | {"reasoning_content": ""}]),
        ({"messages": [U, A], "system": "s"}, [S, U, A]),
        ({"messages": [S, U, A], "system": "other"}, [S, U, A]),
    ],
)  # fmt: skip
def test_what_records_in_the_wild_look_like(record, messages):
    assert read(record).messages == messages


def test_tools_and_calls_come_along():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "7"), ("gpt", "a")]
    record = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "tools": json.dumps([{"name": "f"}]),
    }
    messages, tools = read(record)
    assert tools == [{"name": "f"}]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [call]
    openai = {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}, A]}
    assert read(openai).messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (7, "not an object"),
        ({"text": "x"}, "unknown format"),
        ({}, "unknown format"),
        ({"messages": None}, "missing field"),
        ({"messages": "hi"}, "wrong type"),
        ({"messages": []}, "no messages"),
        ({"messages": [U]}, "no answer"),
        ({"messages": [U, "a"]}, "wrong type"),
        ({"messages": [U, {"role": "narrator", "content": "a"}]}, "unknown role"),
        ({"messages": [U, {"role": ["x"], "content": "a"}]}, "unknown role"),
        ({"messages": [U, {"role": "assistant"}]}, "wrong type"),
        ({"messages": [U, {"role": "assistant", "content": " \n"}]}, "empty message"),
        ({"messages": [U, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"messages": [U, A | {"weight": 0}]}, "message not to learn"),
        ({"messages": [U, A], "tools": "{"}, "wrong tools"),
        ({"messages": [U, A], "tools": [1]}, "wrong tools"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}, "wrong type"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "wrong call"),
        ({"conversations": {"from": "gpt"}}, "wrong type"),
        ({"instruction": "q"}, "missing field"),
        ({"instruction": "", "output": "a"}, "empty message"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "wrong type"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a pair"),
    ],
)
def test_what_cannot_be_learned_from_is_told_by_kind(record, kind):
    with pytest.raises(BadRecord) as error:
        read(record)
    assert error.value.kind == kind and str(error.value).startswith(f"{kind}: ") and "\n" not in str(error.value)


def test_a_record_is_held_to_the_format_that_was_named():
    with pytest.raises(BadRecord, match="expected a list of messages in messages"):
        formats.conversation(RECORDS["sharegpt"], "messages")
    with pytest.raises(BadRecord, match=r"conversations\[0\]: from is 'human'; expected user or assistant"):
        formats.conversation(RECORDS["sharegpt"], "qwen")


GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PAIRS = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "prompt as messages": {"prompt": [U], "chosen": GOOD, "rejected": [BAD]},
    "whole conversations": {"prompt": "q", "chosen": [U, GOOD], "rejected": [U, BAD]},
    "no prompt of its own": {"chosen": [U, GOOD], "rejected": [U, BAD]},
    "a longer prompt": {"prompt": "p", "chosen": [A, U, GOOD], "rejected": [A, U, BAD]},
    "openai": {"messages": [U], "chosen": "good", "rejected": "bad"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
}


def pair(record):
    return formats.pair(record, formats.detect(record))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_in_every_form(name):
    prompt = [U | {"content": "p"}, A, U] if name == "a longer prompt" else [U]
    assert pair(PAIRS[name]) == (prompt, GOOD, BAD, None, None)
    assert pair(PAIRS[name] | {"system": "s"}).prompt == [S, *prompt]


def test_the_margin_is_given_or_the_difference_of_scores():
    assert pair(PAIRS["texts"] | {"margin": 2}).margin == 2
    assert pair(PAIRS["texts"] | {"score_chosen": 7, "score_rejected": 4.5}).margin == 2.5


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (PAIRS["texts"] | {"rejected": "good"}, "equal answers"),
        (PAIRS["texts"] | {"prompt": ""}, "no prompt"),
        (PAIRS["texts"] | {"prompt": None}, "no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
        (PAIRS["texts"] | {"chosen": [U, GOOD, U]}, "wrong answer"),
        ({"chosen": [U, GOOD], "rejected": [U | {"content": "r"}, BAD]}, "no prompt"),
        (PAIRS["texts"] | {"rejected": [{"role": "user", "content": "bad"}]}, "wrong answer"),
        (PAIRS["texts"] | {"rejected": " "}, "empty message"),
        (PAIRS["texts"] | {"margin": "big"}, "wrong type"),
        (RECORDS["alpaca"], "no pair"),
    ],
)
def test_pairs_that_say_nothing_are_told_by_kind(record, kind):
    with pytest.raises(BadRecord) as error:
        pair(record)
    assert error.value.kind == kind


FIELDS = dict.fromkeys([field for record in [*RECORDS.values(), *PAIRS.values()] for field in record])
FIELDS |= dict.fromkeys(("role", "content", "from", "value", "history", "input"))
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*FIELDS]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@example({"messages": None, "chosen": False, "rejected": []})
def test_no_record_whatever_is_more_than_a_bad_one(record):
    for reading in (read, pair):
        with contextlib.suppress(BadRecord):
            assert reading(record)


def test_copies_with_small_touches_are_of_one_hash():
    one, two, other = ([U | {"content": text}, A] for text in ("Hello there!", "hello  there", "hello they're"))
    assert formats.content_hash(one) == formats.content_hash(two) != formats.content_hash(other)
