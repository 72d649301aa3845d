"""Makes losses.npz with trl 1.16.0; run where it is, once for each change of what is checked.

python -m tests.golden.preferences.make

Holds the arrays of tests/parity/trl_losses.py and, as "loss/NAME", what trl's own code makes of them.
"""

import pathlib

import numpy as np

from tests.parity import trl_losses


def main() -> None:
    x = trl_losses.arrays()
    made = {f"loss/{name}": np.float32(value) for name, value in trl_losses.losses(x).items()}
    np.savez(pathlib.Path(__file__).with_name("losses.npz"), **x, **made)


if __name__ == "__main__":
    main()
