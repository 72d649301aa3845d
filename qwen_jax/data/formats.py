"""Records as people keep them -> conversations and pairs: OpenAI messages, ShareGPT, Alpaca, Qwen's finetune format.

A record is what a line of JSON or a row of a table holds. What cannot be learned from raises `BadRecord`, whose kind is
one of a few words, so that many of them can be counted.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qwen_jax.data.turns import BadRecord, read_message, read_text, read_tools, read_turns
from qwen_jax.tokenizer.templates import Message

Record = Any  # parsed JSON, or the like


class Conversation(NamedTuple):
    """Messages as `tokenizer.chat.render` takes them, and the signatures of the tools that may be called."""

    messages: list[Message]
    tools: list[dict] | None = None


class Pair(NamedTuple):
    """A prompt and two answers to it, of which people prefer the first.

    Attributes:
      prompt: the messages before the answer.
      chosen, rejected: the answers, an assistant's message each.
      margin: how much better the chosen one is, where the record says so.
      tools: as in Conversation.
    """

    prompt: list[Message]
    chosen: Message
    rejected: Message
    margin: float | None = None
    tools: list[dict] | None = None


class Comparison(NamedTuple):
    """A prompt and several answers to it, and what people think of each.

    Attributes:
      prompt: the messages before the answer.
      answers: an assistant's message each, at least two.
      values: one for each answer, the higher is the better: scores, or only their order.
      tools: as in Conversation.
    """

    prompt: list[Message]
    answers: list[Message]
    values: list[float]
    tools: list[dict] | None = None


def parsed(record: Record) -> Record:
    """Returns the object that a record as it was read stands for: bytes are JSON.

    Raises:
      BadRecord: it is not JSON, or was a BadRecord already.
    """
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, bytes):
        return record
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRecord("not JSON", reason) from None


def detect(record: Record) -> str:
    """Returns the name of a record's format, one of NAMES.

    Raises:
      BadRecord: it is none of them.
    """
    if isinstance(record, list):
        return "messages"
    fields = _object(record)
    turns = fields.get("conversations")
    if turns is not None:
        names = {turn.get("from") for turn in turns if isinstance(turn, Mapping)} if isinstance(turns, list) else set()
        return "qwen" if names and names <= {"system", "user", "assistant"} else "sharegpt"
    if "messages" in fields:
        return "messages"
    if "instruction" in fields:
        return "alpaca"
    if is_pair(fields) or is_list(fields):
        return "messages"
    raise BadRecord(
        "unknown format",
        f"its fields are {', '.join(map(str, fields)) or 'none'}; expected messages (OpenAI), conversations (ShareGPT, "
        "Qwen), instruction and output (Alpaca), prompt, chosen and rejected, or prompt and answers",
    )


def domain(record: Record) -> str:
    """Returns what a record says it is of, in its field domain or source; "" where that is no short text."""
    fields = record if isinstance(record, Mapping) else {}
    told = next((fields[name] for name in ("domain", "source") if isinstance(fields.get(name), str)), "")
    return told if len(told) <= 40 else ""


def is_pair(record: Record) -> bool:
    """Whether a record holds two answers, one preferred."""
    return isinstance(record, Mapping) and record.get("chosen") is not None and record.get("rejected") is not None


def is_list(record: Record) -> bool:
    """Whether a record holds answers in an order, or with scores."""
    return isinstance(record, Mapping) and record.get("answers") is not None


def conversation(record: Record, format: str) -> Conversation:
    """Returns the conversation of a record.

    Args:
      record: an object, or (format "messages") a list of messages alone.
      format: one of NAMES.

    Raises:
      BadRecord: it does not hold a conversation in that format, or nobody answers in it.
    """
    if is_pair(record) or is_list(record):
        raise BadRecord("a pair", "it has several answers to one prompt; expected a conversation")
    messages, tools = _read(record, format)
    if not messages:
        raise BadRecord("no messages", "the list of messages is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecord("no answer", f"none of its {len(messages)} messages is the assistant's: nothing to learn")
    return Conversation(_with_system(messages, record), tools)


def pair(record: Record, format: str) -> Pair:
    """Returns the pair of a record: its prompt in the format's own way, and the fields chosen and rejected.

    An answer is a text, a message, or a list of messages of which the prompt, if repeated there, is the beginning. The
    margin is the field margin, or score_chosen - score_rejected.

    Args:
      record: an object.
      format: one of NAMES.

    Raises:
      BadRecord: one of the three is missing, the answers are equal, or an answer is not one message.
    """
    if not is_pair(record):
        raise BadRecord("no pair", f"its fields are {_names(record)}; expected chosen and rejected among them")
    prompt, tools = _read(record, format)
    answers = [_answer(record[side], side) for side in ("chosen", "rejected")]
    shared = 0  # messages that both begin with: the prompt again, or more of it
    while all(shared < len(answer) - 1 and answer[shared] == answers[0][shared] for answer in answers):
        shared += 1
    repeated = answers[0][:shared]
    prompt = repeated if all(message in repeated for message in prompt) else prompt + repeated
    answers = [answer[shared:] for answer in answers]
    if not any(message["role"] == "user" for message in prompt):
        raise BadRecord("no prompt", f"its fields are {_names(record)}; expected what both answers reply to")
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        if [message["role"] for message in answer] != ["assistant"]:
            found = ", ".join(message["role"] for message in answer) or "nothing"
            raise BadRecord("wrong answer", f"{side} adds {found} to the prompt; expected one assistant's message")
    if answers[0] == answers[1]:
        raise BadRecord("equal answers", "chosen and rejected are the same; expected two answers that differ")
    return Pair(_with_system(prompt, record), answers[0][0], answers[1][0], _margin(record), tools)


def comparison(record: Record, format: str) -> Comparison:
    """Returns the comparison of a record: a pair, or a list of answers.

    A pair is read as `pair` says; its values are the margin (1 where the record has none) and 0. A list is the field
    answers, texts or messages, from the best to the worst, or in any order with the field scores.

    Args:
      record: an object.
      format: one of NAMES: how its prompt is written.

    Raises:
      BadRecord: as `pair`; a pair's margin is not above 0; a list has fewer than two answers, equal ones, or equal
        scores.
    """
    if is_list(record):
        return _list(record, format)
    prompt, chosen, rejected, margin, tools = pair(record, format)
    if margin is not None and not 0 < margin < math.inf:
        raise BadRecord(
            "wrong margin", f"the margin is {margin}; expected a number above 0: which answer is the better?"
        )
    return Comparison(prompt, [chosen, rejected], [1.0 if margin is None else margin, 0.0], tools)


def _list(record: Mapping, format: str) -> Comparison:
    prompt, tools = _read(record, format)
    prompt = _with_system(prompt, record) if prompt else prompt
    if not any(message["role"] == "user" for message in prompt):
        raise BadRecord("no prompt", f"its fields are {_names(record)}; expected what the answers reply to")
    given, scores = record["answers"], record.get("scores")
    if not isinstance(given, list) or len(given) < 2:
        count = len(given) if isinstance(given, list) else type(given).__name__
        raise BadRecord("one answer", f"answers has {count}; expected a list of at least two")
    answers = [_answer(answer, f"answers[{place}]") for place, answer in enumerate(given)]
    if wrong := [place for place, said in enumerate(answers) if [turn["role"] for turn in said] != ["assistant"]]:
        raise BadRecord("wrong answer", f"answers[{wrong[0]}] is not one assistant's message")
    said = [answer["content"] for (answer,) in answers]
    if len(set(said)) < len(said):
        raise BadRecord("equal answers", "two of the answers are the same; expected answers that differ")
    if scores is None:
        scores = range(len(answers), 0, -1)
    elif not isinstance(scores, list) or len(scores) != len(answers) or not all(map(_is_number, scores)):
        raise BadRecord("wrong type", f"scores has to be a list of {len(answers)} numbers, one for each answer")
    if len(set(scores)) < len(answers):
        raise BadRecord("ties", "two answers have the same score; expected an order without ties")
    return Comparison(prompt, [answer for (answer,) in answers], [float(score) for score in scores], tools)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of what is said, blind to case, blanks and punctuation, so that copies with small touches agree."""
    turns = (" ".join(re.findall(r"\w+", (message.get("content") or "").casefold())) for message in messages)
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def percent_of(key: str) -> int:
    """A number below 100 from a content hash: what decides the split, whatever else is added or removed."""
    return int(key[:12], 16) % 100


