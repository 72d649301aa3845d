"""The printable alphabet in which vocabulary files spell bytes: one character for each of the 256 bytes.

`vocab.json`, `merges.txt` and `tokenizer.json` hold byte strings as text: printable Latin-1 characters stand for
themselves, the other bytes for U+0100 onwards in byte order (GPT-2's convention).
"""

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]

# Single bytes take ids 0..255 in this order in every Qwen vocabulary: "!" is 0, newline 198, space 220.
BYTE_ORDER = tuple(bytes([byte]) for byte in _VISIBLE + _HIDDEN)

_TO_TEXT = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
_TO_BYTE = {ord(character): byte for byte, character in _TO_TEXT.items()}


def to_text(token: bytes) -> str:
    """Spells a byte string in the alphabet."""
    return token.decode("latin-1").translate(_TO_TEXT)


def to_bytes(text: str) -> bytes:
    """Reads a byte string spelt in the alphabet.

    Raises:
        ValueError: a character is not of the alphabet.
    """
    token = text.translate(_TO_BYTE)
    if len(token) != len(text) or any(ord(character) not in _TO_BYTE for character in text):
        raise ValueError(f"{text!r} has a character outside the byte alphabet")
    return token.encode("latin-1")
