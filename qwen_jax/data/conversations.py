"""Conversations and texts as documents: token ids, and which of them are to be learned."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from qwen_jax.data.formats import Comparison, Conversation
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, chat
from qwen_jax.tokenizer.templates import Message

TooLong = Literal["truncate", "split", "drop", "error"]
END_OF_TEXT = "<|endoftext|>"


class Document(NamedTuple):
    """A sequence that is read as one: a chat, a text.

    Attributes:
      ids: [n] int32, token ids.
      loss_mask: [n] bool, which tokens are to be learned (predicted by what stands before them); or float, how much.
    """

    ids: np.ndarray
    loss_mask: np.ndarray


class LongerThanLimit(InputError):
    """A document is longer than it may be, and was not to be cut or left out."""


class Documents(NamedTuple):
    """What was made of a source, and what it cost.

    Attributes:
      documents: in the source's order.
      split: how many conversations were made into several documents.
      truncated: how many documents were cut to the length limit.
      dropped_long: how many were left out because they were too long.
      dropped_empty: how many were left out because nothing in them, or in what the cut left of them, is to be learned.
      lost_tokens: tokens that are missing because of the length limit.
    """

    documents: list[Document]
    split: int
    truncated: int
    dropped_long: int
    dropped_empty: int
    lost_tokens: int

    def __str__(self) -> str:
        tokens = sum(len(document.ids) for document in self.documents)
        learned = sum(int(document.loss_mask.sum()) for document in self.documents)
        return (
            f"{len(self.documents)} documents, {tokens} tokens, {learned} to learn; {self.split} split, "
            f"{self.truncated} truncated, {self.dropped_long} dropped as too long, "
            f"{self.dropped_empty} dropped with nothing to learn, {self.lost_tokens} tokens lost to the length limit"
        )


def chat_documents(
    conversations: Iterable[Sequence[Message] | Conversation],
    tok: Tokenizer,
    *,
    generation: str,
    max_length: int | None = None,
    too_long: TooLong = "error",
    loss: str = "assistant",
) -> Documents:
    """Renders conversations in ChatML.

    Args:
      conversations: each a list of OpenAI messages, {"role": ..., "content": ...}, or a Conversation, which may have
        tools.
      tok: the tokenizer.
      generation: whose chat format, as in `tokenizer.chat.render`.
      max_length: the most tokens a document may have; None is no limit.
      too_long: what becomes of a longer one: "truncate" keeps its first max_length tokens; "split" makes several of it,
        each beginning with a user's message (after the system message, which all of them get) and truncated only where
        one question and its answer alone are too long; "drop" leaves it out; "error" refuses it.
      loss: which tokens are learned, as in `tokenizer.chat.render`; applied to each part of a split conversation.

    Returns:
      Documents, with counts of what was cut or left out.

    Raises:
      InputError: a conversation cannot be rendered, or is too long and `too_long` is "error".
    """

    def rendered() -> Iterator[list[Document]]:
        for number, conversation in enumerate(conversations):
            messages, tools = conversation if isinstance(conversation, Conversation) else (conversation, None)
            render = functools.partial(_render, tok=tok, generation=generation, loss=loss, tools=tools)
            try:
                if too_long == "split" and max_length is not None:
                    yield _split(messages, render, max_length)
                else:
                    yield [render(messages)]
            except InputError as error:
                raise InputError(f"conversation {number}: {error}") from None

    return _limited(rendered(), max_length, too_long, "conversation")


def _render(messages: Sequence[Message], *, tok: Tokenizer, **how) -> Document:
    ids, mask = chat.render(messages, tok, **how)
    return Document(np.asarray(ids, np.int32), np.asarray(mask, bool))


def answer_documents(
    comparisons: Iterable[Comparison],
    tok: Tokenizer,
    *,
    generation: str,
    max_length: int | None = None,
    too_long: Literal["drop", "error"] = "error",
) -> Documents:
    """Renders comparisons: each answer behind its prompt, to its `<|im_end|>`; what is learned is the answer with that.

    Args:
      comparisons: the comparisons.
      tok: the tokenizer.
      generation: whose chat format, as in `tokenizer.chat.render`.
      max_length: the most tokens that a prompt and an answer may have together; None is no limit.
      too_long: what becomes of a comparison with more: "drop" leaves it out, "error" refuses it. None is ever cut: an
        answer without its end, or to half a question, is not what people judged.

    Returns:
      Documents, those of a comparison in the order of its answers; dropped_long counts each answer.

    Raises:
      InputError: a comparison cannot be rendered, or is too long and `too_long` is "error".
    """
    if too_long not in ("drop", "error"):
        raise InputError(f"too_long is {too_long!r}; for a pair it can be drop, error")
    kept, dropped, lost_tokens = [], 0, 0
    for number, (prompt, answers, _, tools) in enumerate(comparisons):
        render = functools.partial(_render, tok=tok, generation=generation, loss="last-turn", tools=tools)
        try:
            made = [_to_its_end(render([*prompt, answer])) for answer in answers]
        except InputError as error:
            raise InputError(f"pair {number}: {error}") from None
        longest = max(made, key=lambda document: len(document.ids))
        if max_length is None or len(longest.ids) <= max_length:
            kept += made
        elif too_long == "drop":
            dropped, lost_tokens = dropped + len(made), lost_tokens + sum(len(document.ids) for document in made)
        else:
            asked = len(longest.ids) - int(longest.loss_mask.sum())
            raise LongerThanLimit(
                f"pair {number} has {len(longest.ids)} tokens, {asked} of them the prompt's, "
                f"the limit is {max_length}: "
                "raise the limit, or choose too_long='drop'; an answer is never cut"
            )
    return Documents(kept, 0, 0, dropped, 0, lost_tokens)


def _to_its_end(document: Document) -> Document:
    """The document without the newline behind the last `<|im_end|>`: a score is read at its last token."""
    end = int(np.flatnonzero(document.loss_mask)[-1]) + 1
    return Document(document.ids[:end], document.loss_mask[:end])


def _split(
    messages: Sequence[Message], render: Callable[[Sequence[Message]], Document], max_length: int
) -> list[Document]:
    """Renders a conversation in as few documents as hold max_length tokens each, cut between exchanges."""
    system, exchanges = _exchanges(messages)
    if len(exchanges) < 2:
        return [render(messages)]
    # In ChatML the length is a constant plus the lengths of the exchanges: rendering each of them once tells where to
    # cut, without trying. Where it is not quite so (a template that drops old thoughts), the loop below puts it right.
    alone = np.array([len(render(system + exchange).ids) for exchange in exchanges])
    shared = alone[0] + alone[1] - len(render(system + exchanges[0] + exchanges[1]).ids)
    documents, start = [], 0
    while start < len(exchanges):
        fitting = int(np.searchsorted(np.cumsum(alone[start:] - shared) + shared, max_length, side="right"))
        for taken in range(max(1, fitting), 0, -1):
            document = render(sum(exchanges[start : start + taken], system))
            if len(document.ids) <= max_length:
                break
        documents.append(document)
        start += taken
    return documents


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system message, if any, and the rest cut before each user message that has an answer on both sides."""
    rest = list(messages)
    system = [rest.pop(0)] if rest and rest[0]["role"] == "system" else []
    answers = [message["role"] == "assistant" for message in rest]
    exchanges, start = [], 0
    for place, message in enumerate(rest):
        if message["role"] == "user" and any(answers[start:place]) and any(answers[place:]):
            exchanges.append(rest[start:place])
            start = place
    return system, [*exchanges, rest[start:]]