def _read(record: Record, format: str) -> tuple[list[Message], list[dict] | None]:
    """The messages of a record (of a pair: of its prompt, perhaps none) and its tools."""
    if isinstance(record, list):
        record = {"messages": record}
    fields = _object(record)
    return _READERS[format](fields), read_tools(fields.get("tools"))


def _with_system(messages: list[Message], record: Record) -> list[Message]:
    """The messages, after the system's that a field of the record gives unless they begin with one."""
    system = record.get("system") if isinstance(record, Mapping) else None
    if not isinstance(system, str) or not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _read_messages(fields: Mapping) -> list[Message]:
    if not is_pair(fields) and not is_list(fields):
        return read_turns(fields.get("messages"), "messages", "role", "content")
    prompt = fields["messages"] if fields.get("messages") is not None else fields.get("prompt")
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return [read_message("user", prompt, "prompt")] if prompt.strip() else []
    return read_turns(prompt, "prompt", "role", "content")


def _read_sharegpt(fields: Mapping) -> list[Message]:
    turns = fields.get("conversations")
    openai = isinstance(turns, list) and any(isinstance(turn, Mapping) and "role" in turn for turn in turns)
    return read_turns(turns, "conversations", *(("role", "content") if openai else ("from", "value")))


def _read_qwen(fields: Mapping) -> list[Message]:
    for place, turn in enumerate(turns if isinstance(turns := fields.get("conversations"), list) else []):
        if isinstance(turn, Mapping) and turn.get("from") not in ("system", "user", "assistant"):
            raise BadRecord(
                "unknown role", f"conversations[{place}]: from is {turn.get('from')!r}; expected user or assistant"
            )
    return read_turns(turns, "conversations", "from", "value")


