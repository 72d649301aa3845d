"""Continuing a vocabulary: further merges learned on top of those it has, under new ids behind all others."""

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.byte_bpe import ByteBPE
from qwen_jax.tokenizer.learning import checked

Pair = tuple[int, int]


def extend(
    tok: ByteBPE,
    words: Mapping[str, int] | Iterable[str],
    vocab_size: int | None = None,
    *,
    min_frequency: int = 2,
) -> ByteBPE:
    """Learns further merges on top of a vocabulary, which keeps every id and every priority.

    Pieces are first encoded with the vocabulary as it is; then the most frequent pair of neighbours is merged, again
    and again. Of equally frequent pairs, the one of lower ids comes first.

    Args:
        tok: the vocabulary to continue.
        words: how often each word occurs, where a word is one piece of Qwen's pattern (words that are tokens already
            teach nothing); or texts, whose pieces are counted.
        vocab_size: the size to reach, control tokens included; by default, until no pair is frequent enough.
        min_frequency: a pair seen less often is not merged.

    Returns:
        A new tokenizer; its first new id is `tok.vocab_size`.

    Raises:
        InputError: a word that the pattern would cut, a count that is no positive integer, or `vocab_size` too small.

    References:
        qwen_spec.md 1.5; the rule of the Qwen repository for adding merges.
    """
    if not isinstance(tok, ByteBPE):
        raise InputError(f"only a byte-level vocabulary can be continued, and this is a {type(tok).__name__}")
    if vocab_size is not None and vocab_size <= tok.vocab_size:
        raise InputError(
            f"vocab_size is {vocab_size}; the vocabulary to continue has {tok.vocab_size:,} tokens already"
        )
    counts = _checked_counts(tok, words) if isinstance(words, Mapping) else _count_pieces(tok, words)
    learner = _Learner([(tok.encode_piece(piece), count) for piece, count in counts.items()])
    vocabulary, order, spellings = dict(tok.vocabulary), list(tok.order), {}
    while vocab_size is None or tok.vocab_size + len(spellings) < vocab_size:
        pair = learner.most_frequent(min_frequency)
        if pair is None:
            break
        token = b"".join(spellings.get(half) or tok.token_bytes(half) for half in pair)
        index = vocabulary.get(token)
        if index is None:  # else it was in the vocabulary, and only no merge led to it
            index = vocabulary[token] = tok.vocab_size + len(spellings)
            spellings[index] = token
        order.append(token)
        learner.merge(pair, index)
    if vocab_size is not None and tok.vocab_size + len(spellings) < vocab_size:
        found = tok.vocab_size + len(spellings)
        warnings.warn(
            f"too few pairs seen {min_frequency} times or more: the vocabulary has {found:,} tokens, "
            f"not {vocab_size:,}",
            stacklevel=2,
        )
    longer = ByteBPE(vocabulary, tok.special_tokens, order=order, pattern=tok.pattern, nfc=tok.nfc, shown=tok.shown)
    longer.chat_template = tok.chat_template
    return longer


def _checked_counts(tok: ByteBPE, words: Mapping[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for word, (text, count) in zip(checked(words), words.items(), strict=True):
        if type(count) is not int or count < 1:
            raise InputError(f"word {word!r}: its count is {count!r}; it has to be a positive integer")
        pieces = list(tok.pieces(text))
        if len(pieces) != 1:
            raise InputError(
                f"word {word!r} is cut into {pieces[:5]} before merging, so that it can never be one token"
            )
        counts[pieces[0]] += count
    return counts


def _count_pieces(tok: ByteBPE, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in checked(texts):
        counts.update(tok.pieces(text))
    return counts


class _Learner:
    """Pieces with their counts, and how often each pair of neighbours occurs in them, kept up to date."""

    def __init__(self, pieces: list[tuple[list[int], int]]):
        self._pieces = pieces
        self._counts: Counter[Pair] = Counter()
        self._holders: defaultdict[Pair, set[int]] = defaultdict(set)
        for number in range(len(pieces)):
            self._count(number, 1)
        # Most frequent first, then lower ids. Whenever a count changes an entry is added; those out of date are passed.
        self._queue = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._queue)

    def most_frequent(self, min_frequency: int) -> Pair | None:
        """The pair to merge next; None when none is frequent enough."""
        while self._queue:
            count, pair = heapq.heappop(self._queue)
            if -count == self._counts[pair]:
                return pair if -count >= max(min_frequency, 1) else None
        return None

    def merge(self, pair: Pair, index: int) -> None:
        """Replaces a pair by a token in every piece, from the left."""
        changed: set[Pair] = set()
        for number in list(self._holders[pair]):
            changed |= self._count(number, -1)
            _replace(self._pieces[number][0], pair, index)
            changed |= self._count(number, 1)
        for other in changed:
            heapq.heappush(self._queue, (-self._counts[other], other))

    def _count(self, number: int, sign: int) -> set[Pair]:
        """Adds (or takes away) the pairs of one piece."""
        piece, count = self._pieces[number]
        pairs = list(zip(piece, piece[1:], strict=False))
        for pair in pairs:
            self._counts[pair] += sign * count
            (self._holders[pair].add if sign > 0 else self._holders[pair].discard)(number)
        return set(pairs)


def _replace(piece: list[int], pair: Pair, index: int) -> None:
    at = 0
    while at < len(piece) - 1:
        if (piece[at], piece[at + 1]) == pair:
            piece[at : at + 2] = [index]
        at += 1
