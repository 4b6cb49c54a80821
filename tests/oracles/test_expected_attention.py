"""Expected Attention (arXiv:2510.00636): keys that queries to come are expected to attend to stay.

Queries of the last W tokens, those of the sinks left out, are turned back to before rotation; their mean and covariance
are turned by the mean of the rotation matrices of the next positions. A key's logit is the logarithm of the expected
exp(s · q·k) of Gaussian queries with these; the softmax is over the keys behind the sinks, and its mean over the query
heads is multiplied by the norm of the value.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method, softmax
from tests.support.models import build

FUTURE = 6


def rotation(position, frequencies):
    """The matrix [D, D] that turns dimensions j and j + D/2 by position · frequency."""
    half = len(frequencies)
    matrix = np.zeros((2 * half, 2 * half))
    for index, frequency in enumerate(frequencies):
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        matrix[index, index] = matrix[index + half, index + half] = cos
        matrix[index, index + half], matrix[index + half, index] = -sin, sin
    return matrix


class Expected(Method):
    covariance = True

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        frequencies = build().model.rotary_emb.inv_freq.double().numpy()
        now = max(entry.position for head in heads for entry in head.entries) + 1
        ahead = np.mean([rotation(now + step, frequencies) for step in range(FUTURE)], 0)
        found = []
        for head in heads:
            behind = [entry for entry in head.entries if entry.position >= self.sinks]
            keys = np.stack([entry.key for entry in behind])
            shown = [(at, query) for at, query in head.window if at >= self.sinks]
            attention = []
            for one in range(shown[0][1].shape[0]):
                raw = np.stack([rotation(-at, frequencies) @ query[one] for at, query in shown])
                mean, spread = ahead @ raw.mean(0), ahead @ np.cov(raw.T, bias=True) @ ahead.T
                logits = head.scaling * keys @ mean
                if self.covariance:
                    logits += head.scaling**2 / 2 * np.einsum("td,de,te->t", keys, spread, keys)
                attention.append(softmax(logits))
            worth = np.mean(attention, 0) * [np.linalg.norm(entry.value) for entry in behind]
            by_position = {entry.position: own for entry, own in zip(behind, worth, strict=True)}
            found.append(np.array([by_position[head.entries[slot].position] for slot in self.candidates(head)]))
        return found


@pytest.mark.parametrize(("every", "queries", "covariance"), [(1, 5, True), (4, 9, True), (4, 9, False)])
def test_keys_that_are_expected_to_be_attended_to_stay(every, queries, covariance):
    given = 12, every, 2, 3
    policy = shipped("expected_attention", *given, queries=queries, future=FUTURE, covariance=covariance)
    kind = type("Either", (Expected,), {"covariance": covariance})
    assert_holds_what_the_oracle_holds(policy, kind, *given, queries)