def text_documents(
    texts: Iterable[str],
    tok: Tokenizer,
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

    def encoded() -> Iterator[list[Document]]:
        for text in texts:
            ids = np.asarray([*tok.encode(text), end], np.int32)
            yield [Document(ids, np.ones(len(ids), bool))]

    return _limited(encoded(), max_length, too_long, "text")


def plain_text(conversation: Sequence[Message]) -> str:
    """A conversation as a text: what was said, one message per line, without roles."""
    return "\n".join(message["content"] for message in conversation)


def _limited(sources: Iterable[list[Document]], max_length: int | None, too_long: TooLong, what: str) -> Documents:
    """Holds the documents of each source to the limit; a source that was split has several, or none."""
    allowed = get_args(TooLong) if what == "conversation" else [way for way in get_args(TooLong) if way != "split"]
    if too_long not in allowed:
        raise InputError(f"too_long is {too_long!r}; for a {what} it can be {', '.join(allowed)}")
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}; a document needs 2 tokens to have one that follows another")
    kept, split, truncated, dropped_long, dropped_empty, lost_tokens = [], 0, 0, 0, 0, 0
    for number, documents in enumerate(sources):
        split += len(documents) > 1
        for ids, mask in documents:
            excess = 0 if max_length is None else max(0, len(ids) - max_length)
            if excess and too_long == "error":
                raise LongerThanLimit(
                    f"{what} {number} has {len(ids)} tokens, the limit is {max_length}: "
                    f"raise the limit, or choose too_long={' or '.join(map(repr, allowed[:-1]))}"
                )
            if excess and too_long == "drop":
                dropped_long += 1
                lost_tokens += len(ids)
            elif not mask[1:max_length].any():  # the first token has nothing before it, so it is never a target
                dropped_empty += 1
                lost_tokens += len(ids) if excess else 0
            else:
                truncated += bool(excess)
                lost_tokens += excess
                kept.append(
                    Document(ids[:max_length].copy(), mask[:max_length].copy()) if excess else Document(ids, mask)
                )
    return Documents(kept, split, truncated, dropped_long, dropped_empty, lost_tokens)
