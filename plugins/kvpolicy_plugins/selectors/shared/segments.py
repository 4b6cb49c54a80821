"""Segments of contiguous candidates, cut where a cumulative mass reaches given steps."""

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Segments:
    """S segments of each head, in order; those that a head does not have are empty and come last."""

    ids: Tensor  # int64 [B, K, T], the segment of every slot; any number from 0 to S - 1 outside the segments
    lengths: Tensor  # int64 [B, K, S]
    mass: Tensor  # float64 [B, K, S]


def segments_of(mass: Tensor, inside: Tensor, steps: Tensor, shortest: int, longest: int) -> Segments:
    """The slots that are `inside` (bool [B, K, T], in order), cut by their `mass` (float64, 0 elsewhere, sum 1).

    1. A cut before each slot at which the cumulative mass reaches one of the ascending `steps` (float64), but not
       before the first slot; what would be cut behind the last one is cut before it;
    2. a segment longer than `longest` is cut every `longest` slots from its start;
    3. a segment of fewer than `shortest` takes in the segments behind it until it has as many.
    """
    count = inside.sum(-1, keepdim=True)
    ranks = (inside.cumsum(-1) - 1).clamp(min=0)  # of each slot among those inside
    width = inside.shape[-1] + 1
    places = torch.arange(width, device=inside.device).expand(*inside.shape[:2], width)  # among those inside; end too
    reached = torch.searchsorted(mass.cumsum(-1), steps.expand(*mass.shape[:2], -1).contiguous())
    first = ranks.gather(-1, reached.clamp(max=width - 2)).clamp(min=1).minimum((count - 1).clamp(min=1))
    cut = torch.zeros_like(places, dtype=torch.bool).scatter_(-1, first, True).scatter_(-1, count, True)
    start = places.where(cut, 0).cummax(-1).values
    cut = (cut | ((places - start) % longest == 0)) & (places <= count)
    starts = _starts(cut, count, shortest)
    numbers = (starts.cumsum(-1) - 1).clamp(min=0)
    ids = numbers.gather(-1, ranks)
    most = (width - 1) // shortest + 1
    shape = (*inside.shape[:2], most)
    lengths = torch.zeros(shape, dtype=torch.int64, device=inside.device).scatter_add_(-1, ids, inside.long())
    sums = torch.zeros(shape, dtype=mass.dtype, device=mass.device).scatter_add_(-1, ids, mass)
    return Segments(ids, lengths, sums)


def _starts(cut: Tensor, count: Tensor, shortest: int) -> Tensor:
    """Where segments begin, bool like `cut` [B, K, T + 1], if each ends at the first cut that makes it long enough.

    From each place there is one next start. Those that are reached from place 0 are found by doubling: what is reached
    in fewer than 2^k steps, and from there in 2^k more.
    """
    width = cut.shape[-1]
    places = torch.arange(width, device=cut.device).expand_as(cut)
    next_cut = places.where(cut, width - 1).flip(-1).cummin(-1).values.flip(-1).minimum(count)
    ahead = next_cut.gather(-1, (places + shortest).minimum(count))
    starts = places == 0
    for _ in range((width // shortest + 1).bit_length()):
        starts = starts | (torch.zeros_like(places).scatter_add_(-1, ahead, starts.long()) > 0)
        ahead = ahead.gather(-1, ahead)
    return starts & (places < count)