def _read_alpaca(fields: Mapping) -> list[Message]:
    messages = []
    history = fields.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise BadRecord("wrong type", "history is not a list of [question, answer]")
    for place, (question, answer) in enumerate(history):
        messages.append(read_message("user", question, f"history[{place}][0]"))
        messages.append(read_message("assistant", answer, f"history[{place}][1]"))
    question = [read_text(fields.get(name) or "", name).strip("\n") for name in ("instruction", "input")]
    messages.append(read_message("user", "\n".join(filter(None, question)), "instruction"))
    if not is_pair(fields) and not is_list(fields):
        if fields.get("output") is None:
            raise BadRecord("missing field", f"its fields are {_names(fields)}; expected output among them")
        messages.append(read_message("assistant", fields["output"], "output"))
    return messages


_READERS: dict[str, Callable[[Mapping], list[Message]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "qwen": _read_qwen,
}
NAMES = tuple(_READERS)


def _answer(value: Any, side: str) -> list[Message]:
    if isinstance(value, str):
        return [read_message("assistant", value, side)]
    turns = value if isinstance(value, list) else [value]
    sharegpt = bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
    return read_turns(turns, side, *(("from", "value") if sharegpt else ("role", "content")))


def _margin(record: Mapping) -> float | None:
    values = [record.get(name) for name in ("margin", "score_chosen", "score_rejected")]
    if any(value is not None and not isinstance(value, int | float) for value in values):
        raise BadRecord("wrong type", "margin, score_chosen and score_rejected have to be numbers")
    margin, chosen, rejected = values
    if margin is None and chosen is not None and rejected is not None:
        margin = chosen - rejected
    return None if margin is None else float(margin)


def _object(record: Record) -> Mapping:
    if not isinstance(record, Mapping):
        raise BadRecord("not an object", f"it is {type(record).__name__}; expected an object with fields")
    return record


def _names(record: Record) -> str:
    return ", ".join(map(str, record)) if isinstance(record, Mapping) and record else "none"
