"""R-KV's forgiven similarities by the matrix of all pairs, one segment at a time."""

import torch
from torch import Tensor


def similarities(keys: Tensor) -> Tensor:
    """[n, n] cosine similarities of `keys` [n, D], in their dtype; 0 on the diagonal."""
    directions = keys / (keys.square().sum(-1, keepdim=True).sqrt() + 1e-8)
    pairs = directions @ directions.T
    return pairs.fill_diagonal_(0)


def targets(pairs: Tensor, threshold: float, forgive: int, end: str) -> list[list[int]]:
    """The look-alikes that each row of `pairs` [n, n] forgives, in the order in which it meets them."""
    found = []
    for row in pairs.tolist():
        columns = range(len(row)) if end == "first" else reversed(range(len(row)))
        found.append([column for column in columns if row[column] > threshold][:forgive])
    return found


def forgiven_similarity(pairs: Tensor, chosen: list[list[int]], empty_row: str) -> Tensor:
    """[n]: per column, the sum of the similarities of the rows that have `chosen` it."""
    sums = torch.zeros(len(chosen), dtype=pairs.dtype)
    for row, columns in enumerate(chosen):
        lonely = [0] if empty_row == "slot0" and not columns else []
        for column in columns + lonely:
            sums[column] += pairs[row, column]
    return sums


def between(pairs: Tensor, near: float) -> float:
    """A threshold near `near` that no similarity of `pairs` is close to, so that rounding decides nothing."""
    values = torch.cat([pairs.flatten(), torch.tensor([0.0, 1.0]).to(pairs)]).sort().values
    gaps = values.diff()
    middles = values[:-1] + gaps / 2
    wide = (gaps > 2e-5) & (middles > 0)
    return float(middles[wide][(middles[wide] - near).abs().argmin()])
