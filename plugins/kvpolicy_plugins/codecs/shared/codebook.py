"""Lloyd-Max codebook for normally distributed numbers, and the nearest of its levels."""

import functools
import itertools
import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor


@functools.cache
def codebook(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, ascending, with the least mean squared error for a standard normal number.

    Lloyd-Max iteration on the positive half: edges are midpoints of levels, levels are means between edges.
    """
    count = 2 ** (bits - 1)
    levels, change = [3 * (index + 0.5) / count for index in range(count)], math.inf
    while change > 1e-14:
        edges = [0.0, *edges_between(levels), math.inf]
        means = [_mean(low, high) for low, high in itertools.pairwise(edges)]
        change = max(abs(mean - level) for mean, level in zip(means, levels, strict=True))
        levels = means
    return (*(-level for level in reversed(levels)), *levels)


def edges_between(levels: Sequence[float]) -> tuple[float, ...]:
    """Decision edges: midpoints of the ascending `levels`, one fewer than levels."""
    return tuple((low + high) / 2 for low, high in itertools.pairwise(levels))


def nearest_code(numbers: Tensor, levels: tuple[float, ...], *, upper_on_edge: bool = False) -> Tensor:
    """The codes, uint8 of the same shape, of the ascending `levels`, at most 256, that numbers are nearest to.

    NaN has any code. Halfway between two levels it is the lower one, or the upper one with `upper_on_edge`. The line is
    divided into cells with at most one edge each, so a number is compared with one edge, however many levels there are.
    """
    cells = _cells(levels, numbers.dtype, numbers.device)
    # A product with a power of two is exact, so a number is never taken for one of another cell.
    last = cells.first + len(cells.edge) - 1
    # The lower bound comes after the conversion, which makes some integer of NaN.
    place = (numbers * cells.per_unit).floor_().clamp_(max=last).int().clamp_(min=cells.first)
    cell = place.sub_(cells.first).flatten()
    edge = cells.edge.index_select(0, cell).view(numbers.shape)
    above = numbers >= edge if upper_on_edge else numbers > edge
    return cells.below.index_select(0, cell).view(numbers.shape).add_(above)


@attrs.frozen(eq=False)
class _Cells:
    """Intervals of 1 / `per_unit` from `first` / `per_unit` on. Beyond the first and the last there are no edges."""

    per_unit: int  # a power of two
    first: int
    below: Tensor  # uint8 [cells], edges below a cell
    edge: Tensor  # [cells], the edge in a cell, NaN = none


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # so that it can be used outside of it later
def _cells(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> _Cells:
    edges = torch.tensor(edges_between(levels), dtype=dtype).tolist()
    closest = min((high - low for low, high in itertools.pairwise(edges)), default=1.0)
    per_unit = 2 ** max(0, math.ceil(-math.log2(closest)))
    first = math.floor(edges[0] * per_unit)
    inside = [math.nan] * (math.floor(edges[-1] * per_unit) - first + 1)
    for edge in edges:
        inside[math.floor(edge * per_unit) - first] = edge
    below = itertools.accumulate((not math.isnan(edge) for edge in inside[:-1]), initial=0)
    counts = torch.tensor(list(below), dtype=torch.uint8, device=device)
    return _Cells(per_unit, first, counts, torch.tensor(inside, dtype=dtype, device=device))


def _mean(low: float, high: float) -> float:
    """Mean of a standard normal number given that it is between two bounds."""
    density = (math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi) for bound in (low, high))
    survival = (math.erfc(bound / math.sqrt(2)) / 2 for bound in (low, high))
    return (next(density) - next(density)) / (next(survival) - next(survival))
