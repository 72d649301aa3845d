"""FLOPs inside our kernels, which no compiler reports, from the shapes that go in and come out.

Attention is taken as causal over the whole row, as of one document: half of the square. Grouped products (experts) are
taken as full: every place of the sorted order holds a token, which an even load comes close to.
"""

import math

Array = tuple[str, list[int]]  # dtype, sides
FLOATS = ("bf16", "f16", "f32")


def flops(inputs: list[Array], outputs: list[Array]) -> tuple[str, float]:
    """Returns the kind of a kernel and its FLOPs: "attention", "experts", or ("other", 0) of one not known here.

    Attention on a TPU has arrays [kinds, B, K, blocks, rows, H]; on a GPU queries [kinds, B, T, N, H] and keys
    [B, S, K, H]. Its forward kernel forms 2 products, that of the gradient of queries 3, of keys and values 4.
    """
    floats = [sides for kind, sides in inputs if kind in FLOATS and sides]
    made = [sides for kind, sides in outputs]
    if len(floats) >= 3 and len(floats[0]) == 6:
        query, key, lengths = floats[0], floats[1], (3, 4)
    elif len(floats) >= 3 and len(floats[0]) == 5 and len(floats[1]) == 4:
        query, key, lengths = floats[0], floats[1], (1,)
    else:
        return _grouped(floats, made)
    of_keys = made[0] in (key, key[1:])
    products = 4 if of_keys else 2 if len(made) > 1 else 3
    keys = math.prod(key[axis] for axis in lengths)
    return "attention", products * 2 * math.prod(query[1:]) * keys / 2


def _grouped(floats: list[list[int]], made: list[list[int]]) -> tuple[str, float]:
    if len(floats) >= 2 and len(made) == 1:
        left, right = floats[:2]
        if len(left) == 2 and len(right) == 3 and len(made[0]) == 2:  # rows by the experts' matrices
            return "experts", 2.0 * math.prod(made[0]) * left[1]
        if len(left) == 2 and len(right) == 2 and len(made[0]) == 3:  # the gradient of those
            return "experts", 2.0 * left[0] * left[1] * right[1]
    return "other", 0.0
