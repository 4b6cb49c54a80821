"""Selection by sorting lists: higher first, NaN last, then the lower head, then the lower slot."""

import math

from torch import Tensor


def candidates(positions: Tensor, sinks: int, recent: int) -> list[int]:
    """Slots that are not protected, of a head with these `positions` [n]."""
    last = len(positions) - recent
    return [slot for slot, position in enumerate(positions.tolist()) if position >= sinks and slot < last]


def kept(scores: Tensor, positions: Tensor, count: int, sinks: int, recent: int) -> list[int]:
    """Slots that stay of a head with `scores` [n] and `positions` [n], ascending."""
    free = candidates(positions, sinks, recent)
    best = _best([(float(scores[slot]), 0, slot) for slot in free], count)
    return sorted({slot for _, slot in best} | (set(range(len(positions))) - set(free)))


def owned(scores: list[Tensor], positions: list[Tensor], total: int, sinks: int, recent: int) -> list[int]:
    """How many of the best `total` candidates of a row each of its heads owns."""
    pool = []
    for head, (values, places) in enumerate(zip(scores, positions, strict=True)):
        pool += [(float(values[slot]), head, slot) for slot in candidates(places, sinks, recent)]
    best = _best(pool, total)
    return [sum(1 for head, _ in best if head == one) for one in range(len(scores))]


def _best(pool: list[tuple[float, int, int]], count: int) -> list[tuple[int, int]]:
    order = sorted(pool, key=lambda one: (math.isnan(one[0]), 0.0 if math.isnan(one[0]) else -one[0], one[1], one[2]))
    return [(head, slot) for _, head, slot in order[: max(0, count)]]
