"""What a merger with votes gives back: the kept entries, and instead of some of them what they were merged into."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpolicy.stages import Entries, View
from kvpolicy.stages.slots import gather


def log_votes_of(view: View) -> Tensor:
    """Log-votes [B, K, T] float32; zeros where there are none."""
    if view.log_votes is not None:
        return view.log_votes
    return view.keys.new_zeros(view.positions.shape, dtype=torch.float32)


def kept_with_votes(view: View, kept: Tensor) -> Entries:
    """The entries of `kept` [B, K, N] as they are, with their log-votes."""
    return Entries(gather(view.keys, kept), gather(view.values, kept), gather(log_votes_of(view), kept))


def changed_entries(
    view: View,
    kept: Tensor,
    changed: Tensor,
    merged: tuple[Tensor, Tensor, Tensor],
    slot_state: Mapping[str, Tensor] | None = None,
) -> Entries:
    """What was merged where something has changed, elsewhere the kept entries, bit for bit; in the dtypes of the view.

    Args:
        view: what was merged.
        kept: int64 [B, K, N], padded with -1.
        changed: bool [B, K, N]; elsewhere `merged` and `slot_state` count for nothing.
        merged: keys [B, K, N, D], values [B, K, N, Dv] and log-votes [B, K, N].
        slot_state: [B, K, N] of each state of the merger.
    """
    (keys, values, log_votes), held, old_votes = merged, view.slot_state, log_votes_of(view)
    return Entries(
        keys=torch.where(changed[..., None], keys.to(view.keys.dtype), gather(view.keys, kept)),
        values=torch.where(changed[..., None], values.to(view.values.dtype), gather(view.values, kept)),
        log_votes=torch.where(changed, log_votes.to(old_votes.dtype), gather(old_votes, kept)),
        changed=changed,
        slot_state={
            name: torch.where(changed, new.to(held[name].dtype), gather(held[name], kept))
            for name, new in (slot_state or {}).items()
        },
    )
