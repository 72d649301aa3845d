"""What a reward looks at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """An answer and what it answers.

    Attributes:
      messages: of the prompt, {"role", "content"} each, as they were rendered.
      answer: its text, without control tokens.
      ids: its tokens; the one that ended it is among them.
      finished: it ended by itself, and was not cut off.
      reference: what is known of the prompt: the right answer, the task's own record; empty where nothing is.
    """

    messages: Sequence[Mapping[str, str]]
    answer: str
    ids: Sequence[int] = ()
    finished: bool = True
    reference: Mapping[str, Any] = {}

    @property
    def prompt(self) -> str:
        """What the last message of the prompt says."""
        return self.messages[-1]["content"] if self.messages else ""


Reward = Callable[[Sequence[Sample]], Sequence[float]]
