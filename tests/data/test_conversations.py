"""Conversations and texts to documents: the right tokens are learned, and what a limit costs is told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.data import conversations
from qwen_jax.data.packing import PackedRows
from qwen_jax.errors import InputError

from . import made_up

TOK = tokenizer.train(["a small text of a few words, and a few words more of a text"], 270)
WORDS = st.text("abc ", min_size=1, max_size=12)


def chat(*contents):
    """Turns that alternate, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def render(messages, **options):
    return conversations.chat_documents([messages], TOK, generation="qwen2", **options)


def learned_text(document):
    return TOK.decode(document.ids[document.loss_mask])


def test_the_assistants_words_and_their_end_are_learned_and_nothing_else():
    made = render(chat("who?", "me", "why?", "because"))
    assert learned_text(made.documents[0]) == "me<|im_end|>because<|im_end|>"
    assert made.documents[0].ids.dtype == np.int32 and made.documents[0].loss_mask.dtype == bool
    assert (
        learned_text(render(chat("who?", "me", "why?", "because"), loss="last-turn").documents[0])
        == "because<|im_end|>"
    )


def test_the_targets_of_a_packed_conversation_are_the_learned_tokens():
    made = conversations.chat_documents([chat("who?", "me"), chat("x", "yes", "y", "no")], TOK, generation="qwen2")
    (row,) = PackedRows(made.documents, 200)
    parts = [TOK.decode(targets[mask > 0]) for _, targets, mask, _ in made_up.segments(row)]
    assert sorted(parts) == ["me<|im_end|>", "yes<|im_end|>no<|im_end|>"]


def test_a_text_is_data_and_ends_with_the_end_of_text_token():
    (document,) = conversations.text_documents(["say <|endoftext|> aloud"], TOK).documents
    assert TOK.decode(document.ids) == "say <|endoftext|> aloud<|endoftext|>"
    assert (document.ids == TOK.special_tokens["<|endoftext|>"]).sum() == 1 and document.loss_mask.all()


def test_plain_text_is_one_message_per_line():
    assert conversations.plain_text(chat("hi\nthere", "hello")) == "hi\nthere\nhello"


def test_truncation_keeps_the_beginning_and_counts_what_it_costs():
    whole = render(chat("who?", "it is me", "why?", "because")).documents[0]
    limit = len(whole.ids) - 4
    made = render(chat("who?", "it is me", "why?", "because"), max_length=limit, too_long="truncate")
    assert (made.documents[0].ids == whole.ids[:limit]).all()
    assert (made.documents[0].loss_mask == whole.loss_mask[:limit]).all()
    assert made._replace(documents=[]) == ([], 0, 1, 0, 0, 4)


def test_a_conversation_cut_before_its_first_answer_is_left_out_and_counted():
    made = render(chat("a long question" * 9, "me"), max_length=30, too_long="truncate")
    assert made.documents == [] and made.dropped_empty == 1 and made.truncated == 0 and made.lost_tokens > 30


SHORT = len(render(chat("a", "b")).documents[0].ids)


def test_dropping_leaves_the_long_ones_out_and_counts_them():
    made = conversations.chat_documents(
        [chat("a", "b"), chat("a", "long" * 50), chat("c", "d")],
        TOK,
        generation="qwen2",
        max_length=SHORT,
        too_long="drop",
    )
    assert [learned_text(d) for d in made.documents] == ["b<|im_end|>", "d<|im_end|>"]
    assert made.dropped_long == 1 and made.lost_tokens > SHORT and "1 dropped as too long" in str(made)


def test_a_sequence_longer_than_the_limit_is_one_line_with_its_number_length_and_ways_out():
    with pytest.raises(InputError) as error:
        conversations.chat_documents(
            [chat("a", "b"), chat("a", "long" * 50)], TOK, generation="qwen2", max_length=SHORT
        )
    assert str(error.value).startswith("conversation 1 has ") and f"the limit is {SHORT}" in str(error.value)
    assert "'truncate' or 'split' or 'drop'" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^text 1 has 6 tokens, the limit is 4: .*'truncate' or 'drop'$"):
        conversations.text_documents(["aa", "zyxwv"], TOK, max_length=4)


