"""Conversations to ids and loss masks, in the chat template of each generation.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": text}. An assistant message of Qwen2.5 and
Qwen3 may have "tool_calls" ([{"name": …, "arguments": …}], alone or under "function"), and one of Qwen3
"reasoning_content".
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import controls
from qwen_jax.tokenizer.face import Tokenizer, check_encodable
from qwen_jax.tokenizer.templates import SYSTEM_PROMPTS, Message, Part, conversation, generation_prompt, jinja

__all__ = ["LOSSES", "SYSTEM_PROMPTS", "jinja", "render", "stop_ids"]

ENDS = ("<|im_end|>", "<|endoftext|>")  # chat models end with the first, base models with the second
LOSSES = ("assistant", "qwen-finetune", "last-turn")

_WITH_TOOLS = ("qwen2.5", "qwen3")
_FIELDS = frozenset({"role", "content", "tool_calls", "reasoning_content"})


def render(
    messages: Sequence[Message],
    tok: Tokenizer,
    *,
    generation: str,
    add_generation_prompt: bool = False,
    loss: str = "assistant",
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = True,
) -> tuple[list[int], list[int]]:
    """Renders a conversation.

    The ids are those of the generation's published template, except that what messages and tools say is always data:
    the name of a control token in it is spelt with regular tokens. A control token of the template that `tok` lacks is
    spelt out as well; `<|im_start|>` and `<|im_end|>` it has to have.

    Loss masks: "assistant" learns every assistant message with its `<|im_end|>`; "last-turn" only the last assistant
    message. Not learned are the header `<|im_start|>assistant\\n`, which the prompt supplies, and the newline after
    `<|im_end|>`, where sampling has ended. A token that straddles header and message is not learned. "qwen-finetune"
    is the rule of Qwen's own finetune.py: it also learns `<|im_start|>`, `<|im_end|>` and the newline after it in
    every turn. As that program does, it encodes role and content apart, begins with a system turn always (a system
    message given first supplies the text, else the generation's default, for Qwen3 Qwen's), drops a first message that
    is not the user's, and knows neither tools nor thinking.

    Qwen3's thinking is given as "reasoning_content", or as `<think>…</think>` at the very beginning of an assistant's
    content unless "reasoning_content" is given too, be it empty. Thinking of earlier turns is dropped from the
    conversation; with thinking data, "last-turn" is the mask that does not teach answers without their thinking.

    Args:
        messages: the conversation, in order.
        tok: a tokenizer with ChatML's control tokens.
        generation: "qwen", "qwen1.5", "qwen2", "qwen2.5" or "qwen3".
        add_generation_prompt: end with the header that makes the model answer.
        loss: "assistant", "qwen-finetune" or "last-turn".
        tools: JSON-like function signatures (Qwen2.5, Qwen3).
        enable_thinking: False ends Qwen3's generation prompt with an empty thought, so that it answers at once.

    Returns:
        The ids, and a mask aligned with them: mask[i] is 1 where token i is to be predicted, else 0.

    Raises:
        InputError: a malformed message (named by its index), or no assistant message where the loss needs one.

    References:
        qwen_spec.md 2; QwenLM/Qwen finetune.py for "qwen-finetune".
    """
    _check_request(tok, generation, loss, tools, enable_thinking)
    _check_messages(messages, "qwen" if loss == "qwen-finetune" else generation)
    if loss == "qwen-finetune":
        messages = _as_finetune(messages, generation)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers and not add_generation_prompt:
        raise InputError(f"messages: none of {len(messages)} is the assistant's, so loss={loss!r} has nothing to learn")
    prompt = list(generation_prompt(generation, enable_thinking)) if add_generation_prompt else []
    if loss == "qwen-finetune":
        ids, mask = _finetune(messages, tok)
        tail, _ = _encode(prompt, tok, apart=True)
        return ids + tail, mask + [0] * len(tail)
    parts = [*conversation(messages, generation, tools), *prompt]
    ids, speakers = _encode(parts, tok, apart=generation == "qwen")
    learned = set(answers[-1:] if loss == "last-turn" else answers)
    return ids, [int(speaker in learned) for speaker in speakers]


def _encode(parts: Iterable[Part], tok: Tokenizer, *, apart: bool) -> tuple[list[int], list[int | None]]:
    """Encodes parts: control tokens as ids, the text between them in one piece, or each part apart."""
    ids: list[int] = []
    speakers: list[int | None] = []
    run: list[tuple[str, int | None]] = []

    def end_run():
        if run:
            run_ids, run_speakers = _encode_run(run, tok)
            ids.extend(run_ids)
            speakers.extend(run_speakers)
            run.clear()

    split = functools.cache(lambda text: tok.split_controls(text, "all"))  # a template says the same every turn
    for part in parts:
        for piece in split(part.text) if part.own else [part.text]:
            if isinstance(piece, int) or apart:
                end_run()
            if isinstance(piece, int):
                ids.append(piece)
                speakers.append(part.speaker)
            elif piece:
                run.append((piece, part.speaker))
    end_run()
    return ids, speakers


def _encode_run(run: list[tuple[str, int | None]], tok: Tokenizer) -> tuple[list[int], list[int | None]]:
    """Encodes adjoining texts as one. A token belongs to the speaker of its first byte.

    In every template the words of a speaker reach to the end of their run, so only their beginning is looked for.
    """
    ids = tok.encode("".join(text for text, _ in run))
    speaker = run[-1][1]
    head = "".join(text for text, of in run if of is None)
    begin = len(head.encode()) + tok.adds_space if head and speaker is not None else 0
    silent = position = 0
    while position < begin and silent < len(ids):
        position += len(tok.token_bytes(ids[silent]))
        silent += 1
    return ids, [None] * silent + [speaker] * (len(ids) - silent)


def _as_finetune(messages: Sequence[Message], generation: str) -> list[Message]:
    """The turns that finetune.py makes of a conversation: one of the system, then those from the user's first."""
    system = {"role": "system", "content": SYSTEM_PROMPTS[generation] or SYSTEM_PROMPTS["qwen"]}
    if messages[0]["role"] == "system":
        system, *messages = messages
    if messages and messages[0]["role"] != "user":
        messages = messages[1:]
    return [system, *messages]


