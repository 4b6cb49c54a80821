"""The search for look-alikes among the keys of a head."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.stages.products import multiplies_bfloat16

_ROWS = 1024
_COLUMNS = (128, 1024)  # of the first block, in which most entries find what they look for, and at most
_MARGIN = 2.0**-7  # the inner product of two unit vectors in bfloat16 is off by less: 2^-9 for each and for the result


def forgiven(directions: Tensor, valid: Tensor, threshold: float, forgive: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """Per column, the similarities of the rows that forgive it; and which rows have met a look-alike.

    Every row forgives the first `forgive` entries whose cosine similarity is above `threshold`, from the last one
    backwards or from the first one on.

    Args:
        directions: keys of length one, float32 [S, T, D].
        valid: bool [S, T], the rows that search; others have a direction of 0.
        threshold: from 0 to 1.
        forgive: how many.
        last: whether the search begins at the last column.

    Returns:
        float32 [S, T] and bool [S, T].
    """
    if not forgive:
        return torch.zeros_like(valid, dtype=directions.dtype), torch.zeros_like(valid)
    if directions.device.type != "cpu":
        return by_blocks(directions, threshold, forgive, last=last)
    heads = [by_rows(*head, threshold, forgive, last=last) for head in zip(directions, valid, strict=True)]
    sums, met = zip(*heads, strict=True)
    return torch.stack(sums), torch.stack(met)


def by_blocks(directions: Tensor, threshold: float, forgive: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """`forgiven` for all heads at once, without a look at what has been found: a device need not wait."""
    size = directions.shape[1]
    sums = directions.new_zeros(directions.shape[:2])
    met = torch.zeros_like(sums, dtype=torch.bool)
    for rows in torch.arange(size, device=directions.device).split(_ROWS):
        found = torch.zeros((len(directions), len(rows)), dtype=torch.int64, device=directions.device)
        for columns in _blocks(size, last=last):
            similarity = directions[:, rows] @ directions[:, columns].transpose(1, 2)
            own = rows[:, None] == torch.arange(columns.start, columns.stop, device=rows.device)
            similarity.masked_fill_(own, 0.0)
            alike = similarity > threshold
            sums[:, columns] += _pardoned(similarity, alike, found, forgive, last=last).sum(1)
            found += alike.sum(-1)
        met[:, rows] = found > 0
    return sums, met


def by_rows(directions: Tensor, valid: Tensor, threshold: float, forgive: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """`forgiven` for one head [T, D], [T]: a row that has found enough is searched no further."""
    coarse = directions.bfloat16() if multiplies_bfloat16(directions.device) else None
    sums, met = directions.new_zeros(len(directions)), torch.zeros_like(valid)
    for block in valid.nonzero()[:, 0].split(_ROWS):
        rows, found = block, torch.zeros_like(block)
        for columns in _blocks(len(directions), last=last):
            near = torch.arange(len(rows)) if coarse is None else _near(coarse, rows, columns, threshold)
            if len(near):
                similarity = _similarity(directions, rows[near], columns)
                alike = similarity > threshold
                sums[columns] += _pardoned(similarity, alike, found[near], forgive, last=last).sum(0)
                found[near] += alike.sum(-1)
                met[rows[found > 0]] = True
                rows, found = rows[found < forgive], found[found < forgive]
            if not len(rows):
                break
    return sums, met


def _blocks(count: int, *, last: bool) -> Iterator[slice]:
    """Blocks of columns in the order of the search, each as large as all before it."""
    done, size = 0, _COLUMNS[0]
    while done < count:
        size = min(size, count - done)
        yield slice(count - done - size, count - done) if last else slice(done, done + size)
        done += size
        size = min(done, _COLUMNS[1])


def _near(coarse: Tensor, rows: Tensor, columns: slice, threshold: float) -> Tensor:
    """Which of the rows may have a look-alike among the columns: a product in bfloat16 rules out the others."""
    return (_similarity(coarse, rows, columns).amax(-1) > threshold - _MARGIN).nonzero()[:, 0]


def _similarity(directions: Tensor, rows: Tensor, columns: slice) -> Tensor:
    """[R, C]; 0 of an entry to itself."""
    similarity = directions[rows] @ directions[columns].T
    own = rows - columns.start
    inside = ((own >= 0) & (own < similarity.shape[1])).nonzero()[:, 0]
    similarity[inside, own[inside]] = 0
    return similarity


def _pardoned(similarity: Tensor, alike: Tensor, found: Tensor, forgive: int, *, last: bool) -> Tensor:
    """The similarities of the look-alikes that rows forgive, 0 elsewhere; rows have found some before."""
    ordered = alike.flip(-1) if last else alike
    rank = ordered.cumsum(-1, dtype=torch.int32)  # 1 for the look-alike that the search meets first
    rank = rank.flip(-1) if last else rank
    return similarity.masked_fill_(~alike | (rank + found[..., None] > forgive), 0.0)
