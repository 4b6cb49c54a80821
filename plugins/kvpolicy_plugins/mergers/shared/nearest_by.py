"""Which kept entry each evicted entry is nearest to, by any measure of similarity."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.stages.slots import indices_of


def nearest_by(
    measure: Callable[[Tensor], Tensor],
    kept: Tensor,
    evicted: Tensor,
    dtype: torch.dtype,
    *,
    most: int | None = None,
    block: int = 512,
) -> tuple[Tensor, Tensor]:
    """For every evicted slot, the kept slot with the largest similarity.

    Args:
        measure: maps slots [B, K, E] (-1 = none) to similarities [B, K, E, N].
        kept: int64 [B, K, N], padded with -1.
        evicted: bool [B, K, T].
        dtype: of the similarities.
        most: no head has more evicted slots; without it the host waits for the device.
        block: evicted entries per step; at most `block` x N similarities exist at a time.

    Returns:
        The largest similarity [B, K, T], and its index in `kept` [B, K, T] int64, the lowest on ties. -inf and 0 for
        slots that are not evicted, or if none is kept.
    """
    similarity = torch.full(evicted.shape, -torch.inf, dtype=dtype, device=kept.device)
    index = torch.zeros(evicted.shape, dtype=torch.int64, device=kept.device)
    if kept.shape[-1] == 0:
        return similarity, index
    none = (kept < 0)[:, :, None]
    for slots in indices_of(evicted, most).split(block, dim=-1):
        best, slot_index = measure(slots).masked_fill(none, -torch.inf).max(-1)  # the first of equal ones
        similarity = _scatter(similarity, slots, best)
        index = _scatter(index, slots, slot_index)
    return similarity, index


def _scatter(onto: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """`onto` [B, K, T] with `values` [B, K, E] written at `slots` [B, K, E]; slots of -1 are skipped."""
    wider = torch.cat([onto, onto[..., :1]], -1)
    return wider.scatter(-1, slots.masked_fill(slots < 0, onto.shape[-1]), values)[..., :-1]
