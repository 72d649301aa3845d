"""Turns of a conversation, as people write them down, to messages that `tokenizer.chat.render` takes.

What is no turn raises `BadRecord`, whose kind is one of a few words, so that many of them can be counted.
"""

import json
from collections.abc import Mapping
from typing import Any

from qwen_jax.tokenizer.templates import Message

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
    "function_call": "call",
}  # fmt: skip
_SWITCHES = ("weight", "loss", "train")  # other programs leave a message with 0 or false here out of the loss


class BadRecord(ValueError):
    """A record that nothing can be learned from.

    Attributes:
      kind: what is wrong, in a few words that bad records of one kind share.
      detail: what was found and what was expected.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def read_turns(turns: Any, where: str, role: str, content: str) -> list[Message]:
    """Returns the messages of a list of turns.

    Args:
      turns: the list, if it is one.
      where: its place in the record, for messages to people.
      role, content: the fields of a turn that say who speaks and what.

    Raises:
      BadRecord: it is not such a list, or a turn is not of text that somebody says.
    """
    if turns is None:
        raise BadRecord("missing field", f"expected a list of messages in {where}")
    if not isinstance(turns, list):
        raise BadRecord("wrong type", f"{where} is {type(turns).__name__}; expected a list of messages")
    return [_turn(turn, f"{where}[{place}]", role, content) for place, turn in enumerate(turns)]


def _turn(turn: Any, where: str, role: str, content: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord("wrong type", f"{where} is {type(turn).__name__}; expected an object with {role} and {content}")
    name = _ROLES.get(turn.get(role)) if isinstance(turn.get(role), str) else None
    if name is None:
        known = ", ".join(_ROLES)
        raise BadRecord("unknown role", f"{where}: {role} is {turn.get(role)!r}; expected one of {known}")
    for switch in _SWITCHES:
        if turn.get(switch) is not None and not turn[switch]:
            raise BadRecord(
                "message not to learn", f"{where}: {switch} is {turn[switch]!r}; which messages are learned is set by "
                "loss, for all records alike"
            )  # fmt: skip
    if name == "call":
        return _call(turn.get(content), where)
    extra = {"tool_calls": turn["tool_calls"]} if turn.get("tool_calls") else {}
    if turn.get("reasoning_content") is not None:  # an empty one says that there was no thinking
        extra["reasoning_content"] = turn["reasoning_content"]
    return read_message(name, turn.get(content), where, **extra)


def read_message(role: str, content: Any, where: str, **extra) -> Message:
    """Returns one message. Fields other than role and content are given as `extra`; see `read_turns`."""
    if isinstance(content, list):  # OpenAI's list of parts
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if None in texts:
            raise BadRecord("not text", f"{where}: a part of its content is not text; expected text alone")
        content = "".join(read_text(text, where) for text in texts)
    text = read_text("" if content is None and "tool_calls" in extra else content, where)
    if not text.strip() and role != "system" and "tool_calls" not in extra:
        raise BadRecord("empty message", f"{where}: the {role} says nothing")
    return {"role": role, "content": text} | extra


def _call(content: Any, where: str) -> Message:
    """ShareGPT's function_call: a call, or a list of calls, as JSON."""
    try:
        calls = json.loads(read_text(content, where))
        calls = calls if isinstance(calls, list) else [calls]
        named = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("wrong call", f"{where}: expected a call as JSON with name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": named}


def read_tools(tools: Any) -> list[dict] | None:
    """Returns the signatures of tools, given as a list or as JSON; None where there are none. Raises BadRecord."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRecord("wrong tools", "tools is text that is not JSON; expected a list of signatures") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord("wrong tools", f"tools is {type(tools).__name__}; expected a list of signatures")
    return tools


def read_text(value: Any, where: str) -> str:
    """Returns the value if it is a text. Raises BadRecord."""
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise BadRecord("wrong type", f"{where}: the text is {found}; expected a string")
    return value
