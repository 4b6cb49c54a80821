"""Scores head by head in the dtype that is asked for, without any of the tricks of the kernels."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from tests.kernels.references.situations import Situation


@attrs.frozen(eq=False)
class Head:
    """One segment: T entries, and the window's queries of its KV head."""

    keys: Tensor  # [T, D]
    values: Tensor
    positions: Tensor  # [T]
    queries: Tensor  # [G, W, D]
    query_positions: Tensor  # [W]
    votes: Tensor  # [T]
    attention: Tensor  # [T, G]
    newest: int
    candidates: Tensor  # [T] bool
    scaling: float


def heads(given: Situation, dtype: torch.dtype = torch.float64) -> Iterator[Head]:
    """All segments, in order, everything as `dtype`."""
    segments, lists = given.scene.segments, {name: given.scene.lists(name) for name in given.scene.columns}
    for place in range(segments.count):
        layer, row, head = place // segments.per_layer, place // segments.heads % segments.rows, place % segments.heads
        own = slice(head * given.group, (head + 1) * given.group)
        positions = lists["positions"][place].cpu()
        first = place - head
        others = [one for one in lists["positions"][first : first + segments.heads] if len(one)]
        count = len(positions)
        candidates = (positions >= given.protect["sinks"]) & (torch.arange(count) < count - given.protect["recent"])
        if "pinned" in given.protect:
            candidates &= ~given.protect["pinned"][place, :count].cpu()
        yield Head(
            lists["keys"][place].cpu().to(dtype),
            lists["values"][place].cpu().to(dtype),
            positions,
            given.queries[layer][row, own].cpu().to(dtype),
            given.query_positions[layer][row].cpu(),
            lists["log_votes"][place].cpu().to(dtype) if "log_votes" in lists else torch.zeros(count, dtype=dtype),
            lists["attention"][place].cpu().to(dtype),
            max([int(one.max()) for one in others], default=-1),
            candidates,
            given.scaling,
        )


def logits(head: Head, queries: int, group: str) -> Tensor:
    """[G or 1, W, T] of the last `queries` queries, votes included."""
    found = head.queries[:, -queries:] @ head.keys.T * head.scaling + head.votes
    reductions = {"none": found, "mean": found.mean(0, True), "max": found.amax(0, True), "sum": found.sum(0, True)}
    return reductions[group]


def visible(head: Head, queries: int, region: str, causal: bool) -> Tensor:
    """[W, T] bool: what each query sees."""
    asked = head.query_positions[-queries:, None]
    seen = (asked >= 0) & (head.candidates if region == "candidates" else torch.ones_like(head.candidates))
    return seen & (head.positions <= asked) if causal else seen


def probabilities(head: Head, queries: int, region: str, causal: bool, group: str) -> Tensor:
    """[G or 1, W, T], zeros for what a query does not see."""
    seen = visible(head, queries, region, causal)
    masked = logits(head, queries, group).masked_fill(~seen, -torch.inf)
    return masked.softmax(-1).masked_fill(~seen, 0.0)


def log_sum_exp(head: Head, queries: int, region: str, causal: bool, group: str) -> Tensor:
    """[G or 1, W] base 2, -inf for a query that sees nothing."""
    masked = logits(head, queries, group).masked_fill(~visible(head, queries, region, causal), -torch.inf)
    return masked.logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=masked.dtype))


def directions(head: Head) -> Tensor:
    """[T, D], keys of length 1."""
    return head.keys / (head.keys.norm(dim=1, keepdim=True) + 1e-8)


def reduced(values: Tensor, how: str) -> Tensor:
    """[G, ...] to [...]."""
    return {"mean": values.mean, "sum": values.sum, "max": values.amax}[how](0)
