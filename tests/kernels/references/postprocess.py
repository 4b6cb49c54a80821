"""`tile.Finish` head by head in float64: loops over slots, nothing shared."""

import torch
from torch import Tensor

from kvpolicy_kernels import Finish

_TINY = torch.finfo(torch.float32).tiny


def finished(
    terms: Tensor, lengths: Tensor, candidates: Tensor, finishes: list[Finish], heads: int
) -> tuple[Tensor, Tensor]:
    """[n, P, T] terms to the sum [P, T], -inf outside `candidates` [P, T], and the number of NaN [P]."""
    total = torch.zeros_like(terms[0])
    for term, finish in zip(terms, finishes, strict=True):
        total = total + finish.weight * _finished(term, lengths, candidates, finish, heads)
    wrong = total.isnan() & candidates
    return total.masked_fill(wrong | ~candidates, -torch.inf), wrong.sum(1)


def _finished(term: Tensor, lengths: Tensor, candidates: Tensor, finish: Finish, heads: int) -> Tensor:
    held = torch.arange(term.shape[1]) < lengths[:, None]
    scores = term.masked_fill(~held, 0.0)
    if finish.softmax:
        scores = scores.masked_fill(~held, -torch.inf).softmax(-1).masked_fill(~held, 0.0)
    if finish.pool != "none":
        scores = torch.stack([_pooled(row, own, finish) for row, own in zip(scores, candidates, strict=True)])
    if finish.shared:
        rows = scores.view(-1, heads, scores.shape[1])
        scores = rows.mean(1, keepdim=True).expand_as(rows).reshape(scores.shape)
    if finish.normalise == "none":
        return scores
    return torch.stack([_scaled(row, own, finish.normalise) for row, own in zip(scores, candidates, strict=True)])


def _pooled(row: Tensor, candidates: Tensor, finish: Finish) -> Tensor:
    outside = -torch.inf if finish.pool == "max" else 0.0
    inside, reach, pooled = row.masked_fill(~candidates, outside), finish.size // 2, torch.empty_like(row)
    for slot in range(len(row)):
        near = inside[max(0, slot - reach) : slot + reach + 1]
        pooled[slot] = near.amax() if finish.pool == "max" else near.sum() / finish.size
    return pooled


def _scaled(row: Tensor, candidates: Tensor, how: str) -> Tensor:
    own = row[candidates]
    if how == "max":
        sizes = own[own.isfinite()].abs()
        return row / max(float(sizes.max()) if len(sizes) else 0.0, _TINY)
    mean = own.mean() if len(own) else torch.zeros((), dtype=row.dtype)
    spread = (own - mean).square().mean().sqrt() if len(own) else torch.zeros((), dtype=row.dtype)
    return (row - mean) / spread.clamp(min=_TINY)
