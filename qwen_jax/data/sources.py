"""Conversations by name: where an experiment's `dataset` field leads."""

from collections.abc import Sequence

from qwen_jax.errors import InputError

NAMES = ("chitchat", "made-up")


def load(name: str, split: str) -> Sequence[list[dict[str, str]]]:
    """Returns the conversations of a split ("train", "validation", "test"), each a list of OpenAI messages.

    Args:
      name: "chitchat", 4,000 chats between people, fetched from the package registry on first use; or "made-up", sums
        asked and answered, made on the spot.

    Raises:
      InputError: on an unknown name or split, or where the data cannot be had.
    """
    if name == "chitchat":
        from qwen_jax.data import chitchat

        return chitchat.load(split)
    if name == "made-up":
        from qwen_jax.data import made_up

        return made_up.load(split)
    raise InputError(f"no dataset is called {name!r}; expected one of {', '.join(NAMES)}")
