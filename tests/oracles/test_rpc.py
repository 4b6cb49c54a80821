"""RPC (arXiv:2505.13866): the prompt stays, and of what is generated a share, whatever its length.

After every P tokens generated beyond the newest R, what lies between the prompt and these competes for one entry in c
of all that was generated there. Votes: the probabilities that the last R queries give over what competes, summed over
queries, averaged over all heads of a layer and over seven neighbours.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method, softmax


class ReasoningPath(Method):
    prefill = False
    period, ratio = 8, 4

    def candidates(self, head: Head) -> list[int]:
        return list(range(head.prompt, len(head.entries) - self.recent))

    def compressible(self, head: Head) -> int:
        """Tokens generated so far that are older than the recent ones."""
        return head.entries[-1].position + 1 - head.prompt - self.recent

    def due(self, heads: list[Head], allowed: int, *, decoding: bool) -> bool:
        done = self.compressible(heads[0])
        return decoding and done > 0 and done % self.period == 0

    def allowed(self, heads: list[Head], layers: int, tokens: int) -> int:
        return heads[0].prompt + self.recent + self.compressible(heads[0]) // self.ratio

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        votes = []
        for head in heads:
            competing = softmax(head.logits(head.window)[..., self.candidates(head)])
            votes.append(competing.sum(0).mean(0))
        all_heads = np.mean(votes, 0)
        pooled = np.array([all_heads[max(0, at - 3) : at + 4].sum() / 7 for at in range(len(all_heads))])
        return [pooled] * len(heads)


@pytest.mark.parametrize(("period", "ratio", "tokens"), [(8, 4, 36), (4, 2, 22), (6, 3, 27)])
def test_what_is_generated_competes_for_a_share_of_it(period, ratio, tokens):
    recent = 3
    kind = type("Period", (ReasoningPath,), {"period": period, "ratio": ratio})
    given = f"{100 / ratio:.6f}% of generated", period - period // ratio, 0, recent
    policy = shipped("rpc", *given, queries=recent)
    assert_holds_what_the_oracle_holds(policy, kind, *given, recent, sizes=(12, *[1] * tokens))
