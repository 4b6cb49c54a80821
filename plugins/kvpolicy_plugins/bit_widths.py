"""Bits per layer within an average: an exact search."""

from collections.abc import Sequence

import attrs


@attrs.frozen(order=True)
class _Choice:
    """The least error of some first layers for one total of their costs."""

    error: float
    cost: int
    widths: tuple[int, ...]


def least_error(errors: Sequence[Sequence[float]], costs: Sequence[int], capacity: int) -> tuple[int, ...]:
    """Which width each layer gets: errors [L][W], costs [W] >= 0, to L indices whose costs sum to at most `capacity`.

    The sum of the errors is the least possible (a knapsack, solved exactly); ties go to the smaller sum of costs,
    then to the smaller indices in the first layers. Some choice must fit.
    """
    best = {0: _Choice(0.0, 0, ())}
    for layer in errors:
        longer = [
            _Choice(done.error + layer[width], done.cost + cost, (*done.widths, width))
            for done in best.values()
            for width, cost in enumerate(costs)
        ]
        best = {}
        for one in longer:
            if one.cost <= capacity and (one.cost not in best or one < best[one.cost]):
                best[one.cost] = one
    return min(best.values()).widths
