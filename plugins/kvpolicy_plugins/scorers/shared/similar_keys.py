"""Search for similar keys within a head (R-KV) without storing all similarities."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.stages.products import multiplies_bfloat16

_ROWS = 1024
_COLUMNS = (128, 1024)  # of the first block, in which most rows have enough similar entries, and of the largest
_MARGIN = 2.0**-7  # bounds the bfloat16 error of an inner product of unit vectors: 2^-9 per operand and for the result


def forgiven_similarity(
    directions: Tensor, valid: Tensor, threshold: float, forgive: int, *, last: bool
) -> tuple[Tensor, Tensor]:
    """Per column, the sum of the similarities of the rows that forgive it; and which rows have a similar entry.

    Every row forgives the first `forgive` entries of its search whose cosine similarity is above `threshold`.

    Args:
        directions: unit keys, float32 [S, T, D].
        valid: bool [S, T], which rows search; the directions of others are 0.
        threshold: from 0 to 1.
        forgive: how many entries each row forgives.
        last: whether the search starts at the last column and goes backwards.

    Returns:
        float32 [S, T] and bool [S, T].
    """
    if not forgive:
        return torch.zeros_like(valid, dtype=directions.dtype), torch.zeros_like(valid)
    if directions.device.type != "cpu":
        return by_blocks(directions, threshold, forgive, last=last)
    heads = [by_rows(*head, threshold, forgive, last=last) for head in zip(directions, valid, strict=True)]
    sums, any_found = zip(*heads, strict=True)
    return torch.stack(sums), torch.stack(any_found)


def by_blocks(directions: Tensor, threshold: float, forgive: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """`forgiven_similarity` for all heads at once, without early exit: the host does not wait for the device."""
    size = directions.shape[1]
    sums = directions.new_zeros(directions.shape[:2])
    any_found = torch.zeros_like(sums, dtype=torch.bool)
    for rows in torch.arange(size, device=directions.device).split(_ROWS):
        similar_count = torch.zeros((len(directions), len(rows)), dtype=torch.int64, device=directions.device)
        for columns in _blocks(size, last=last):
            similarity = directions[:, rows] @ directions[:, columns].transpose(1, 2)
            is_self = rows[:, None] == torch.arange(columns.start, columns.stop, device=rows.device)
            similarity.masked_fill_(is_self, 0.0)
            similar = similarity > threshold
            sums[:, columns] += _forgiven_only(similarity, similar, similar_count, forgive, last=last).sum(1)
            similar_count += similar.sum(-1)
        any_found[:, rows] = similar_count > 0
    return sums, any_found


def by_rows(directions: Tensor, valid: Tensor, threshold: float, forgive: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """`forgiven_similarity` for one head, [T, D] and [T]; a row leaves the search after `forgive` similar entries."""
    coarse = directions.bfloat16() if multiplies_bfloat16(directions.device) else None
    sums, any_found = directions.new_zeros(len(directions)), torch.zeros_like(valid)
    for block in valid.nonzero()[:, 0].split(_ROWS):
        rows, similar_count = block, torch.zeros_like(block)
        for columns in _blocks(len(directions), last=last):
            candidates = (
                torch.arange(len(rows)) if coarse is None else _candidate_rows(coarse, rows, columns, threshold)
            )
            if len(candidates):
                similarity = _similarity(directions, rows[candidates], columns)
                similar = similarity > threshold
                sums[columns] += _forgiven_only(similarity, similar, similar_count[candidates], forgive, last=last).sum(
                    0
                )
                similar_count[candidates] += similar.sum(-1)
                any_found[rows[similar_count > 0]] = True
                rows, similar_count = rows[similar_count < forgive], similar_count[similar_count < forgive]
            if not len(rows):
                break
    return sums, any_found


def _blocks(count: int, *, last: bool) -> Iterator[slice]:
    """Blocks of columns in the order of the search, each as large as all before it, up to a maximum."""
    done, size = 0, _COLUMNS[0]
    while done < count:
        size = min(size, count - done)
        yield slice(count - done - size, count - done) if last else slice(done, done + size)
        done += size
        size = min(done, _COLUMNS[1])


def _candidate_rows(coarse: Tensor, rows: Tensor, columns: slice, threshold: float) -> Tensor:
    """Indices of the rows that may have a similar column: a product in bfloat16 excludes the others."""
    return (_similarity(coarse, rows, columns).amax(-1) > threshold - _MARGIN).nonzero()[:, 0]


def _similarity(directions: Tensor, rows: Tensor, columns: slice) -> Tensor:
    """Similarities [R, C]; 0 of an entry to itself."""
    similarity = directions[rows] @ directions[columns].T
    self_column = rows - columns.start
    inside = ((self_column >= 0) & (self_column < similarity.shape[1])).nonzero()[:, 0]
    similarity[inside, self_column[inside]] = 0
    return similarity


def _forgiven_only(similarity: Tensor, similar: Tensor, similar_count: Tensor, forgive: int, *, last: bool) -> Tensor:
    """The similarities that rows forgive, 0 elsewhere; `similar_count` is that of earlier columns, per row."""
    ordered = similar.flip(-1) if last else similar
    rank = ordered.cumsum(-1, dtype=torch.int32)  # 1 for the similar column that comes first in the search
    rank = rank.flip(-1) if last else rank
    return similarity.masked_fill_(~similar | (rank + similar_count[..., None] > forgive), 0.0)
