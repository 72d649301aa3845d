"""Byte-level byte-pair encoding, the tokenizer of every Qwen model; `tiktoken` does the merging."""

import functools
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import controls, splitting, writing
from qwen_jax.tokenizer.face import Tokenizer

# tiktoken's regex engine gives up on about a million white-space characters in a row. Every run this long covers one
# of the aligned blocks of half its length, so a look at each block's first character nearly always settles it.
_LONG_RUN = 250_000


class ByteBPE(Tokenizer):
    """A tokenizer whose tokens are made of bytes; with all bytes among them, as in Qwen's, it knows every text.

    Attributes:
        order: the tokens that merging can make, single bytes included, in order of priority.
        vocabulary: the id of every regular token by the bytes it spells.
        pattern: the regular expression that cuts text into pieces.
        nfc: whether text is brought to Unicode normal form C first.
    """

    def __init__(
        self,
        vocabulary: dict[bytes, int],
        special_tokens: dict[str, int],
        *,
        order: Sequence[bytes] | None = None,
        pattern: str = splitting.QWEN,
        nfc: bool = True,
        shown: Collection[str] = controls.SHOWN,
    ):
        """Builds a tokenizer from its parts.

        Args:
            vocabulary: the id of every regular token.
            special_tokens: the id of every control token.
            order: the tokens in order of merging; by default all of them, by id.
            pattern: how text is cut.
            nfc: whether to normalise.
            shown: control tokens that decoding never skips.

        Raises:
            InputError: an ASCII character is missing, or an id is given twice.
        """
        super().__init__({i: token for token, i in vocabulary.items()}, special_tokens, shown=shown)
        self.vocabulary, self.pattern, self.nfc = vocabulary, pattern, nfc
        self.order = tuple(order) if order is not None else tuple(sorted(vocabulary, key=vocabulary.__getitem__))
        if self.regular_size != len(vocabulary):
            raise InputError("two tokens of the vocabulary have the same id")
        for name, index in special_tokens.items():
            if vocabulary.get(name.encode("utf-8", "replace"), index) != index:
                raise InputError(f"the control token {name!r} is spelled like the regular token {name!r}")
        self._missing = bytes(byte for byte in _UTF8_BYTES if bytes([byte]) not in vocabulary)
        if lost := self._missing.translate(None, bytes(set(range(256)) - set(_ESSENTIAL))):
            raise InputError(f"the vocabulary lacks the byte {lost[:1]!r} and {len(lost) - 1} other ASCII characters")

    def _encode_data(self, text: str) -> list[int]:
        text = self._normalised(text)
        if self._missing:
            self._check_spellable(text)
        if len(text) >= _LONG_RUN and _has_long_run(text):
            return [index for piece in self._cut(text) for index in self.encode_piece(piece)]
        return self._numbered(self._merger.encode_ordinary(text))

    def pieces(self, text: str) -> Iterator[str]:
        """The pieces, inside which alone bytes are merged, of a text brought to normal form."""
        return self._cut(self._normalised(text))

    def encode_piece(self, piece: str) -> list[int]:
        """Encodes one piece, as it is."""
        if self._missing:
            self._check_spellable(piece)
        return self._numbered(self._uncut.encode_ordinary(piece))

    def save(self, folder: str | os.PathLike, *, chat_template: str | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` and transformers read.

        Each file appears whole or not at all. Merges are derived from the order of the tokens.

        Args:
            folder: made if it is missing; other files in it are left alone.
            chat_template: a Jinja template for other programs, such as `chat.jinja` gives; by default, the one the
                tokenizer was loaded with, if any.
        """
        writing.write(self, folder, chat_template)

    @functools.cached_property
    def _ids(self) -> list[int] | None:
        """The id of each rank; None where ids rise with the ranks, and so can serve as ranks themselves."""
        ids = [self.vocabulary[token] for token in self.order]
        return None if all(a < b for a, b in zip(ids, ids[1:], strict=False)) else ids

    @functools.cached_property
    def _merger(self):
        return self._encoding(self.pattern)

    @functools.cached_property
    def _uncut(self):
        return self._encoding(r"[\s\S]+")

    def _encoding(self, pattern: str):
        import tiktoken

        ranks = enumerate(self.order) if self._ids else ((self.vocabulary[token], token) for token in self.order)
        ranks = {token: rank for rank, token in ranks}
        return tiktoken.Encoding("qwen_jax", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def _cut(self, text: str) -> Iterator[str]:
        import regex

        return (match.group() for match in regex.finditer(self.pattern, text))

    def _normalised(self, text: str) -> str:
        if not self.nfc or text.isascii() or unicodedata.is_normalized("NFC", text):
            return text
        return unicodedata.normalize("NFC", text)

    def _check_spellable(self, text: str) -> None:
        content = text.encode()
        if len(content.translate(None, self._missing)) < len(content):
            character = next(c for c in text if set(c.encode()) & set(self._missing))
            raise InputError(f"the text has {character!r} (U+{ord(character):04X}), whose bytes the vocabulary lacks")

    def _numbered(self, ranks: list[int]) -> list[int]:
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def __getstate__(self) -> dict:
        # A worker process builds its own encoder; tiktoken's is cheaper to build than to send.
        return {name: value for name, value in self.__dict__.items() if name not in ("_merger", "_uncut")}


# Bytes that occur in UTF-8; the other 13 (0xC0, 0xC1, 0xF5..0xFF) are in no text. Vocabularies learned by others may
# lack rare ones (SmolLM2 lacks 0x04), but one without letters or line breaks is damaged.
_UTF8_BYTES = tuple(byte for byte in range(0xF5) if byte not in (0xC0, 0xC1))
_ESSENTIAL = bytes([*b"\t\n\r", *range(0x20, 0x7F)])


def _has_long_run(text: str) -> bool:
    for start in range(0, len(text), _LONG_RUN // 2):
        if text[start].isspace() and text[start : start + _LONG_RUN // 2].isspace():
            return True
    return False
