"""Scorer `redundancy`: similarity of an entry's key to the other keys of its head."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvpolicy.stages import Choice, ColumnRequest, Integer, Number, Postprocess, Scorer, Tile, Traffic, View, parameter
from kvpolicy_plugins.scorers.shared.similar_keys import forgiven_similarity


@attrs.frozen
class Redundancy(Scorer):
    """Mean similarity of an entry's key to the other keys of its head, R-KV (section 3.3). Use a negative weight.

    1. S = cosine similarity of all pairs of keys, diagonal 0;
    2. every row forgives its newest similar entries (S > `threshold`): those pairs count 0, so that the newest entry
       of a cluster has a low score and is kept;
    3. scores = softmax over the entries of the mean over rows.

    S is not stored: its column sums are products with the sum of all unit keys, and step 2 is a search by blocks that
    ends when every row has found its similar entries. Memory is linear in T.
    """

    name: ClassVar[str] = "redundancy"
    reference: ClassVar[str] = "arXiv:2505.24133"
    layers_as_rows: ClassVar[bool] = True

    threshold: float = parameter(
        Number(minimum=0, maximum=1), 0.5, help="cosine similarity above which two keys are similar"
    )
    forgive: int = parameter(Integer(minimum=0), 1, help="similar entries that each entry forgives (beta)")
    forgive_end: str = parameter(
        Choice(("last", "first")), "last", help="forgive the newest similar entries or the oldest"
    )
    empty_row: str = parameter(
        Choice(("slot0", "none")),
        "slot0",
        help="what an entry without similar entries forgives: the first slot, as published, or none",
    )

    def tile(self) -> Tile:
        from kvpolicy_kernels.score.tiles.redundancy import directions, mean_similarity

        forgives = self.forgive > 0 or self.empty_row == "slot0"
        column, traffic = (self._column, self._traffic) if forgives else (None, None)
        softmax = Postprocess(softmax=True)
        return Tile(mean_similarity, statistic=directions, column=column, column_traffic=traffic, postprocess=softmax)

    def _column(self, request: ColumnRequest) -> Tensor:
        from kvpolicy_kernels.score.redundancy.forgiven_similarity import forgiven_similarity

        return forgiven_similarity(
            request.segments,
            request.keys,
            threshold=self.threshold,
            forgive=self.forgive,
            end=self.forgive_end,
            empty_row=self.empty_row,
        )

    def _traffic(self, request: ColumnRequest, lengths: Sequence[int]) -> Traffic:
        """Upper bound of the traffic: without similar keys the search visits all pairs of blocks."""
        from kvpolicy_kernels.score.redundancy.forgiven_similarity import traffic

        return traffic(request.segments, lengths, request.keys, forgive=self.forgive)

    def score(self, view: View) -> Tensor:
        keys, valid = view.keys.flatten(0, 1), view.valid.flatten(0, 1)
        heads_per_call = 1 if keys.device.type == "cpu" else len(keys)  # the keys of a head fit into the cache of a CPU
        similarities = [
            self._similarity(*head)
            for head in zip(keys.split(heads_per_call), valid.split(heads_per_call), strict=True)
        ]
        mean = torch.cat(similarities).view(view.valid.shape) / view.lengths[..., None].clamp(min=1)
        return mean.masked_fill(~view.valid, -torch.inf).softmax(-1).masked_fill(~view.valid, 0.0)

    def _similarity(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Keys [S, T, D] to [S, T]: sum of similarities to the others, without the forgiven ones."""
        keys = keys.float().masked_fill(~valid[..., None], 0.0)
        norms: Tensor = vector_norm(keys, dim=-1, keepdim=True)
        directions = keys.div_(norms + 1e-8)
        self_similarity = norms.div_(norms + 1e-8).square_()
        total = directions.sum(1)[..., None]
        return (directions @ total - self_similarity).squeeze(-1) - self._forgiven(directions, valid)

    def _forgiven(self, directions: Tensor, valid: Tensor) -> Tensor:
        """[S, T]: per column, the sum of the similarities of the rows that forgive it."""
        last = self.forgive_end == "last"
        sums, has_similar = forgiven_similarity(directions, valid, self.threshold, self.forgive, last=last)
        if self.empty_row == "slot0":
            no_similar = (~has_similar).to(directions.dtype)
            no_similar[:, 0] = 0  # the first slot does not forgive itself: the diagonal of S is 0
            sums[:, 0] += (no_similar[:, None] @ (directions @ directions[:, :1].transpose(1, 2))).flatten()
        return sums
