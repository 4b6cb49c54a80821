"""R-KV (arXiv:2505.24133), as in the authors' code: the window's attention against the redundancy of keys."""

import numpy as np

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import pooled, redundancy
from tests.oracles.simulation import Head, Method, softmax


class Redundant(Method):
    """0.1 I - 0.9 R.

    I: of each query the largest logit of the group, then probabilities over the candidates alone, the mean over the
    queries, and the largest of seven neighbours. R: softmax over all that is held of the mean similarity that the
    others have to it (see `redundancy`); who resembles nobody spares the first slot.
    """

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [0.1 * self.importance(head) - 0.9 * self.alike(head) for head in heads]

    def importance(self, head: Head) -> np.ndarray:
        best = head.logits(head.window).max(1)[:, self.candidates(head)]
        return pooled(softmax(best).mean(0), 7)

    def alike(self, head: Head) -> np.ndarray:
        return softmax(redundancy(head, self, spare_first=True))[self.candidates(head)]


def test_what_is_attended_to_and_not_redundant_stays():
    given = 12, 4, 0, 4
    assert_holds_what_the_oracle_holds(shipped("rkv", *given, queries=4), Redundant, *given, 4)


def test_sinks_count_as_look_alikes_and_are_never_evicted():
    given = 12, 2, 2, 4
    assert_holds_what_the_oracle_holds(shipped("rkv", *given, queries=3), Redundant, *given, 3)


def test_packed_keys_are_compared_as_they_are_held():
    given = 12, 4, 0, 4
    policy = shipped(
        "rkv_int4", *given, queries=4, store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}
    )
    assert_holds_what_the_oracle_holds(policy, Redundant, *given, 4, changes=True)
