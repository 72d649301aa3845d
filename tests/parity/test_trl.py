"""Our losses are those of trl's own code, on other arrays than the golden ones.

Needs trl and torch. Without them tests/objectives/test_dpo.py checks the same against kept figures.
"""

import numpy as np
import pytest

REASON = "live parity needs trl and torch; tests/objectives/test_dpo.py checks the same without them"
pytest.importorskip("trl", reason=REASON)
pytest.importorskip("datasets", reason=f"trl needs datasets; {REASON}")

from tests.objectives import trl_names  # noqa: E402
from tests.parity import trl_losses  # noqa: E402


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_losses(seed):
    x = trl_losses.arrays(seed)
    expected = trl_losses.losses(x, beta=0.3)
    found = trl_names.losses(x, beta=0.3, kl=trl_losses.KL, kto_weights=trl_losses.KTO_WEIGHTS)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
