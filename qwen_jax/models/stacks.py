"""Which layers are scanned together: runs of equal layers, or of a repeated pattern with experts here and there."""

from typing import NamedTuple

import jax

from qwen_jax.config import QwenConfig

LONGEST_PATTERN = 8  # layers compiled as one step of a scan


class Stack(NamedTuple):
    """Some successive layers that one scan runs.

    Attributes:
      name: of its parameters: "layers" where there is no other, else "layers_0", "layers_1", ...
      first: its first layer.
      sparse: for each layer of the pattern whether it has experts.
      repeats: how often the pattern follows itself, the length of the scan.
    """

    name: str
    first: int
    sparse: tuple[bool, ...]
    repeats: int

    def layers(self, place: int) -> range:
        """Returns the numbers of the layers that stand at this place of the pattern."""
        stop = self.first + self.repeats * len(self.sparse)
        return range(self.first + place, stop, len(self.sparse))

    def blocks(self) -> list[tuple[str, ...]]:
        """Returns where the parameters of each layer of the pattern are, each stacked over the repeats."""
        if len(self.sparse) == 1:
            return [(self.name,)]
        return [(self.name, f"block_{place}") for place in range(len(self.sparse))]

    def cut(self, tree):
        """Returns its part of arrays [L, ...] as [repeats, ...], or [repeats, pattern, ...] for a longer pattern."""
        count, period = self.repeats * len(self.sparse), len(self.sparse)
        shape = (self.repeats,) if period == 1 else (self.repeats, period)
        return jax.tree.map(lambda x: x[self.first : self.first + count].reshape(*shape, *x.shape[1:]), tree)

    def joined(self, tree):
        """Inverse of `cut`, for this stack's layers alone."""
        return tree if len(self.sparse) == 1 else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def stacks(config: QwenConfig) -> tuple[Stack, ...]:
    """Cuts the layers into as few scans as they allow: the longest repetition from each layer on."""
    sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    found, first = [], 0
    while first < len(sparse):
        best = max(_repetitions(sparse[first:]), key=lambda one: len(one[0]) * one[1])
        found.append((first, *best))
        first += len(best[0]) * best[1]
    names = ["layers"] if len(found) == 1 else [f"layers_{i}" for i in range(len(found))]
    return tuple(Stack(name, *one) for name, one in zip(names, found, strict=True))


def _repetitions(kinds: list[bool]):
    """Yields (pattern, how often the kinds begin with it), the shortest first; patterns of several at least twice."""
    for period in range(1, min(LONGEST_PATTERN, len(kinds)) + 1):
        pattern, repeats = tuple(kinds[:period]), 1
        while tuple(kinds[repeats * period : (repeats + 1) * period]) == pattern:
            repeats += 1
        if period == 1 or repeats > 1:
            yield pattern, repeats
