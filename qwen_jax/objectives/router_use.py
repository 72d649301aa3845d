"""What routers did with data of several domains, from how often each expert was chosen: numbers for a report.

Shapes: D domains, L layers with experts, E experts. All functions take counts as `ops.routing.Routing.counts`, summed
over the rows of a domain, and reduce the last axis; float64 on the host.
"""

import numpy as np


def load(counts_E) -> np.ndarray:
    """Returns each expert's share of all choices, [..., E]; 0 where nothing was chosen."""
    counts_E = np.asarray(counts_E, np.float64)
    total = counts_E.sum(axis=-1, keepdims=True)
    return counts_E / np.where(total > 0, total, 1.0)


def entropy(counts_E) -> np.ndarray:
    """Returns the entropy of the load over that of an even one, [...]: 1 is even, 0 is one expert for all."""
    E = np.shape(counts_E)[-1]
    return _entropy(load(counts_E)) / np.log(E) if E > 1 else np.ones(np.shape(counts_E)[:-1])


def overload(counts_E) -> np.ndarray:
    """Returns the busiest expert's load over the mean load, [...]: 1 is even, E is one expert for all."""
    return load(counts_E).max(axis=-1) * np.shape(counts_E)[-1]


def mutual_information(counts_DE) -> np.ndarray:
    """Returns I(domain; expert) in nats, [...] of counts [..., D, E], every domain counting alike.

    0 where experts do not tell domains apart; log D where no expert serves two domains.
    """
    load_DE = load(counts_DE)
    return _entropy(load_DE.mean(axis=-2)) - _entropy(load_DE).mean(axis=-1)


def overlap(counts_DE) -> np.ndarray:
    """Returns the share of the load that two domains put on the same experts, [..., D, D] of counts [..., D, E].

    sum_e min(load_a(e), load_b(e)): 1 where they use experts alike, 0 where they share none.
    """
    load_DE = load(counts_DE)
    return np.minimum(load_DE[..., :, None, :], load_DE[..., None, :, :]).sum(axis=-1)


def specialists(counts_DE, over: float = 1.5) -> np.ndarray:
    """Returns the part of the experts that have more than `over` / D of their load from one domain, all counting alike.

    Args:
      counts_DE: [..., D, E].
      over: 1 is what an expert without preference has from each domain, D what one has that serves a single domain.

    Returns:
      [...]; experts that nobody chose count as none.
    """
    load_DE = load(counts_DE)
    total_E = load_DE.sum(axis=-2)
    threshold = over / load_DE.shape[-2]
    return (load_DE.max(axis=-2) > threshold * np.where(total_E > 0, total_E, np.inf)).mean(axis=-1)


def _entropy(p_E: np.ndarray) -> np.ndarray:
    return -np.sum(p_E * np.log(np.where(p_E > 0, p_E, 1.0)), axis=-1)
