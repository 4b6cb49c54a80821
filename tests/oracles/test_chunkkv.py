"""ChunkKV (arXiv:2502.00299): chunks of contiguous entries stay whole, those that the last queries attend to most."""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention
from tests.oracles.simulation import Head, Method

SIZE = 3


class Chunked(Method):
    """Attention as in SnapKV, without pooling. What is held is cut into chunks; protected entries in one do not count.

    The best chunks on average stay; the one that does not fit whole gives its best entries.
    """

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [attention(head).sum(0).mean(0)[self.candidates(head)] for head in heads]

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        chunks: dict[int, list[int]] = {}
        for index, slot in enumerate(self.candidates(head)):
            chunks.setdefault(slot // SIZE, []).append(index)
        means = np.array([scores[own].mean() for own in chunks.values()])
        kept: list[int] = []
        for rank, chunk in enumerate(np.argsort(-means, kind="stable")):
            if rank + 1 < len(means):
                ordered = np.sort(means)[::-1]
                self.decided(means, ordered[rank], ordered[rank + 1])
            own = list(chunks.values())[chunk]
            left = count - len(kept)
            kept += own if len(own) <= left else [own[index] for index in self.best(scores[own], left)]
        return kept


@pytest.mark.parametrize("every", [1, 4])
def test_chunks_that_are_attended_to_stay_whole(every):
    given = 14, every, 1, 4
    select = {"use": "chunks", "size": SIZE}
    assert_holds_what_the_oracle_holds(shipped("chunkkv", *given, queries=4, select=select), Chunked, *given, 4)
