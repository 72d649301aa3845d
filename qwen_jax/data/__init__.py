"""Host side, numpy: sources -> conversations -> packed rows -> batches. Nothing here loads jax or touches a device.

Each module is loaded when it is first named, so importing this package costs nothing.
"""

import importlib

_MODULES = (
    "baseline", "buckets", "chitchat", "conversations", "datasets", "files", "formats", "inspecting", "loader",
    "made_up", "packages", "packing", "preferences", "prompts", "ratings", "sources", "texts", "token_cache",
    "tokenising", "turns",
)  # fmt: skip


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its modules are {', '.join(_MODULES)}")


def __dir__():
    return sorted([*globals(), *_MODULES])
