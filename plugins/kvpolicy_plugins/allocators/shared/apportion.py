"""Division of a number of entries into shares: water-filling and largest-remainder rounding."""

import torch
from torch import Tensor

_DECIMALS = 9  # precision of counts in float64; smaller differences are rounding errors


def water_fill(room: Tensor, total: Tensor, weights: Tensor | None = None) -> Tensor:
    """Water-filling: shares of `total` [...] along `room` [..., n], each at most its room; float64.

    Each share is min(room, weight · level), with one level for all, such that the shares sum to `total`. Weights
    [..., n] are positive; by default they are equal.
    """
    rooms = room.double()
    weight = torch.ones_like(rooms) if weights is None else weights.double().expand_as(rooms)
    order = (rooms / weight).argsort(dim=-1, stable=True)  # in which rooms are filled
    ascending, sharing = rooms.gather(-1, order), weight.gather(-1, order)
    below = ascending.cumsum(-1) - ascending
    sharers = sharing.flip(-1).cumsum(-1).flip(-1)
    levels = (total.double()[..., None] - below) / sharers  # if exactly the rooms before are filled
    return torch.minimum(rooms, weight * levels.amax(-1, keepdim=True))


def apportion(quotas: Tensor, total: Tensor) -> Tensor:
    """Largest-remainder rounding of float64 `quotas` [..., n] with sum `total` [...] to int64 with exactly that sum.

    Each quota is rounded down or up. Ties in the remainder go to the lower index.
    """
    rounded_down = (quotas + 10.0**-_DECIMALS).floor()
    remainders = (quotas - rounded_down).round(decimals=_DECIMALS)
    order = remainders.argsort(dim=-1, descending=True, stable=True)
    missing = total - rounded_down.sum(-1).long()
    return rounded_down.long() + (order.argsort(-1) < missing[..., None])


def swept(room: Tensor, total: Tensor) -> Tensor:
    """What is taken of int64 `room` [..., n] in turns of one, from the first on, until it is `total` [...]; int64.

    What is full is left out; where there is less room than the total, all of it is taken.
    """
    total = total.minimum(room.sum(-1))
    level = (water_fill(room, total).amax(-1, keepdim=True) + 10.0**-_DECIMALS).floor().long()
    taken = room.minimum(level)
    left = (total - taken.sum(-1))[..., None]
    beyond = room > level
    return taken + (beyond & (beyond.cumsum(-1) <= left))
