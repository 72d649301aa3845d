"""Products of two arrays, written as an einsum, as one product of two matrices where nothing is split."""

import math

import jax
import jax.numpy as jnp


def product(spec: str, x: jax.Array, y: jax.Array, *, joined: bool, **how) -> jax.Array:
    """Returns the einsum of x and y, float of any type.

    XLA:CPU multiplies matrices; of more axes it makes matrices itself, after it has put the axes of the sum first by a
    copy of the whole array, in the gradients too. Axes that are joined beforehand cost nothing. On a mesh they stay
    apart, because joined ones cannot be split one by one, and on a TPU, which gains nothing by it.

    Args:
      spec: as "BTD,DNH->BTNH": the axes of the sum are the last or the first ones of x and of y, and the result has the
        other ones of x and then those of y.
      x, y: the arrays.
      joined: whether axes are joined: all is on one CPU.
      how: of `jnp.einsum`.
    """
    if not joined:
        return jnp.einsum(spec, x, y, **how)
    (letters_x, letters_y), out = spec.split("->")[0].split(","), spec.split("->")[1]
    summed = [letter for letter in letters_x if letter not in out]
    matrices, kept, shape = [], [], []
    for array, letters in ((x, letters_x), (y, letters_y)):
        first = letters[0] in summed
        sizes = array.shape[len(summed) :] if first else array.shape[: -len(summed)]
        rest = math.prod(sizes)
        matrices.append(array.reshape((-1, rest) if first else (rest, -1)))
        kept.append("SX" if first else "XS")
        shape += sizes
    left, right = kept[0], kept[1].replace("X", "Y")
    return jnp.einsum(f"{left},{right}->XY", *matrices, **how).reshape(shape)
