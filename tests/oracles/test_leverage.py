"""Leverage scores, of Compactor (arXiv:2507.08143): keys that others of their head are combinations of go."""

import numpy as np

from tests.oracles.comparison import SHORT, assert_holds_what_the_oracle_holds, shipped
from tests.oracles.drawing import gaussians
from tests.oracles.simulation import Entry, Head, Method
from tests.support.models import model

RANK, RIDGE = 3, 0.01


class Leverage(Method):
    """x (XᵀX + ridge)⁻¹ xᵀ of the keys before rotation, centred and projected to three dimensions."""

    layer = 0

    def entries(self, layer: int, layers: int, tokens: int) -> int:
        self.layer = layer
        return super().entries(layer, layers, tokens)

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        newest = max(head.entries[-1].position for head in heads)
        drawn = gaussians(7, self.layer, newest, len(heads[0].entries[0].key), RANK)
        return [self.worth(head.entries, drawn / np.sqrt(RANK))[self.candidates(head)] for head in heads]

    def worth(self, entries: list[Entry], drawn: np.ndarray) -> np.ndarray:
        keys = np.stack([before_rotation(entry) for entry in entries])
        rows = (keys - keys.mean(0)) @ drawn
        inverse = np.linalg.inv(rows.T @ rows + RIDGE * np.eye(RANK))
        return np.array([row @ inverse @ row for row in rows])


def before_rotation(entry: Entry) -> np.ndarray:
    """Dimension i and i + D/2 are a complex number, turned by position · theta^(-2i/D)."""
    half = len(entry.key) // 2
    base = model().config.rope_parameters["rope_theta"]
    turned = entry.key[:half] + 1j * entry.key[half:]
    back = turned * np.exp(-1j * entry.position * base ** (-np.arange(half) / half))
    return np.concatenate([back.real, back.imag])


def test_keys_that_others_span_go():
    given = 9, 2, 2, 2
    policy = shipped("leverage", *given, rank=RANK, ridge=RIDGE, seed=7)
    assert_holds_what_the_oracle_holds(policy, Leverage, *given, sizes=SHORT)
