"""Bit widths per layer under a total budget: an exact search."""

from collections.abc import Sequence

import attrs


@attrs.frozen(order=True)
class _Choice:
    """The choice with the least error for the first layers, at one total cost."""

    error: float
    cost: int
    widths: tuple[int, ...]


def allocate_bits(errors: Sequence[Sequence[float]], costs: Sequence[int], capacity: int) -> tuple[int, ...]:
    """The index of each layer's width: errors [L][W], costs [W] >= 0 to L indices with total cost at most `capacity`.

    Minimises the sum of errors (a multiple-choice knapsack, solved exactly by dynamic programming); ties go to the
    smaller total cost, then to the smaller indices in the first layers. At least one choice must fit.
    """
    best = {0: _Choice(0.0, 0, ())}
    for layer in errors:
        extended = [
            _Choice(best_so_far.error + layer[width], best_so_far.cost + cost, (*best_so_far.widths, width))
            for best_so_far in best.values()
            for width, cost in enumerate(costs)
        ]
        best = {}
        for choice in extended:
            if choice.cost <= capacity and (choice.cost not in best or choice < best[choice.cost]):
                best[choice.cost] = choice
    return min(best.values()).widths
