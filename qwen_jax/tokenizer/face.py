"""What every tokenizer does, whatever its vocabulary: text to ids and back, control tokens apart from text.

All text is data. Encoding never makes a control id of what a text says unless the caller names that control token.
"""

import abc
import os
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import controls
from qwen_jax.tokenizer.streaming import StreamDecoder

_NOTHING: frozenset[str] = frozenset()


class Tokenizer(abc.ABC):
    """Text to ids and back. `load`, `train` and their like make one.

    Three sizes are told apart: `regular_size` (tokens that spell text), `vocab_size` (these and the control tokens:
    every id is below it), and the rows of a model's embedding, which are the model's and at least `vocab_size`.

    Attributes:
        special_tokens: the id of each control token by name, in order of id.
        shown: the control tokens that `decode(skip_special=True)` keeps.
        adds_space: whether encoding puts a space before every text (SentencePiece models of others).
        chat_template: the Jinja template that the files came with; kept for other programs, never run here.
    """

    adds_space = False
    chat_template: str | None = None

    def __init__(
        self, spellings: dict[int, bytes], special_tokens: dict[str, int], *, shown: Collection[str] = controls.SHOWN
    ):
        controls.check(special_tokens, "special_tokens")
        self.special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self.shown = frozenset(shown) & frozenset(special_tokens)
        self._regular_size, self._control_names = len(spellings), tuple(self.special_tokens)
        self._spellings: list[bytes | None] = [None] * (max([*spellings, *special_tokens.values()], default=-1) + 1)
        for name, index in [(spelling, i) for i, spelling in spellings.items()] + list(special_tokens.items()):
            if self._spellings[index] is not None:
                raise InputError(f"id {index} is given to both {self._spellings[index]!r} and {name!r}")
            self._spellings[index] = name.encode("utf-8") if isinstance(name, str) else name
        self._skipped = frozenset(i for name, i in self.special_tokens.items() if name not in self.shown)

    @property
    def vocab_size(self) -> int:
        """Regular tokens and control tokens together: all ids are below it."""
        return len(self._spellings)

    @property
    def regular_size(self) -> int:
        """The number of regular tokens: those that spell text."""
        return self._regular_size

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.regular_size:,} regular + {len(self.special_tokens)} control tokens>"

    def encode(self, text: str, *, allowed_special: Collection[str] = _NOTHING) -> list[int]:
        """Encodes a text.

        Args:
            text: any text; it is brought to Unicode normal form C where the vocabulary asks for it.
            allowed_special: names of control tokens that the text may contain as such, or "all". What is not named is
                spelt with regular tokens, like any other text.

        Returns:
            The ids; nothing is added before or after.

        Raises:
            InputError: not a string, a lone surrogate, or an unknown control token.
        """
        _check_text(text)
        if not allowed_special:
            return self._encode_data(text)
        return [
            index
            for part in self.split_controls(text, allowed_special)
            for index in ([part] if isinstance(part, int) else self._encode_data(part))
        ]

    def encode_batch(
        self, texts: Sequence[str], *, allowed_special: Collection[str] = _NOTHING, threads: int | None = None
    ) -> list[list[int]]:
        """Encodes many texts at once, on all cores.

        Args:
            texts: the texts.
            allowed_special: as in `encode`.
            threads: how many threads; one a core by default.

        Returns:
            The ids of each text, in order.

        Raises:
            InputError: as `encode`, with the index of the text.
        """
        if isinstance(texts, str):
            raise InputError("encode_batch takes a sequence of texts, and was given one text: use encode")
        texts = list(texts)
        threads = threads or os.cpu_count() or 1
        # Few large shares rather than one task a text: handing over a task costs as much as encoding a short text.
        share = max(1, len(texts) // (threads * 32))

        def encode_share(start: int) -> list[list[int]]:
            return [self._encode_at(i, texts[i], allowed_special) for i in range(start, min(start + share, len(texts)))]

        with ThreadPoolExecutor(threads) as pool:
            return [ids for shares in pool.map(encode_share, range(0, len(texts), share)) for ids in shares]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Decodes ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: a list or an array of one dimension.
            skip_special: leave out control tokens, except those in `shown`.

        Returns:
            The text, exactly as the tokens spell it.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = False, continued: bool = False) -> bytes:
        """Decodes ids into the bytes they spell.

        Args:
            ids: as in `decode`.
            skip_special: as in `decode`.
            continued: the ids follow others; of no matter unless a vocabulary treats the beginning of a text apart.

        Raises:
            InputError: as `decode`.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if skip_special:
            ids = [index for index in ids if index not in self._skipped]
        try:
            if min(ids, default=0) < 0:
                raise IndexError
            return b"".join([self._spellings[index] for index in ids])
        except (IndexError, TypeError):
            raise self._bad_ids(ids) from None

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes ids as they are sampled and holds back incomplete characters."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, index: int) -> bytes:
        """The bytes one token spells."""
        return self.decode_bytes([index], continued=True)

    def split_controls(self, text: str, allowed_special: Collection[str]) -> list[str | int]:
        """Cuts a text at control tokens.

        Args:
            text: the text.
            allowed_special: the names to cut at, or "all".

        Returns:
            The text between control tokens as strings, and control tokens as ids, in order.

        Raises:
            InputError: a name that is not a control token of this vocabulary.
        """
        if isinstance(allowed_special, str):
            if allowed_special != "all":
                raise InputError(f'allowed_special is {allowed_special!r}; it is "all" or a set of control tokens')
            names = self._control_names
        else:
            names = tuple(sorted(allowed_special))
            unknown = next((name for name in names if name not in self.special_tokens), None)
            if unknown is not None:
                raise InputError(f"allowed_special names {unknown!r}, which is not a control token of {self!r}")
        if not names:
            return [text]
        parts = _pattern_of(names).split(text)
        return [self.special_tokens[part] if i % 2 else part for i, part in enumerate(parts) if part]

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike, *, chat_template: str | None = None) -> None:
        """Writes the tokenizer where `load` finds it."""

    @abc.abstractmethod
    def _encode_data(self, text: str) -> list[int]:
        """Encodes text that holds no control token."""

    def _encode_at(self, index: int, text: str, allowed_special: Collection[str]) -> list[int]:
        try:
            return self.encode(text, allowed_special=allowed_special)
        except InputError as error:
            raise InputError(f"texts[{index}]: {error}") from None

    def _bad_ids(self, ids: Iterable[int]) -> InputError:
        for position, index in enumerate(ids):
            if not hasattr(index, "__index__"):
                return InputError(f"ids[{position}] is {index!r}, which is not an integer")
            if not 0 <= index < self.vocab_size or self._spellings[index] is None:
                return InputError(
                    f"ids[{position}] is {index}, which is not in the vocabulary of {self.vocab_size:,} tokens "
                    "(rows of an embedding beyond it are padding, and are never to be sampled)"
                )
        return InputError(f"ids is {type(ids).__name__}; it has to be a sequence of integers")


def check_encodable(text: str) -> None:
    """Holds that a text can be written as UTF-8.

    Raises:
        InputError: the text has a lone surrogate; the message says where.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which is no Unicode text; decode the bytes it came from as UTF-8 with errors='replace'"
        ) from None


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"the text is {type(text).__name__}; it has to be str")
    check_encodable(text)


@lru_cache(maxsize=64)
def _pattern_of(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, names)) + ")")
