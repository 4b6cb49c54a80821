"""AMS (arXiv:2605.23200): R-KV's scores within segments of equal attention mass, each of which keeps its quota."""

import itertools

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, softmax
from tests.oracles.test_rkv import Redundant

MASS, SHORTEST, LONGEST, LEAST = 0.15, 2, 4, 1


class Segmented(Redundant):
    """Within segments, of which those that keep more than their quota's share give way in turn, from the first on."""

    prefill = False

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        mass = self.mass(head)
        segments = self.segments(mass)
        quotas = self.quotas(
            [len(segment) for segment in segments], [mass[segment].sum() for segment in segments], count
        )
        kept = []
        for segment, quota in zip(segments, quotas, strict=True):
            kept += [segment[index] for index in self.best(scores[segment], quota)]
        return sorted(kept)

    def mass(self, head: Head) -> np.ndarray:
        """Of the candidates: the mean of the window's attention over them, and of two neighbours on either side."""
        own = softmax(head.logits(head.window)[..., self.candidates(head)]).mean((0, 1))
        padded = np.pad(own, 2)
        pooled = np.array([padded[index : index + 5].mean() for index in range(len(own))]) + 1e-12
        return pooled / pooled.sum()

    def segments(self, mass: np.ndarray) -> list[list[int]]:
        cuts, total, step = {0, len(mass)}, 0.0, 1
        for index, share in enumerate(mass):
            total += share
            self.margin = min(self.margin, *(abs(total - number * MASS) for number in range(1, int(1 / MASS) + 1)))
            while step * MASS < 1 and total >= step * MASS:
                cuts.add(min(max(index, 1), len(mass) - 1))
                step += 1
        ordered, pieces = sorted(cuts), []
        for start, end in itertools.pairwise(ordered):
            places = list(range(start, end))
            pieces += [places[first : first + LONGEST] for first in range(0, len(places), LONGEST)]
        merged = [pieces[0]]
        for piece in pieces[1:]:
            if len(merged[-1]) < SHORTEST:
                merged[-1] = merged[-1] + piece
            else:
                merged.append(piece)
        return merged

    def quotas(self, lengths: list[int], masses: list[float], count: int) -> list[int]:
        quotas = [min(LEAST, length) for length in lengths]
        rest = count - sum(quotas)
        if rest < 0:
            heaviest = self.best(np.array(masses), count)
            return [int(index in heaviest) for index in range(len(lengths))]
        least = list(quotas)
        for index, (length, mass) in enumerate(zip(lengths, masses, strict=True)):
            if rest:
                self.margin = min(self.margin, abs(rest * mass - np.floor(rest * mass) - 0.5))
            quotas[index] = min(length, quotas[index] + round(rest * mass))
        while sum(quotas) != count:
            for index, length in enumerate(lengths):
                if sum(quotas) > count and quotas[index] > least[index]:
                    quotas[index] -= 1
                elif sum(quotas) < count and quotas[index] < length:
                    quotas[index] += 1
        return quotas


@pytest.mark.parametrize(("budget", "every"), [(16, 3), (9, 2), (14, 1)])
def test_every_segment_keeps_its_quota(budget, every):
    """With a budget of 9, four candidates stay, at times fewer than there are segments."""
    given = budget, every, 1, 4
    changed = {"mass": MASS, "shortest": SHORTEST, "longest": LONGEST, "least": LEAST}
    policy = shipped("ams", *given, queries=4, **changed)
    assert_holds_what_the_oracle_holds(policy, Segmented, *given, 4)
