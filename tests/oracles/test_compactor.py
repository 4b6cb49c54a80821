"""Compactor (arXiv:2507.08143): leverage scores, and what an entry gets from all queries of its chunk.

The tokens behind the sinks are cut into chunks. In each, the queries of all entries that the head holds of the chunk
attend to all of these, later ones too: the softmax of q·k, without a factor. What an entry gets is summed over the
queries, averaged over the query heads, times the norm of the value, and averaged over three neighbours. Both scores are
standardised over a head's candidates. Of a chunk that is complete nothing is computed again.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Entry, Head, softmax
from tests.oracles.test_leverage import RANK, RIDGE, Leverage

CHUNK, SINKS, BLEND = 5, 8, 0.35  # sinks and blend as in the file


class Compactor(Leverage):
    """Both scores. The method sees all queries; those of evicted entries are not asked."""

    def observe(self, head: Head, probabilities: np.ndarray) -> None:
        new = [position for position, _ in head.window][-len(probabilities) :]
        for number in sorted({(position - SINKS) // CHUNK for position in new if position >= SINKS}):
            self.attend(head, [entry for entry in head.entries if (entry.position - SINKS) // CHUNK == number])

    def attend(self, head: Head, entries: list[Entry]) -> None:
        keys = np.stack([entry.key for entry in entries])
        queries = dict(head.window)
        given = [softmax(queries[entry.position] @ keys.T).mean(0) for entry in entries]
        for entry, received in zip(entries, np.sum(given, 0), strict=True):
            entry.received = received

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        leverages = super().scores(heads)
        return [
            BLEND * standardised(leverage) + standardised(self.attended_to(head))
            for head, leverage in zip(heads, leverages, strict=True)
        ]

    def attended_to(self, head: Head) -> np.ndarray:
        entries = [head.entries[slot] for slot in self.candidates(head)]
        weighed = [0.0, *(entry.received * np.linalg.norm(entry.value) for entry in entries), 0.0]
        return np.array([sum(weighed[index : index + 3]) / 3 for index in range(len(entries))])


def standardised(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean()) / scores.std()


@pytest.mark.parametrize("every", [1, 3, 5])
def test_what_its_chunk_attends_to_stays(every):
    """Compressed while decoding, too, to have more to compare: then chunks lose entries before they are complete."""
    given = 17, every, SINKS, 2
    policy = shipped("compactor", *given, rank=RANK, ridge=RIDGE, seed=7, chunk=CHUNK)
    assert_holds_what_the_oracle_holds(policy, Compactor, *given, 10**6)
