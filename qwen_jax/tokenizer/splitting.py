"""Pre-tokenisation: the patterns that cut text into pieces, inside which alone bytes are merged.

Both are written as `tiktoken` and `tokenizers` read them, and as `tokenizer.json` stores them.
"""

import json

from qwen_jax.errors import InputError

# qwen_spec.md 1.1: one digit a piece; combining marks fall with the punctuation.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The older cut that `ByteLevel(use_regex=true)` stands for (GPT-2), as it is, and behind `Digits(individual_digits)`,
# which cuts the text at every digit first: there white space before a digit stays whole.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def to_json(pattern: str) -> dict:
    """The `pre_tokenizer` entry of a `tokenizer.json` that cuts by `pattern`."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES_ONLY]}


def from_json(entry: dict | None, where: str) -> str:
    """The pattern that a `pre_tokenizer` entry of a `tokenizer.json` cuts by.

    Args:
        entry: the entry as parsed.
        where: the file, for messages.

    Raises:
        InputError: the entry is none of the forms byte-level vocabularies are published in.
    """
    steps = entry.get("pretokenizers", [entry]) if isinstance(entry, dict) else []
    match [(step.get("type"), step) for step in steps]:
        case [("Split", split), ("ByteLevel", level)] if not level.get("use_regex", True) and _isolates(split):
            pattern = split["pattern"]["Regex"]
        case [("ByteLevel", level)] if level.get("use_regex", True):
            pattern = GPT2
        case [("Digits", digits), ("ByteLevel", level)] if digits["individual_digits"] and level.get("use_regex", True):
            pattern = GPT2_DIGITS
        case _:
            raise InputError(
                f"{where}: pre_tokenizer is {json.dumps(entry)[:200]}; readable are Split by a regex + ByteLevel, "
                "ByteLevel, and Digits + ByteLevel"
            )
    if level.get("add_prefix_space", True):
        raise InputError(f"{where}: pre_tokenizer adds a space before the text; only add_prefix_space false is exact")
    return pattern


def _isolates(split: dict) -> bool:
    return split.get("behavior") == "Isolated" and not split.get("invert") and "Regex" in split.get("pattern", {})
