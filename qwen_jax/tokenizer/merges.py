"""Between ranks (`qwen.tiktoken`) and merges (`merges.txt`): which pair of tokens each token is made of.

Encoding by ranks joins whatever two neighbours spell a token; encoding by merges joins listed pairs only. The two
agree on every text exactly when each token, encoded alone with the ranks below its own, ends as the two halves its
merge lists. `find` derives such a list and `check` proves that a given one is such a list.
"""

from collections.abc import Iterable, Mapping

from qwen_jax.errors import InputError

Halves = dict[bytes, tuple[bytes, bytes]]


def find(order: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """Derives the merges of a vocabulary from the priority of its tokens.

    Args:
        order: every token, the first to be merged first; single bytes anywhere.

    Returns:
        The two halves of each token longer than a byte, in order.

    Raises:
        InputError: a token that no merge of earlier tokens makes, so that no text is ever encoded with it.

    References:
        qwen_spec.md 1.4.
    """
    ranks = {token: rank for rank, token in enumerate(order)}
    halves: Halves = {}
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if (
                ranks.get(left, rank) < rank
                and ranks.get(right, rank) < rank
                and _meet(left, right, rank, ranks, halves)
            ):
                halves[token] = (left, right)
                break
        else:
            raise InputError(f"token {token!r} (rank {rank}) cannot be made by merging two tokens of lower rank")
    return list(halves.values())


def check(merges: Iterable[tuple[bytes, bytes]], order: Iterable[bytes]) -> int | None:
    """Finds the first merge that encoding by ranks would not perform.

    Args:
        merges: pairs, in order of priority.
        order: the single bytes followed by the token each merge makes.

    Returns:
        The index of that merge; None when ranks and merges encode every text alike.
    """
    ranks = {token: rank for rank, token in enumerate(order)}
    halves: Halves = {}
    for index, (left, right) in enumerate(merges):
        token = left + right
        if token in halves or not _meet(left, right, ranks[token], ranks, halves):
            return index
        halves[token] = (left, right)
    return None


def _meet(left: bytes, right: bytes, limit: int, ranks: Mapping[bytes, int], halves: Halves) -> bool:
    """Whether `left` and `right`, encoded as one text with the ranks below `limit`, stay two tokens.

    Walks back in time along the boundary: at each step the token made later is taken apart, and the two neighbours
    that stood there before must not spell a token that would have been merged earlier.
    """
    while ranks.get(left + right, limit) >= limit:
        left_rank = ranks[left] if left in halves else -1
        right_rank = ranks[right] if right in halves else -1
        if left_rank < 0 and right_rank < 0:
            return True
        if left_rank > right_rank:
            limit, left = left_rank, halves[left][1]
        else:
            # Of equal pairs the leftmost is merged first: a tie at this boundary would have crossed it.
            limit, right = right_rank + 1, halves[right][0]
    return False
