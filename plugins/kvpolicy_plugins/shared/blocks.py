"""Candidates in blocks of equal size, in order of position: chunks of a text, frames of a video."""

import torch
from torch import Tensor

from kvpolicy.stages import View


def in_blocks(values: Tensor, inside: Tensor, places: Tensor, size: int) -> Tensor:
    """Values of the slots that are `inside`, [B, K, T], by block: [B, K, M, size]; zeros (False) where there is none.

    `places` int64 are those of the slots among the ones inside.
    """
    blocks = -(-values.shape[-1] // size)
    spread_out = values.new_zeros((*values.shape[:2], blocks * size + 1))  # the last is for all others
    spread_out.scatter_(-1, places.where(inside, blocks * size), values)
    in_order: Tensor = spread_out[..., :-1].unflatten(-1, (blocks, size))
    return in_order


def candidate_places(view: View) -> Tensor:
    """The place of every slot among the candidates of its head, in order of position; int64 [B, K, T], at least 0."""
    return view.in_slots((view.in_sequence(view.candidates).cumsum(-1) - 1).clamp(min=0))


def gather_blocks(vectors: Tensor, inside: Tensor, places: Tensor, size: int) -> Tensor:
    """`in_blocks` of vectors [B, K, T, D]: [B, K, M, size, D]; that of slot 0 where there is none."""
    slots = torch.arange(vectors.shape[2], device=vectors.device).expand(inside.shape)
    index = in_blocks(slots, inside, places, size)
    gathered = vectors.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, vectors.shape[-1]))
    in_order: Tensor = gathered.unflatten(2, index.shape[2:])
    return in_order
