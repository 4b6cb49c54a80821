"""A copy of all that tokens change in a layer, to go back to."""

from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from kvpolicy.runtime.held_bytes import bytes_of
from kvpolicy.runtime.holdings import Holdings
from kvpolicy.runtime.window import Window

_NUMBERS = ("seen", "altered", "padded", "in_order", "_firm")


@attrs.define
class Saved:
    """Entries, state of rows and slots, observed queries and counts of one layer."""

    held: Holdings
    window: Window
    row_state: dict[str, Tensor]
    real: list[int]
    numbers: dict[str, Any]
    compressions: int

    @classmethod
    def of(cls, layer: Any) -> "Saved":
        """The present state of a layer."""
        return cls(
            layer.held.copied(),
            layer.window.copied(),
            {name: values.clone() for name, values in layer.row_state.items()},
            list(layer.real),
            {name: getattr(layer, name) for name in _NUMBERS},
            layer.stats.compressions,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all that was copied."""
        beside = [*self.held.index_tensors, *self.row_state.values()]
        return self.held.nbytes + self.window.nbytes + bytes_of(beside)

    @property
    def firm(self) -> int:
        """Tokens seen when entries last changed place."""
        return int(self.numbers["_firm"])

    def into(self, layer: Any) -> None:
        """Let the layer go on with this state."""
        layer.take_over(self.held, self.window, self.row_state)
        layer.real = self.real
        for name, number in self.numbers.items():
            setattr(layer, name, number)
        layer.stats.compressions = self.compressions

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order."""
        self.held.select_rows(rows)
        self.window.select_rows(rows)
        self.row_state = {name: values[list(rows)] for name, values in self.row_state.items()}
        self.real = [self.real[row] for row in rows]
