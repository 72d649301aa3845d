"""Long documents where there are only short ones, and the pass key: what shows whether a model reads far.

Shapes: T tokens of a document.
"""

from collections.abc import Sequence

import numpy as np

from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

DIGITS = 5
NEEDLE, QUESTION = "\nThe pass key is {}. Remember it.\n", "\nWhat is the pass key? The pass key is "


def joined(documents: Sequence[Document], *, seed: int) -> Document:
    """Returns all documents as one, in an order shuffled by the seed.

    Rows cut from it are one document each, however long: a model that reads one sees across the ends of texts, which
    `<|endoftext|>` tells it. What is far away is real text, but says little about what comes.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    return Document(*(np.concatenate([documents[i][field] for i in order]) for field in range(2)))


def mixed_lengths(document: Document, length: int, *, shortest: int, full: float, seed: int) -> list[Document]:
    """Cuts a document into sequences of `length`, and others shorter than that, in the order of the text.

    Args:
      document: of at least `length` tokens; the end that fills no sequence is left out.
      length: of the longest.
      shortest: the others' lengths are drawn evenly from shortest ... length - 1.
      full: share of the sequences, counted as sequences, that are of `length`; 0 to 1.
      seed: of the draw.

    Raises:
      InputError: where there is not one sequence, or no shorter one could be.
    """
    if not (0 <= full <= 1 and (full == 1 or 2 <= shortest < length)):
        raise InputError(
            f"a share of {full} in full and shortest {shortest} of {length}; expected 0 to 1, and 2 to less than length"
        )
    rng, parts, start = np.random.default_rng(seed), [], 0
    while True:
        size = length if full == 1 or rng.random() < full else int(rng.integers(shortest, length))
        if start + size > len(document.ids):
            break
        parts.append(Document(*(x[start : start + size] for x in document)))
        start += size
    if not parts:
        raise InputError(f"the text has {len(document.ids)} tokens; expected at least {length} for one sequence")
    return parts


def passkeys(
    text: Document, tok: Tokenizer, lengths: Sequence[int], *, seed: int, spread: bool = False
) -> list[Document]:
    """Hides random numbers in pieces of a text (the task of Mohtashami & Jaggi, arXiv:2305.16300).

    Args:
      text: what the numbers are hidden in; pieces are taken in turn, from the start again where it ends.
      tok: encodes needle and question; each digit is one token in every Qwen vocabulary.
      lengths: T of each example, its answer included.
      seed: of numbers and depths.
      spread: the numbers stand at depths spread evenly from start to end, as a test wants them; False draws depths.

    Returns:
      Documents of T tokens, the last DIGITS of them the answer, which alone is to be learned.

    Raises:
      InputError: where needle and question leave no room for text, or the text is shorter than one example.
    """
    rng = np.random.default_rng(seed)
    question, found, start = tok.encode(QUESTION), [], 0
    for number, length in enumerate(lengths):
        digits = "".join(map(str, rng.integers(0, 10, DIGITS)))
        answer, needle = tok.encode(digits), tok.encode(NEEDLE.format(digits))
        room = length - len(needle) - len(question) - len(answer)
        if not 0 <= room <= len(text.ids) or len(answer) != DIGITS:
            raise InputError(
                f"a pass key of {len(answer)} tokens in {length} leaves {room} for a text of {len(text.ids)}; expected "
                f"{DIGITS} tokens, and 0 to all of the text"
            )
        start = start if start + room <= len(text.ids) else 0
        filler, start = text.ids[start : start + room], start + room
        place = int(((number + 0.5) / len(lengths) if spread else rng.random()) * (room + 1))
        ids = np.concatenate([filler[:place], needle, filler[place:], question, answer]).astype(np.int32)
        found.append(Document(ids, np.arange(length) >= length - DIGITS))
    return found


def shortest_passkey(tok: Tokenizer) -> int:
    """Returns the length of an example of `passkeys` without any text around."""
    return len(tok.encode(NEEDLE.format("0" * DIGITS))) + len(tok.encode(QUESTION)) + DIGITS
