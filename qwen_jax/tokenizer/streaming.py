"""Decoding token by token: text is given out as soon as it is certain, never half a character."""

import codecs
from collections.abc import Iterable


class StreamDecoder:
    """Turns ids into text as they arrive; `Tokenizer.stream` makes one.

    The parts given out, joined, are what `Tokenizer.decode` gives for all the ids at once.
    """

    def __init__(self, tokenizer, *, skip_special: bool = False):
        self._tokenizer, self._skip_special, self._begun = tokenizer, skip_special, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Takes the next id or ids.

        Args:
            ids: one id, or several in order.

        Returns:
            The text that is now certain; empty while a character is incomplete.
        """
        ids = list(ids) if isinstance(ids, Iterable) else [ids]
        spelt = self._tokenizer.decode_bytes(ids, skip_special=self._skip_special, continued=self._begun)
        self._begun = self._begun or bool(ids)
        return self._utf8.decode(spelt)

    def finish(self) -> str:
        """Ends the stream: the rest of the text, an incomplete character as U+FFFD. The decoder is then as new."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        self._begun = False
        return rest
