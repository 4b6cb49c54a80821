"""Assignment of evicted entries to kept ones by Ward's criterion, for the merger `window_fit`."""

import torch
from torch import Tensor

from kvpolicy.stages import View
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.nearest_by import nearest_by
from kvpolicy_plugins.mergers.shared.window_logits import WindowLogits


def nearest_by_ward(
    view: View, receivers: Tensor, evicted: Tensor, window: WindowLogits, attention: Tensor
) -> tuple[Tensor, Tensor]:
    """For every evicted slot, the receiver that adds the least to the spread of logits and values within groups.

    Two entries with attentions a and b whose traits (logits and values) are a distance d apart add a·b·d² / (a + b).

    Args:
        view: of T slots.
        receivers: int64 [B, K, N], kept slots into which others may be merged, padded with -1.
        evicted: bool [B, K, T].
        window: the queries.
        attention: [B, K, T], mean over these queries.

    Returns:
        What is added, negated, [B, K, T] in the dtype of the window's logits, and the index in `receivers`
        [B, K, T] int64; as `nearest_by`.
    """
    traits = _traits(view, window)
    survivors, receiver_attention = gather(traits, receivers), gather(attention, receivers)[:, :, None]

    def closeness(slots: Tensor) -> Tensor:
        slot_attention = gather(attention, slots)[..., None]
        total = (slot_attention + receiver_attention).clamp(min=torch.finfo(slot_attention.dtype).tiny)
        weight = slot_attention * receiver_attention / total
        return -weight * _square_distance(gather(traits, slots), survivors)

    return nearest_by(closeness, receivers, evicted, traits.dtype, most=view.most_evicted)


def _traits(view: View, window: WindowLogits) -> Tensor:
    """[B, K, T, G·W + Dv]: logits without votes and values, so that distances are those of Ward's criterion."""
    queries = window.queries.flatten(2, 3)
    num_queries = (window.query_positions >= 0).sum(-1).clamp(min=1)[:, None, None, None]
    count = num_queries.to(queries.dtype) * window.queries.shape[2]
    values = view.values.to(queries.dtype).masked_fill(~view.valid[..., None], 0.0)
    square = values.square().sum((-2, -1)) / view.lengths.clamp(min=1)
    size = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()[..., None, None]
    return torch.cat([view.keys.to(queries.dtype) @ queries.transpose(-1, -2) / count.sqrt(), values / size], -1)


def _square_distance(left: Tensor, right: Tensor) -> Tensor:
    """[B, K, E, F] and [B, K, N, F] to [B, K, E, N]."""
    squares = left.square().sum(-1)[..., None] + right.square().sum(-1)[:, :, None]
    return (squares - 2 * left @ right.transpose(-1, -2)).clamp_(min=0.0)
