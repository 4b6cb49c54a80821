"""`tile.Postprocess` head by head in float64: loops over slots, nothing shared."""

import torch
from torch import Tensor

from kvpolicy_kernels import Postprocess

_TINY = torch.finfo(torch.float32).tiny


def finished(
    terms: Tensor, lengths: Tensor, candidates: Tensor, settings: list[Postprocess], heads: int
) -> tuple[Tensor, Tensor]:
    """[n, P, T] terms to the sum [P, T], -inf outside `candidates` [P, T], and the number of NaN [P]."""
    total = torch.zeros_like(terms[0])
    for term, setting in zip(terms, settings, strict=True):
        total = total + setting.weight * _finished(term, lengths, candidates, setting, heads)
    wrong = total.isnan() & candidates
    return total.masked_fill(wrong | ~candidates, -torch.inf), wrong.sum(1)


def _finished(term: Tensor, lengths: Tensor, candidates: Tensor, setting: Postprocess, heads: int) -> Tensor:
    held = torch.arange(term.shape[1]) < lengths[:, None]
    scores = term.masked_fill(~held, 0.0)
    if setting.softmax:
        scores = scores.masked_fill(~held, -torch.inf).softmax(-1).masked_fill(~held, 0.0)
    if setting.pool != "none":
        scores = torch.stack([_pooled(row, own, setting) for row, own in zip(scores, candidates, strict=True)])
    if setting.shared:
        rows = scores.view(-1, heads, scores.shape[1])
        scores = rows.mean(1, keepdim=True).expand_as(rows).reshape(scores.shape)
    if setting.normalise == "none":
        return scores
    return torch.stack([_scaled(row, own, setting.normalise) for row, own in zip(scores, candidates, strict=True)])


def _pooled(row: Tensor, candidates: Tensor, setting: Postprocess) -> Tensor:
    outside = -torch.inf if setting.pool == "max" else 0.0
    inside, reach, pooled = row.masked_fill(~candidates, outside), setting.size // 2, torch.empty_like(row)
    for slot in range(len(row)):
        near = inside[max(0, slot - reach) : slot + reach + 1]
        pooled[slot] = near.amax() if setting.pool == "max" else near.sum() / setting.size
    return pooled


def _scaled(row: Tensor, candidates: Tensor, how: str) -> Tensor:
    own = row[candidates]
    if how == "max":
        sizes = own[own.isfinite()].abs()
        return row / max(float(sizes.max()) if len(sizes) else 0.0, _TINY)
    mean = own.mean() if len(own) else torch.zeros((), dtype=row.dtype)
    spread = (own - mean).square().mean().sqrt() if len(own) else torch.zeros((), dtype=row.dtype)
    return (row - mean) / spread.clamp(min=_TINY)
