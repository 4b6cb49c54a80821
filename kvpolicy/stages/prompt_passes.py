"""What a scorer that reads a prompt again is given, and what it asks for: passes over the cached context."""

import attrs
from torch import Tensor

Span = tuple[int, int]  # first position, and the one behind the last


@attrs.frozen(eq=False)
class Prompt:
    """One row's prompt, pads excluded, in host memory.

    Positions count the tokens of the row from its first one. The prompt is what has come since the last prompt that was
    read again: answers, and earlier prompts that fitted into the budget, are part of it.
    """

    tokens: Tensor  # int64 [n], token ids
    protected: Tensor  # bool [start + n], by position: entries that the policy never evicts, earlier ones included

    @property
    def start(self) -> int:
        """The position of the first token."""
        return self.protected.shape[0] - self.tokens.shape[0]


@attrs.frozen(eq=False)
class Pass:
    """A token sequence that is forwarded behind all that is held, and dropped again."""

    tokens: Tensor  # int64 [m], m > 0, in host memory
    # Positions of the entries that the scorer is shown of it; None = all. The forward itself attends to all of them.
    spans: tuple[Span, ...] | None = None
