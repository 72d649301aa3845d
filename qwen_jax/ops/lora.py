"""Low-rank adaptation (LoRA, arXiv:2106.09685): a frozen kernel W plus a product A·B of low rank, and DoRA
(arXiv:2402.09353), which gives the sum a trained length for each output.

Adapters are a tree of their own beside the parameters, nested alike. A kernel [*S, *in, *out] (S: axes that are
stacked, layers first) has

    a [*S, *in, R], b [*S, R, *out]    and for DoRA    magnitude [*S, *out],

and trained rows of the vocabulary are {"rows": {"embedding": [n, D], "head": [n, D]}} ("head" where it is untied). A
reward model's {"score": [1, D]} takes the place of the parameter.
`join` puts them where a model's layers find them; `merge` turns the joined tree into plain parameters.
"""

import functools
import math

import jax
import jax.numpy as jnp

ADAPTER = ("a", "b", "magnitude")


def adapted(spec: str, y: jax.Array, x: jax.Array, kernel: jax.Array, adapter: dict) -> jax.Array:
    """Returns (y + x·A·B) · magnitude / |W + A·B|, without the sum W + A·B ever being formed.

    Args:
      spec: einsum of x and kernel whose result is y, "BTD,DNH->BTNH"; the output axes of the kernel come last in y.
      y: x · W, without a bias.
      x: input of the adapter, in the type the products are computed in (after dropout, say).
      kernel: W.
      adapter: "a", "b" (the scale already in it) and, for DoRA, "magnitude"; without stacked axes.
    """
    x_letters, w_letters, y_letters = spec.replace("->", ",").split(",")
    a_letters, b_letters = _letters(w_letters, y_letters)
    a, b = (adapter[name].astype(x.dtype) for name in ("a", "b"))
    y = y + _product((x_letters, a_letters, b_letters, y_letters), x, a, b)
    if "magnitude" in adapter:
        ratio = adapter["magnitude"] / jax.lax.stop_gradient(_lengths(kernel, adapter, w_letters, a_letters, b_letters))
        y = y * ratio.astype(y.dtype).reshape((1,) * (y.ndim - ratio.ndim) + ratio.shape)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(letters: tuple[str, str, str, str], x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns x·A·B. Its gradient is written out: derived by JAX, that of B is laid out so that it takes 20 times as
    long on a CPU as this one, and a third of the kernel's own product.
    """
    return _product_forward(letters, x, a, b)[0]


def _product_forward(letters, x, a, b):
    x_letters, a_letters, b_letters, y_letters = letters
    low = jnp.einsum(f"{x_letters},{a_letters}->{_low(letters)}", x, a)
    return jnp.einsum(f"{_low(letters)},{b_letters}->{y_letters}", low, b), (x, a, b, low)


def _product_backward(letters, kept, grad):
    x_letters, a_letters, b_letters, y_letters = letters
    x, a, b, low = kept
    grad_low = jnp.einsum(f"{y_letters},{b_letters}->{_low(letters)}", grad, b)
    grad_b = jnp.einsum(f"{_low(letters)},{y_letters}->{b_letters}", low, grad)
    grad_a = jnp.einsum(f"{x_letters},{_low(letters)}->{a_letters}", x, grad_low)
    return jnp.einsum(f"{_low(letters)},{a_letters}->{x_letters}", grad_low, a), grad_a, grad_b


def _low(letters) -> str:
    return "".join(c for c in letters[0] if c not in letters[1]) + "R"


_product.defvjp(_product_forward, _product_backward)


def _letters(w_letters: str, y_letters: str) -> tuple[str, str]:
    inner = "".join(c for c in w_letters if c not in y_letters)
    return inner + "R", "R" + "".join(c for c in w_letters if c in y_letters)


def _lengths(kernel, adapter, w_letters: str, a_letters: str, b_letters: str) -> jax.Array:
    """|W + A·B| of each output in float32, by |W|² + 2 (WᵀA)·B + |A·B|²: R columns more to hold, not a kernel.

    No gradient goes through it (DoRA, section 4.3).
    """
    f32 = lambda x: x.astype(jnp.float32)
    kernel, a, b = f32(kernel), f32(adapter["a"]), f32(adapter["b"])
    out = b_letters[1:]
    cross = jnp.einsum(f"{w_letters},{a_letters}->{b_letters}", kernel, a)
    gram = jnp.einsum(f"{a_letters},{a_letters.replace('R', 'S')}->SR", a, a)
    cross = 2 * cross + jnp.einsum(f"SR,{b_letters}->S{out}", gram, b)
    square = jnp.einsum(f"{w_letters},{w_letters}->{out}", kernel, kernel) + jnp.sum(cross * b, axis=0)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def lengths(kernel: jax.Array, stacked: int, inner: int) -> jax.Array:
    """Returns the length of W along its `inner` input axes, after `stacked` ones, in float32."""
    axes = tuple(range(stacked, stacked + inner))
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes))


def scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """Returns the factor of A·B: alpha / rank, or alpha / sqrt(rank) (rank-stabilised, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def join(params: dict, adapters: dict, *, scale: float, row_ids: tuple[int, ...] = ()) -> dict:
    """Returns one tree for the model: the adapters beside the kernels they belong to, the scale in each b.

    Args:
      params: of the model, not copied.
      adapters: as above.
      scale: from `scale`.
      row_ids: which rows of the vocabulary "rows" are.
    """
    joined = dict(params)
    for name, value in adapters.items():
        if name == "rows":
            joined[name] = {**value, "ids": jnp.array(row_ids, jnp.int32)}
        elif isinstance(value, dict):
            joined[name] = join(params[name], value, scale=scale)
        else:
            joined[name] = value * scale if name == "b" else value
    return joined


def is_joined(params: dict) -> bool:
    """Tells a tree that `join` made from plain parameters."""
    return "rows" in params or any(
        name == "a" or (isinstance(value, dict) and is_joined(value)) for name, value in params.items()
    )


def merge(joined: dict) -> dict:
    """Returns plain parameters that compute what the joined tree computes; sums in float32, kept in W's type."""
    merged = {}
    for name, value in joined.items():
        if name == "kernel" and "a" in joined:
            merged[name] = merge_kernel(value, {part: joined[part] for part in ADAPTER if part in joined})
        elif name not in (*ADAPTER, "rows"):
            merged[name] = merge(value) if isinstance(value, dict) else value
    for name, rows in joined.get("rows", {}).items():
        if name != "ids":
            table = jnp.asarray(joined[name])
            merged[name] = table.at[joined["rows"]["ids"]].set(rows.astype(table.dtype))
    return merged


def merge_kernel(kernel: jax.Array, adapter: dict) -> jax.Array:
    """Returns (W + A·B) · magnitude / |W + A·B| in W's type, for a kernel with any stacked axes.

    Args:
      kernel: W.
      adapter: "a", "b" (the scale already in it), "magnitude" for DoRA.
    """
    a, b = adapter["a"].astype(jnp.float32), adapter["b"].astype(jnp.float32)
    stacked = a.ndim + b.ndim - 2 - kernel.ndim
    product = lambda a, b: jnp.tensordot(a, b, axes=1)
    for _ in range(stacked):
        product = jax.vmap(product)
    total = kernel.astype(jnp.float32) + product(a, b)
    if "magnitude" in adapter:
        inner = a.ndim - 1 - stacked
        ratio = adapter["magnitude"] / lengths(total, stacked, inner)
        total *= jnp.expand_dims(ratio, tuple(range(stacked, stacked + inner)))
    return total.astype(kernel.dtype)
