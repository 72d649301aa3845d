"""The control tokens of each generation, in the order in which they follow the regular tokens.

Generations reuse the same ids for different tokens, so there is one table each and none shared (qwen_spec.md 1.3).
"""

import itertools

from qwen_jax.errors import InputError

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_VISION = tuple(
    f"<|{name}|>"
    for name in (
        *("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
_TOOLS = ("<tool_call>", "</tool_call>")
_CODE = tuple(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"))
_QWEN3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")

TABLES = {
    "qwen": CHATML + tuple(f"<|extra_{i}|>" for i in range(205)),
    "qwen1.5": CHATML,
    "qwen2": CHATML,
    "qwen2.5": CHATML + _VISION + _TOOLS + _CODE,
    "qwen3": CHATML + _VISION + _TOOLS + _CODE + _QWEN3,
}
GENERATIONS = tuple(TABLES)

# Control tokens that `decode(skip_special=True)` keeps: they carry the structure of an answer, and the published
# files flag them "special": false.
SHOWN = frozenset(_TOOLS + _CODE + _QWEN3)


def table(generation: str) -> tuple[str, ...]:
    """The control tokens of a generation: 208 of Qwen, 3 of Qwen1.5 and Qwen2, 22 of Qwen2.5, 26 of Qwen3.

    Args:
        generation: one of `GENERATIONS`.

    Raises:
        InputError: an unknown generation.
    """
    if generation not in TABLES:
        raise InputError(f"generation {generation!r} is not known; it is one of {', '.join(GENERATIONS)}")
    return TABLES[generation]


def check(special_tokens: dict[str, int] | tuple[str, ...], where: str) -> None:
    """Holds that control tokens are distinct, not empty, and that none is part of another or ends as another begins.

    Args:
        special_tokens: names, with or without ids.
        where: what lists them, for messages.

    Raises:
        InputError: a name that is no text, empty, listed twice, or that overlaps another one.
    """
    seen: set[str] = set()
    for name in special_tokens:
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: special token {name!r} is not a non-empty string")
        if name in seen:
            raise InputError(f"{where}: special token {name!r} is listed twice")
        seen.add(name)
    # Sorted by length, a name can only lie in a later one; joined with NUL, one search finds it.
    ordered = sorted(seen, key=len)
    for index, name in enumerate(ordered):
        outer = next((other for other in ordered[index + 1 :] if name in other), None)
        if outer is not None:
            raise InputError(f"{where}: special tokens {name!r} and {outer!r} overlap: one is part of the other")
    for name, other in itertools.permutations(ordered, 2):
        if other[0] in name[1:] and any(name.endswith(other[:size]) for size in range(1, len(other))):
            raise InputError(f"{where}: special tokens {name!r} and {other!r} overlap: one ends as the other begins")
