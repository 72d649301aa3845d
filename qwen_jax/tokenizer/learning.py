"""Learning a byte-level vocabulary from text; the `tokenizers` library counts and merges."""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import controls, splitting
from qwen_jax.tokenizer.alphabet import to_bytes
from qwen_jax.tokenizer.byte_bpe import ByteBPE
from qwen_jax.tokenizer.face import check_encodable


def train(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Iterable[str] = controls.CHATML,
    *,
    min_frequency: int = 2,
    progress: bool | None = None,
) -> ByteBPE:
    """Learns a byte-level vocabulary: the 256 bytes, then again and again the most frequent pair of neighbours.

    Text is brought to normal form C and cut by Qwen's pattern, so that digits stand singly and no token crosses a
    piece. Of equally frequent pairs, the one whose first token (then second) was learned earlier comes first. Texts
    are read once, as a stream; the memory needed grows with the number of different pieces, not with the text.

    Args:
        texts: any iterable of strings.
        vocab_size: the size to reach, regular tokens and `special_tokens` together.
        special_tokens: control tokens, which follow the regular tokens.
        min_frequency: a pair seen less often is not merged, even if the vocabulary stays smaller (with a warning).
        progress: whether to show a bar on standard error; by default, when that is a terminal.

    Returns:
        The tokenizer.

    Raises:
        InputError: a text is not a string or not encodable, `vocab_size` is too small, or control tokens overlap.

    References:
        Sennrich et al. 2016 (arXiv:1508.07909); qwen_spec.md 1.5.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    special_tokens = tuple(special_tokens)
    controls.check(special_tokens, "special_tokens")
    if not isinstance(vocab_size, int) or vocab_size < 256 + len(special_tokens):
        raise InputError(
            f"vocab_size is {vocab_size!r}; it has to be an integer of at least {256 + len(special_tokens)}: "
            f"256 bytes and {len(special_tokens)} control tokens"
        )
    machine = Tokenizer(models.BPE())
    machine.normalizer = normalizers.NFC()
    machine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(splitting.QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        min_frequency=min_frequency,
        show_progress=sys.stderr.isatty() if progress is None else progress,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    machine.train_from_iterator(checked(texts), trainer)
    vocabulary = {to_bytes(text): i for text, i in json.loads(machine.to_str())["model"]["vocab"].items()}
    if len(vocabulary) + len(special_tokens) < vocab_size:
        warnings.warn(
            f"the text has too few pairs seen {min_frequency} times or more: the vocabulary has "
            f"{len(vocabulary) + len(special_tokens):,} tokens, not {vocab_size:,}",
            stacklevel=2,
        )
    return ByteBPE(vocabulary, {name: len(vocabulary) + i for i, name in enumerate(special_tokens)})


def checked(texts: Iterable[str]) -> Iterator[str]:
    """Passes texts on, and holds that each is an encodable string.

    Raises:
        InputError: one is not; the message names its index.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; it has to be an iterable of strings, such as a list or an open file")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{index}] is {type(text).__name__}; it has to be str")
        try:
            check_encodable(text)
        except InputError as error:
            raise InputError(f"texts[{index}]: {error}") from None
        yield text