@settings(deadline=None, max_examples=50)
@given(st.lists(WORDS, min_size=2, max_size=16), st.integers(5, 60), st.sampled_from([None, "be kind"]))
def test_splitting_loses_no_word_and_every_part_is_a_conversation_that_fits(contents, room, system):
    first = [{"role": "system", "content": system}] if system else []
    limit = len(render([*first, *chat("", "")]).documents[0].ids) + room
    made = render([*first, *chat(*contents)], max_length=limit, too_long="split")
    whole = TOK.decode(render([*first, *chat(*contents)]).documents[0].ids)
    head = whole[: whole.index("<|im_start|>user")]
    texts = [TOK.decode(document.ids) for document in made.documents]
    assert all(text.startswith(head + "<|im_start|>user\n") for text in texts)
    assert all(len(document.ids) <= limit for document in made.documents)
    # At most 12 tokens of two messages and an unanswered third: a part with more room than that is never truncated.
    if room >= 3 * 12 + 8:
        assert made.truncated == made.dropped_empty == made.lost_tokens == 0
        assert head + "".join(text.removeprefix(head) for text in texts) == whole
        # An unanswered last message belongs to the exchange before it; where there is none, no part had room for more.
        for one, two in zip(texts, texts[1:] if len(contents) % 2 == 0 else [], strict=False):
            exchange = two.removeprefix(head).split("<|im_start|>user\n")[1]
            assert len(TOK.encode(one + "<|im_start|>user\n" + exchange, allowed_special="all")) > limit


def test_a_conversation_that_fits_is_not_split():
    made = render(chat("a", "b", "c", "d"), max_length=200, too_long="split")
    (whole,) = render(chat("a", "b", "c", "d")).documents
    assert [d.ids.tolist() for d in made.documents] == [whole.ids.tolist()] and made.split == 0


def test_split_conversations_are_counted_and_only_a_long_exchange_is_truncated():
    limit = len(render(chat("a", "b", "c")).documents[0].ids)
    made = render(chat("a", "b", "c", "d", "e", "long" * 50), max_length=limit, too_long="split")
    *whole, cut = (learned_text(d) for d in made.documents)
    assert whole == ["b<|im_end|>", "d<|im_end|>"] and cut in "long" * 50
    assert made.split == 1 and made.truncated == 1


def test_splitting_holds_the_limit_in_a_template_that_drops_old_thoughts():
    messages = chat(*["a", "b"] * 8)
    messages[1]["reasoning_content"] = "hmm" * 5  # makes the first exchange shorter in company than alone
    made = conversations.chat_documents([messages], TOK, generation="qwen3", max_length=90, too_long="split")
    assert made.truncated == 0 and 1 < len(made.documents) < 8
    assert sum(learned_text(d).count("b<|im_end|>") for d in made.documents) == 8


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"^conversation 1: messages has to be a list of at least one"),
        ([{"role": "bot", "content": "x"}], r"^conversation 1: messages\[0\]: role is 'bot'; "),
        ([{"role": "user", "content": None}], r"^conversation 1: messages\[0\]: content is NoneType"),
    ],
)
def test_a_malformed_conversation_is_named_by_its_number(messages, message):
    with pytest.raises(InputError, match=message):
        conversations.chat_documents([chat("a", "b"), messages], TOK, generation="qwen2")


def test_unknown_ways_and_limits_that_leave_nothing_are_refused():
    with pytest.raises(InputError, match="^too_long is 'cut'; for a conversation it can be truncate, split, "):
        render(chat("a", "b"), too_long="cut")
    with pytest.raises(InputError, match="^too_long is 'split'; for a text it can be truncate, drop, error$"):
        conversations.text_documents(["a"], TOK, max_length=9, too_long="split")
    with pytest.raises(InputError, match="^max_length is 1; a document needs 2 tokens"):
        render(chat("a", "b"), max_length=1, too_long="drop")


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(InputError, match=r"^the tokenizer has no <\|endoftext\|>, which ends a text"):
        conversations.text_documents(["a"], tokenizer.train(["ab"], 257, special_tokens=["<|im_end|>"]))
