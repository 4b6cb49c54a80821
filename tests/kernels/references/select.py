"""Selection by sorting lists: higher first, NaN last, then the lower head, then the lower slot."""

import math

from torch import Tensor


def candidates(positions: Tensor, sinks: int, recent: int, pinned: Tensor | None = None) -> list[int]:
    """Slots that are not protected, of a head with these `positions` [n]; `pinned` [n] are, beside both ends."""
    last = len(positions) - recent
    label = [False] * len(positions) if pinned is None else pinned.tolist()
    return [slot for slot, place in enumerate(positions.tolist()) if place >= sinks and slot < last and not label[slot]]


def kept(
    scores: Tensor, positions: Tensor, count: int, sinks: int, recent: int, pinned: Tensor | None = None
) -> list[int]:
    """Slots that stay of a head with `scores` [n] and `positions` [n], ascending."""
    free = candidates(positions, sinks, recent, pinned)
    best = _best([(float(scores[slot]), 0, slot) for slot in free], count)
    return sorted({slot for _, slot in best} | (set(range(len(positions))) - set(free)))


def owned(
    scores: list[Tensor],
    positions: list[Tensor],
    total: int,
    sinks: int,
    recent: int,
    pinned: list[Tensor] | None = None,
) -> list[int]:
    """How many of the best `total` candidates of a row each of its heads owns."""
    pool = []
    for head, (values, places) in enumerate(zip(scores, positions, strict=True)):
        label = None if pinned is None else pinned[head]
        pool += [(float(values[slot]), head, slot) for slot in candidates(places, sinks, recent, label)]
    best = _best(pool, total)
    return [sum(1 for head, _ in best if head == one) for one in range(len(scores))]


def _best(pool: list[tuple[float, int, int]], count: int) -> list[tuple[int, int]]:
    order = sorted(pool, key=lambda one: (math.isnan(one[0]), 0.0 if math.isnan(one[0]) else -one[0], one[1], one[2]))
    return [(head, slot) for _, head, slot in order[: max(0, count)]]
