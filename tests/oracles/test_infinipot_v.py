"""InfiniPot-V (arXiv:2506.15745): of a video, recent frames, patches that differ from these, and large values.

A frame is so many tokens behind the first. What the model reads is no video, and the last frame is often incomplete.
"""

import itertools

import numpy as np
import pytest

from tests.oracles.comparison import SIZES, assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method

RECENT, SHARE = 1 / 3, 2 / 3


class Video(Method):
    """Norms as they are; a third of the frames is recent, and two thirds of what stays is not chosen by norm."""

    side = 2  # rows, and columns, of a frame
    pool = "none"

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        norms = [[float(np.linalg.norm(head.entries[slot].value)) for slot in self.candidates(head)] for head in heads]
        return [np.array(self.pooled(head, own)) for head, own in zip(heads, norms, strict=True)]

    def pooled(self, _head: Head, norms: list[float]) -> list[float]:
        return norms

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        keys, patches = [head.entries[slot].key for slot in self.candidates(head)], self.side**2
        frames = len(keys) // patches
        recent = int(frames * RECENT + 1e-9)
        first_recent = (frames - recent) * patches
        stay = list(range(first_recent, len(keys)))[-count:]
        if recent:
            redundancy = []
            for index in range(first_recent):
                same_place = range(first_recent + index % patches, frames * patches, patches)
                redundancy.append(-np.mean([cosine(keys[index], keys[other]) for other in same_place]))
            quota = count - round((1 - SHARE) * count) - len(stay)
            stay = stay + self.best(np.array(redundancy), max(0, quota))
        rest = [index for index in range(len(keys)) if index not in stay]
        return sorted(stay + [rest[index] for index in self.best(scores[rest], count - len(stay))])


class Pooled(Video):
    """The first layer: means over three frames, rows and columns; the second: over rows and columns; then in a row."""

    side = 3
    pool = "depth"

    def pooled(self, head: Head, norms: list[float]) -> list[float]:
        if head.layer == 2:
            return [sum(norms[max(0, index - 1) : index + 2]) / 3 for index in range(len(norms))]
        if len(norms) < 3 * self.side**2:
            return norms
        at = {self.place(index): norm for index, norm in enumerate(norms)}
        frames = (-1, 0, 1) if head.layer == 0 else (0,)
        around = list(itertools.product(frames, (-1, 0, 1), (-1, 0, 1)))
        return [
            sum(at.get((frame + dt, row + dy, column + dx), 0.0) for dt, dy, dx in around) / len(around)
            for frame, row, column in at
        ]

    def place(self, index: int) -> tuple[int, int, int]:
        patch = index % self.side**2
        return index // self.side**2, patch // self.side, patch % self.side


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def policy_of(kind, given):
    side = kind.side
    select = {"use": "temporal_redundancy", "tokens_per_frame": side**2, "recent_frames": RECENT, "share": SHARE}
    return shipped("infinipot_v", *given, select=select, rows=side, columns=side, pool=kind.pool)


def test_frames_that_keep_coming_are_under_a_cap():
    """Whole frames, three at a time, behind one token; six stay, and then there is a question and an answer."""
    given, sizes = (25, 12, 1, 0), (37, *[12] * 5, 5, *[1] * 14)
    assert_holds_what_the_oracle_holds(policy_of(Video, given), Video, *given, sizes=sizes)


@pytest.mark.parametrize(("kind", "budget"), [(Video, 15), (Pooled, 30)])
@pytest.mark.parametrize("every", [1, 4])
def test_recent_frames_and_what_differs_from_them_stay(kind, budget, every):
    given = budget, every, 1, 0
    assert_holds_what_the_oracle_holds(policy_of(kind, given), kind, *given, sizes=(2 * budget, *SIZES[1:]))
