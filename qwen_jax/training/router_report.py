"""What routers did, for a reader: tables of balance layer by layer, and heat maps of the load."""

import pathlib

import numpy as np

from qwen_jax.objectives import router_use
from qwen_jax.training.page import Table


def table(counts_LE: np.ndarray) -> Table:
    """Returns the balance of each layer.

    Args:
      counts_LE: [layers with experts, E] how often each expert was chosen.
    """
    rows = zip(router_use.entropy(counts_LE), router_use.overload(counts_LE), router_use.load(counts_LE), strict=True)
    return Table(
        ["layer with experts", "entropy of the load (1: even)", "busiest over mean", "least over mean"],
        [
            [str(layer), f"{entropy:.4f}", f"{overload:.2f}", f"{load_E.min() * load_E.size:.2f}"]
            for layer, (entropy, overload, load_E) in enumerate(rows)
        ],
    )


def heat_maps(path: pathlib.Path, counts: dict[str, np.ndarray], *, columns: int = 1) -> None:
    """Draws the load of each expert over the mean load, layers downwards, one map for each title.

    Args:
      path: the PNG to write.
      counts: title -> [layers with experts, E].
      columns: of maps.
    """
    from matplotlib.figure import Figure

    rows = -(-len(counts) // columns)
    figure = Figure(figsize=(5.5 * columns, 1.2 + 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(counts) :]:
        axes.axis("off")
    for axes, (title, counts_LE) in zip(grid.flat, counts.items(), strict=False):
        load_LE = router_use.load(counts_LE)
        image = axes.imshow(load_LE * load_LE.shape[-1], aspect="auto", vmin=0, vmax=4, cmap="viridis")
        axes.set(title=title, xlabel="expert", ylabel="layer", yticks=range(len(load_LE)))
    figure.colorbar(image, ax=grid, label="load over mean load", extend="max")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
