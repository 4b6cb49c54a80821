"""What the host knows of rows that take steps of fixed shapes: it decides from this, and never asks the device."""

from collections.abc import Sequence
from typing import TypeVar

import attrs

from kvpolicy.cache.trigger import entries_allowed
from kvpolicy.plan.plan import Plan

_Number = TypeVar("_Number")  # int or bool


@attrs.define
class _EqualRows:
    """Rows that have as many tokens and entries as each other: they stay alike."""

    rows: list[int]
    num_tokens: int
    lengths: list[int]  # entries per KV head in each layer
    due: tuple[bool, ...] = ()  # which layers are to be compressed in this step
    budgets: tuple[int, ...] = ()  # for which `room` was computed
    room: float = 0  # tokens that may still come before any layer is due


class HostCounts:
    """Tokens of each row and entries per KV head of each (layer, row), and when rows are due."""

    def __init__(self, plan: Plan, num_tokens: Sequence[int], lengths: Sequence[Sequence[int]]) -> None:
        """`num_tokens` [B] tokens that are no pads; `lengths` [L][B]."""
        self.plan = plan
        kinds: dict[tuple[int, ...], list[int]] = {}
        for row, tokens in enumerate(num_tokens):
            kinds.setdefault((tokens, *(layer[row] for layer in lengths)), []).append(row)
        self._nothing = (False,) * len(lengths)
        self._groups = [_EqualRows(rows, kind[0], list(kind[1:])) for kind, rows in kinds.items()]

    def append(self) -> bool:
        """Count one more token of each row; whether any row of any layer is then due."""
        for group in self._groups:
            group.num_tokens += 1
            group.lengths = [length + 1 for length in group.lengths]
            group.room -= 1
            budgets = self.plan.budgets.per_layer(group.num_tokens)
            if budgets != group.budgets:
                group.budgets, group.room = budgets, min(self._rooms(group))
            group.due = tuple(room < 0 for room in self._rooms(group)) if group.room < 0 else self._nothing
        return any(group.room < 0 for group in self._groups)

    def compress(self) -> None:
        """Count what is left of the rows that were due."""
        for group in self._groups:
            pairs = zip(group.lengths, group.budgets, group.due, strict=True)
            group.lengths = [min(length, budget) if due else length for length, budget, due in pairs]
            group.room = min(self._rooms(group))

    @property
    def lengths(self) -> list[list[int]]:
        """Entries per KV head, [L][B]."""
        return self._table([group.lengths for group in self._groups])

    @property
    def budgets(self) -> list[list[int]]:
        """Entries per KV head that may be kept, [L][B]."""
        return self._table([group.budgets for group in self._groups])

    @property
    def due(self) -> list[list[bool]]:
        """Which rows are to be compressed in this step, [L][B]."""
        return self._table([group.due for group in self._groups])

    @property
    def layers_due(self) -> list[bool]:
        """In which layers there are such rows."""
        return [any(layer) for layer in zip(*(group.due for group in self._groups), strict=True)]

    def _rooms(self, group: _EqualRows) -> list[float]:
        """Tokens that may still come before each layer is due."""
        layers = enumerate(group.lengths)
        return [entries_allowed(self.plan, layer, group.num_tokens, decoding=True) - length for layer, length in layers]

    def _table(self, per_group: Sequence[Sequence[_Number]]) -> list[list[_Number]]:
        """What is said of each group and layer, for each (layer, row)."""
        of_rows = {row: n for group, n in zip(self._groups, per_group, strict=True) for row in group.rows}
        return [list(layer) for layer in zip(*(of_rows[row] for row in range(len(of_rows))), strict=True)]
