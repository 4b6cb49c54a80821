"""Calls of radix select: scores that are hard to sort, and what should come out."""

import torch

from kvpolicy_kernels.select.select import counts_of_best, select
from tests.kernels.outputs import Guarded
from tests.kernels.references import select as reference
from tests.kernels.scenes import DEVICE, Scene

KINDS = ("normal", "few values", "equal", "one-hot", "special", "near zero", "NaN")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 1.1e-38, 1.0, -1.0, 3.4e38, -3.4e38)


def scores_of(kind: str, found: Scene, seed: int) -> torch.Tensor:
    """[P, T] float32, NaN behind lengths."""
    random = torch.Generator().manual_seed(seed)
    shape = (found.segments.count, found.segments.longest)
    noise = torch.randn(shape, generator=random)
    scores = {
        "normal": noise,
        "few values": (noise * 2).round() / 2,
        "equal": torch.full(shape, float(noise.flatten()[0])),
        "one-hot": (torch.arange(shape[1]) == shape[1] // 2).float().expand(shape).clone(),
        "special": torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=random)],
        "near zero": torch.tensor([0.0, -0.0, 1e-45, -1e-45])[torch.randint(0, 4, shape, generator=random)],
        "NaN": torch.full(shape, torch.nan),
    }[kind]
    behind = torch.arange(shape[1]) >= found.segments.lengths.cpu()[:, None]
    return scores.masked_fill(behind, torch.nan).to(DEVICE)


def check_select(found: Scene, scores, counts, *, sinks=0, recent=0, pinned=None, width=None) -> torch.Tensor:
    rows = zip(scores.cpu(), found.lists("positions"), counts.tolist(), labels_of(found, pinned), strict=True)
    expected = [
        reference.kept(row[: len(positions)], positions, count, sinks, recent, label)
        for row, positions, count, label in rows
    ]
    width = max(1, *map(len, expected)) if width is None else width
    out = Guarded((found.segments.count, width), torch.int32, DEVICE)
    positions = found.columns["positions"]
    protect = {"sinks": sinks, "recent": recent, "pinned": pinned}
    kept = select(scores, found.segments, counts, width, positions=positions, **protect, out=out.tensor)
    out.check()
    assert kept is out.tensor
    assert kept.tolist() == [(slots + [-1] * width)[:width] for slots in expected]
    return kept


def check_counts(found: Scene, scores, totals, *, sinks=0, recent=0, pinned=None) -> torch.Tensor:
    out = Guarded((found.segments.count,), torch.int32, DEVICE)
    positions = found.columns["positions"]
    protect = {"sinks": sinks, "recent": recent, "pinned": pinned}
    counts_of_best(scores, found.segments, totals, positions=positions, **protect, out=out.tensor)
    out.check()
    places, heads, expected = found.lists("positions"), found.segments.heads, []
    labels = labels_of(found, pinned)
    for group, total in enumerate(totals.tolist()):
        mine = slice(group * heads, (group + 1) * heads)
        held = [row[: len(one)] for row, one in zip(scores[mine].cpu(), places[mine], strict=True)]
        expected += reference.owned(held, places[mine], total, sinks, recent, None if pinned is None else labels[mine])
    assert out.tensor.tolist() == expected
    return out.tensor


def labels_of(found: Scene, pinned: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The label [n] of each segment."""
    lengths = found.segments.lengths.tolist()
    if pinned is None:
        return [None] * len(lengths)
    return [row[:length].cpu() for row, length in zip(pinned, lengths, strict=True)]


def budgets(count: int, most: int, dtype=torch.int64) -> torch.Tensor:
    """None, one, some, all and too many, in turn."""
    usual = [0, 1, most // 3, most - 1, most, most + 7, -2]
    return torch.tensor([usual[one % len(usual)] for one in range(count)], dtype=dtype, device=DEVICE)