def _finetune(messages: Sequence[Message], tok: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids and labels of finetune.py's preprocess (qwen_spec.md 2.4)."""
    start, end, newline = tok.special_tokens["<|im_start|>"], tok.special_tokens["<|im_end|>"], tok.encode("\n")
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        header = tok.encode(message["role"]) + newline
        content = tok.encode(message["content"])
        ids += [start, *header, *content, end, *newline]
        learned = int(message["role"] == "assistant")
        mask += [1, *[0] * len(header), *[learned] * len(content), 1, *[1] * len(newline)]
    return ids, mask


def _check_request(tok: Tokenizer, generation: str, loss: str, tools: Any, enable_thinking: bool) -> None:
    controls.table(generation)
    if loss not in LOSSES:
        raise InputError(f"loss {loss!r} is not known; it is one of {', '.join(LOSSES)}")
    if missing := [name for name in ("<|im_start|>", "<|im_end|>") if name not in tok.special_tokens]:
        raise InputError(f"the tokenizer has no control token {missing[0]}, which every chat template needs")
    if tools and loss == "qwen-finetune":
        raise InputError("tools are not part of loss='qwen-finetune', whose program knows none")
    if tools and generation not in _WITH_TOOLS:
        raise InputError(f"generation {generation!r} has no tools in its template; {' and '.join(_WITH_TOOLS)} have")
    if not enable_thinking and generation != "qwen3":
        raise InputError(f"enable_thinking=False is a switch of qwen3, not of {generation!r}")


def _check_messages(messages: Sequence[Message], generation: str) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("messages has to be a list of at least one message, each with a role and content")
    roles = ("system", "user", "assistant", *(["tool"] if generation in _WITH_TOOLS else []))
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} is {type(message).__name__}; it has to be an object with role and content")
        if message.get("role") not in roles:
            raise InputError(f"{where}: role is {message.get('role')!r}; {generation} knows {', '.join(roles)}")
        if extra := sorted(set(message) - _FIELDS):
            raise InputError(f"{where}: field {extra[0]!r} is not known; fields are {', '.join(sorted(_FIELDS))}")
        _check_text(message.get("content"), f"{where}: content", optional=bool(message.get("tool_calls")))
        if "tool_calls" in message or "reasoning_content" in message:
            _check_answer(message, where, generation)


def _check_answer(message: Message, where: str, generation: str) -> None:
    for field, generations in (("tool_calls", _WITH_TOOLS), ("reasoning_content", ("qwen3",))):
        if message.get(field) and (message["role"] != "assistant" or generation not in generations):
            raise InputError(f"{where}: only an assistant of {' or '.join(generations)} has {field}")
    _check_text(message.get("reasoning_content"), f"{where}: reasoning_content", optional=True)
    for position, call in enumerate(message.get("tool_calls") or []):
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or "arguments" not in function
        ):
            raise InputError(f"{where}: tool_calls[{position}] has to be an object with a name and arguments")


def _check_text(text: Any, what: str, *, optional: bool) -> None:
    if text is None and optional:
        return
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}; it has to be str")
    try:
        check_encodable(text)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


def stop_ids(tok: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that end an answer, those of ENDS that the tokenizer has."""
    return tuple(tok.special_tokens[name] for name in ENDS if name in tok.special_tokens)
