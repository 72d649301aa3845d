"""Conversations and texts as documents: token ids, and which of them are to be learned."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from qwen_jax.errors import InputError

TOO_LONG = ("truncate", "drop", "error")
ROLES = ("system", "user", "assistant", "tool")
END_OF_TEXT = "<|endoftext|>"


class Document(NamedTuple):
    """A sequence that is read as one: a chat, a text.

    Attributes:
      ids: [n] int32, token ids.
      loss_mask: [n] bool, which tokens are to be learned (predicted by what stands before them).
    """

    ids: np.ndarray
    loss_mask: np.ndarray


class Documents(NamedTuple):
    """What was made of a source, and what it cost.

    Attributes:
      documents: in the source's order.
      truncated: how many of them were cut to the length limit.
      dropped_long: how many were left out because they were too long.
      dropped_empty: how many were left out because nothing in them, or in what the cut left of them, is to be learned.
      lost_tokens: tokens that are missing because of the length limit.
    """

    documents: list[Document]
    truncated: int
    dropped_long: int
    dropped_empty: int
    lost_tokens: int

    def __str__(self) -> str:
        tokens = sum(len(document.ids) for document in self.documents)
        learned = sum(int(document.loss_mask.sum()) for document in self.documents)
        return (
            f"{len(self.documents)} documents, {tokens} tokens, {learned} of them to learn; {self.truncated} truncated, "
            f"{self.dropped_long} dropped as too long, {self.dropped_empty} with nothing to learn, "
            f"{self.lost_tokens} tokens lost to the length limit"
        )


def chat_documents(
    conversations: Iterable[Sequence[dict[str, str]]],
    tok,
    *,
    generation: str,
    max_length: int | None = None,
    too_long: Literal["truncate", "drop", "error"] = "error",
    loss: str = "assistant",
) -> Documents:
    """Renders conversations in ChatML.

    Args:
      conversations: each a list of OpenAI messages, {"role": ..., "content": ...}.
      tok: a Tokenizer.
      generation: whose chat format, as in `tokenizer.chat.render`.
      max_length: the most tokens a document may have; None is no limit.
      too_long: what becomes of a longer one: "truncate" keeps its first max_length tokens, "drop" leaves it out,
        "error" refuses it.
      loss: which tokens are learned, as in `tokenizer.chat.render`.

    Returns:
      Documents, with counts of what was cut or left out.

    Raises:
      InputError: a message is not of the expected form, or a conversation is too long and `too_long` is "error".
    """
    from qwen_jax.tokenizer import chat

    def rendered():
        for number, messages in enumerate(conversations):
            _check_messages(messages, number)
            ids, mask = chat.render(messages, tok, generation=generation, loss=loss)
            yield Document(np.asarray(ids, np.int32), np.asarray(mask, bool))

    return _limited(rendered(), max_length, too_long, "conversation")


def text_documents(
    texts: Iterable[str],
    tok,
    *,
    max_length: int | None = None,
    too_long: Literal["truncate", "drop", "error"] = "error",
) -> Documents:
    """Encodes texts for pretraining: all of a text is learned, and the `<|endoftext|>` that ends it.

    Args:
      texts: plain text; nothing in it is taken for a special token.
      tok: a Tokenizer that has `<|endoftext|>`.
      max_length, too_long: as in `chat_documents`. Not needed for `StreamRows`, which cuts anyway.

    Returns:
      Documents, with counts of what was cut or left out.

    Raises:
      InputError: the tokenizer has no `<|endoftext|>`, or a text is too long and `too_long` is "error".
    """
    if END_OF_TEXT not in tok.special_tokens:
        raise InputError(f"the tokenizer has no {END_OF_TEXT}, which ends a text; it has {sorted(tok.special_tokens)}")
    end = tok.special_tokens[END_OF_TEXT]

    def encoded():
        for text in texts:
            ids = np.asarray([*tok.encode(text), end], np.int32)
            yield Document(ids, np.ones(len(ids), bool))

    return _limited(encoded(), max_length, too_long, "text")


def plain_text(conversation: Sequence[dict[str, str]]) -> str:
    """A conversation as a text: what was said, one message per line, without roles."""
    return "\n".join(message["content"] for message in conversation)


def _limited(documents: Iterable[Document], max_length: int | None, too_long: str, what: str) -> Documents:
    if too_long not in TOO_LONG:
        raise InputError(f"too_long is {too_long!r}; it can be {', '.join(TOO_LONG)}")
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}; a document needs 2 tokens to have one that follows another")
    kept, truncated, dropped_long, dropped_empty, lost_tokens = [], 0, 0, 0, 0
    for number, document in enumerate(documents):
        excess = 0 if max_length is None else max(0, len(document.ids) - max_length)
        if excess and too_long == "error":
            raise InputError(
                f"{what} {number} has {len(document.ids)} tokens, the limit is {max_length}: "
                f"raise the limit, or choose too_long='truncate' or 'drop'"
            )
        if excess and too_long == "drop":
            dropped_long += 1
            lost_tokens += len(document.ids)
            continue
        if excess:
            document = Document(document.ids[:max_length].copy(), document.loss_mask[:max_length].copy())
        if not document.loss_mask[1:].any():  # the first token has nothing before it, so it is never a target
            dropped_empty += 1
            lost_tokens += excess and excess + len(document.ids)
            continue
        truncated += bool(excess)
        lost_tokens += excess
        kept.append(document)
    return Documents(kept, truncated, dropped_long, dropped_empty, lost_tokens)


def _check_messages(messages: Sequence[dict[str, str]], number: int) -> None:
    if not messages:
        raise InputError(f"conversation {number} has no messages; it needs at least one")
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"conversation {number}, message {place}: role is {role!r}; it can be {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"conversation {number}, message {place}: content is {content!r}; it must be a string")
