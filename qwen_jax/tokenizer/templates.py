"""The chat templates of each generation, as lists of parts.

A part is a stretch of text. The template's own parts may hold control tokens; parts that come from a message, a tool
or a tool's answer never do, whatever they say. References: qwen_spec.md 2.1 to 2.3.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.tokenizer import controls

Message = Mapping[str, Any]

SYSTEM_PROMPTS = {
    "qwen": "You are a helpful assistant.",
    "qwen1.5": "You are a helpful assistant",
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen3": None,
}

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a rendered conversation.

    Attributes:
        text: what it says.
        own: the template's own words, whose control tokens are control tokens.
        speaker: the index of the assistant message whose words these are, which a model learns to say; else None.
    """

    text: str
    own: bool = True
    speaker: int | None = None


def conversation(messages: Sequence[Message], generation: str, tools: Sequence | None) -> Iterator[Part]:
    """The parts of a conversation, its system turn included.

    Args:
        messages: checked messages.
        generation: whose template.
        tools: function signatures, for the generations that know them.

    Yields:
        The parts in order.
    """
    has_system = messages[0]["role"] == "system"
    system = messages[0]["content"] if has_system else SYSTEM_PROMPTS[generation]
    yield from _system_turn(system, tools, generation, own=not has_system)
    for index, message in enumerate(messages):
        if index == 0 and has_system:
            continue
        if message["role"] == "tool":
            yield from _tool_answer(messages, index)
        elif message["role"] == "assistant":
            say = _qwen3_answer if generation == "qwen3" else _answer
            yield from say(messages, index)
            yield Part("<|im_end|>", speaker=index)
            yield Part("\n")
        else:
            yield from _header(message["role"])
            yield Part(message["content"], own=False)
            yield Part("<|im_end|>\n")


def generation_prompt(generation: str, enable_thinking: bool) -> Iterator[Part]:
    """The parts that make a model answer."""
    yield from _header("assistant")
    if generation == "qwen3" and not enable_thinking:
        yield Part(_EMPTY_THOUGHT)


def jinja(generation: str) -> str:
    """A Jinja template of plain conversations, for other programs that run a model trained here.

    It knows neither tools nor, for Qwen3, the thinking of the last answer: prompts need neither. Programs that use it
    parse control tokens in what messages say; `chat.render` does not.

    Args:
        generation: whose conversation format.

    Raises:
        InputError: an unknown generation.
    """
    controls.table(generation)
    system, content, thought = SYSTEM_PROMPTS[generation], "message.content", ""
    if generation == "qwen3":
        content = (
            "(message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else message.content)"
        )
        thought = (
            "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        )
    default = f"{{{{ '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}"
    return (
        ("{% if messages[0].role != 'system' %}" + default + "{% endif %}" if system else "")
        + "{% for message in messages %}"
        + f"{{{{ '<|im_start|>' + message.role + '\\n' + {content} + '<|im_end|>\\n' }}}}"
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        + thought
        + "{% endif %}"
    )


def _header(role: str) -> Iterator[Part]:
    yield Part(f"<|im_start|>{role}\n")


def _system_turn(system: str | None, tools: Sequence | None, generation: str, own: bool) -> Iterator[Part]:
    if system is None and not tools:
        return
    yield from _header("system")
    if system is not None:
        yield Part(system, own=own)
    if tools:
        yield Part(("" if system is None else "\n\n") + _TOOLS_HEAD)
        for tool in tools:
            yield Part("\n")
            yield Part(_json(tool), own=False)
        yield Part(_TOOLS_TAIL)
    yield Part("<|im_end|>\n")


def _tool_answer(messages: Sequence[Message], index: int) -> Iterator[Part]:
    """Answers of tools in a row share one user turn."""
    if index == 0 or messages[index - 1]["role"] != "tool":
        yield Part("<|im_start|>user")
    yield Part("\n<tool_response>\n")
    yield Part(messages[index]["content"], own=False)
    yield Part("\n</tool_response>")
    if index + 1 == len(messages) or messages[index + 1]["role"] != "tool":
        yield Part("<|im_end|>\n")


def _answer(messages: Sequence[Message], index: int) -> Iterator[Part]:
    """An assistant turn of the generations before Qwen3."""
    content, calls = messages[index].get("content") or "", messages[index].get("tool_calls") or []
    yield from _header("assistant")
    if content or not calls:
        yield Part(content, own=False, speaker=index)
    for number, call in enumerate(calls):
        line_break = "\n" if content or number else ""  # after the header there is one already
        yield Part(line_break + '<tool_call>\n{"name": "', speaker=index)
        yield from _call(call, index, _json(_function(call)["arguments"]))


def _qwen3_answer(messages: Sequence[Message], index: int) -> Iterator[Part]:
    """An assistant turn of Qwen3: what was thought is kept only after the last question of a user."""
    message = messages[index]
    content, calls = message.get("content") or "", message.get("tool_calls") or []
    thought = message.get("reasoning_content")
    if thought is None:
        thought, content = _thought_and_answer(content)
    last = index == len(messages) - 1
    yield from _header("assistant")
    if index > _last_question(messages) and (last or thought):
        yield Part("<think>\n", speaker=index)
        yield Part(thought.strip("\n"), own=False, speaker=index)
        yield Part("\n</think>\n\n", speaker=index)
        content_part = content.lstrip("\n")
    else:
        content_part = content
    yield Part(content_part, own=False, speaker=index)
    for position, call in enumerate(calls):
        arguments = _function(call)["arguments"]
        yield Part(("\n" if content or position else "") + '<tool_call>\n{"name": "', speaker=index)
        yield from _call(call, index, arguments if isinstance(arguments, str) else _json(arguments))


def _call(call: Mapping, index: int, arguments: str) -> Iterator[Part]:
    yield Part(_function(call)["name"], own=False, speaker=index)
    yield Part('", "arguments": ', speaker=index)
    yield Part(arguments, own=False, speaker=index)
    yield Part("}\n</tool_call>", speaker=index)


def _thought_and_answer(content: str) -> tuple[str, str]:
    """Takes a thought off the beginning of an answer.

    The published template does so wherever an answer says `</think>`; here an answer that merely mentions it is data.
    """
    if not content.lstrip("\n").startswith("<think>") or "</think>" not in content:
        return "", content
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought, content.split("</think>")[-1].lstrip("\n")


def _last_question(messages: Sequence[Message]) -> int:
    """The index of the last user message that is no tool's answer in disguise; without one, the last message."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index].get("content") or ""
        answer = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index]["role"] == "user" and not answer:
            return index
    return len(messages) - 1


def _function(call: Mapping) -> Mapping:
    return call.get("function") or call


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
