"""Entries that say what newer ones say again."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvpolicy.stages import Choice, Integer, Number, Scorer, View, parameter

_ROWS = 512
_COLUMNS = 128


@attrs.frozen
class Redundancy(Scorer):
    """How much the other keys of a head resemble an entry's key, R-KV (section 3.3). Weigh it negatively.

    1. S = cosine similarity of all pairs of keys, diagonal 0;
    2. every row forgives its newest look-alikes (S > `threshold`): those pairs count 0, so that the newest
       of a cluster looks unlike the rest and survives;
    3. scores = softmax over the entries of the mean over rows.

    S is never held: its column sums are products with the sum of all directions, and step 2 is a search by
    blocks that ends when every row has found its look-alikes. Memory grows with T, not with T squared.
    """

    name: ClassVar[str] = "redundancy"
    reference: ClassVar[str] = "arXiv:2505.24133"

    threshold: float = parameter(
        Number(minimum=0, maximum=1), 0.5, help="cosine similarity above which two keys look alike"
    )
    forgive: int = parameter(Integer(minimum=0), 1, help="look-alikes that each entry forgives (beta)")
    forgive_end: str = parameter(Choice(("last", "first")), "last", help="forgive the newest look-alikes or the oldest")
    empty_row: str = parameter(
        Choice(("slot0", "none")),
        "slot0",
        help="whom an entry forgives that has forgiven nobody: the first slot, as published, or no one",
    )

    def score(self, view: View) -> Tensor:
        keys = view.keys.float().masked_fill(~view.valid[..., None], 0.0)
        norms: Tensor = vector_norm(keys, dim=-1, keepdim=True)
        directions = keys / (norms + 1e-8)
        total = directions.sum(-2, keepdim=True)
        similarity = (directions * (total - directions)).sum(-1) - self._forgiven(directions, view.valid)
        mean = similarity / view.lengths[..., None].clamp(min=1)
        return mean.masked_fill(~view.valid, -torch.inf).softmax(-1).masked_fill(~view.valid, 0.0)

    def _forgiven(self, directions: Tensor, valid: Tensor) -> Tensor:
        """[B, K, T]: per column, the similarities of the rows that forgive it."""
        forgiven = torch.zeros_like(valid, dtype=torch.float32)
        for start in range(0, directions.shape[2], _ROWS):
            rows = slice(start, min(start + _ROWS, directions.shape[2]))
            found = self._search(directions, rows, valid, forgiven)
            if self.empty_row == "slot0":
                alone = directions[:, :, rows].masked_fill(found[..., None] > 0, 0.0).sum(-2)
                if start == 0:  # the diagonal is 0: the first slot has nothing to forgive itself
                    alone = alone - directions[:, :, 0].masked_fill(found[..., :1] > 0, 0.0)
                forgiven[..., 0] += (alone * directions[:, :, 0]).sum(-1)
        return forgiven

    def _search(self, directions: Tensor, rows: slice, valid: Tensor, forgiven: Tensor) -> Tensor:
        """Adds what `rows` forgive to `forgiven`; how many look-alikes each has met, [B, K, rows]."""
        ours = directions[:, :, rows]
        found = torch.zeros(ours.shape[:3], dtype=torch.int32, device=ours.device)
        for columns in self._columns(directions.shape[2]):
            # Entries that are done need no further search. Only a host can look without making a device wait.
            if ours.device.type == "cpu" and bool(((found >= self.forgive) | ~valid[:, :, rows]).all()):
                break
            similarity = ours @ directions[:, :, columns].transpose(-1, -2)
            similarity.diagonal(rows.start - columns.start, -2, -1).zero_()
            alike = similarity > self.threshold
            pardoned = alike & (self._rank(alike) + found[..., None] <= self.forgive)
            forgiven[..., columns] += similarity.masked_fill_(~pardoned, 0.0).sum(-2)
            found += alike.sum(-1, dtype=torch.int32)
        return found

    def _columns(self, slots: int) -> Iterator[slice]:
        """Blocks of columns in the order of the search."""
        starts = range(0, slots, _COLUMNS)
        for start in reversed(starts) if self.forgive_end == "last" else starts:
            yield slice(start, min(start + _COLUMNS, slots))

    def _rank(self, alike: Tensor) -> Tensor:
        """1 for the look-alike of a row that the search meets first, 2 for the next, and so on."""
        if self.forgive_end == "first":
            return alike.cumsum(-1, dtype=torch.int32)
        return alike.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
