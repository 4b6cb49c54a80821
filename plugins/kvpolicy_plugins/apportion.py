"""Fair shares in whole entries."""

import torch
from torch import Tensor

_FUZZ = 9  # decimals that survive float64 arithmetic on counts; what lies below is no difference


def fill_evenly(room: Tensor, total: Tensor) -> Tensor:
    """Equal shares of `total` [...] along `room` [..., n], none above its room; float64.

    What the small cannot hold is shared by the others: each gets min(room, level), with one level for all.
    """
    ascending = room.double().sort(-1).values
    below = ascending.cumsum(-1) - ascending
    sharers = torch.arange(room.shape[-1], 0, -1, device=room.device)
    levels = (total.double()[..., None] - below) / sharers  # if exactly the rooms before this one are full
    return torch.minimum(room.double(), levels.amax(-1, keepdim=True))


def apportion(quotas: Tensor, total: Tensor) -> Tensor:
    """Largest remainder: float64 `quotas` [..., n] with the sum `total` [...], as int64 of exactly that sum.

    Each quota is rounded down or up. Ties in the remainder go to the lower index.
    """
    whole = (quotas + 10.0**-_FUZZ).floor()
    remainders = (quotas - whole).round(decimals=_FUZZ)
    order = remainders.argsort(dim=-1, descending=True, stable=True)
    missing = total - whole.sum(-1).long()
    return whole.long() + (order.argsort(-1) < missing[..., None])
