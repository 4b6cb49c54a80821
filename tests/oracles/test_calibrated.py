"""Q-Filters (arXiv:2503.02812) and TriAttention (arXiv:2604.04921): scores from what queries are like on a text.

The plain model reads the text, and its queries are looked at here: for Q-Filters the direction that they have in
common, for TriAttention their mean and length before rotation, as complex numbers.
"""

import numpy as np
import pytest
import torch

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method, softmax
from tests.support.models import build, prompt
from tests.support.oracle import attending_by

TEXT = 3, 40  # sequences, tokens


class Recorder:
    """Attends as the plain model does, and keeps the queries of each layer, [S, H, T, D] after rotation."""

    def __init__(self):
        self.queries = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **call):
        self.queries[module.layer_idx] = query.double().numpy()
        group, count = query.shape[1] // key.shape[1], query.shape[2]
        logits = scaling * query @ key.repeat_interleave(group, 1).transpose(-1, -2)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        weights = torch.from_numpy(softmax(logits.masked_fill(later, -torch.inf).double().numpy())).to(value.dtype)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


def queries_on_text():
    """The text, and the queries of each layer."""
    tokens = torch.cat([prompt(TEXT[1], seed=20 + row)[0] for row in range(TEXT[0])])
    recorder, plain = Recorder(), build()
    with attending_by(plain, recorder), torch.no_grad():
        plain(tokens, use_cache=False)
    return tokens, recorder.queries


class Filters(Method):
    """Keys along the main direction of the queries stay."""

    def __init__(self, *given, queries):
        super().__init__(*given)
        self.filters = {}
        for layer, own in queries.items():
            towards = []
            for head in range(own.shape[1]):
                seen = own[:, head].reshape(-1, own.shape[3])
                main = np.linalg.svd(seen)[2][0]
                towards.append(main if (seen @ main).mean() > 0 else -main)
            self.filters[layer] = towards

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        found = []
        for head in heads:
            towards = self.filters[head.layer]
            group = len(towards) // len(heads)
            own = np.mean(towards[head.number * group : (head.number + 1) * group], 0)
            found.append(np.array([head.entries[slot].key @ own for slot in self.candidates(head)]))
        return found


class Trigonometric(Method):
    """Keys that the mean query would attend to from 1, 2, 4 .. tokens further on stay."""

    furthest = 64

    def __init__(self, *given, queries, frequencies, over):
        super().__init__(*given)
        self.frequencies, self.over = frequencies, over
        self.mean, self.length = {}, {}
        for layer, own in queries.items():
            turned = complex_of(own) * np.exp(-1j * np.arange(own.shape[2])[:, None] * frequencies)
            self.mean[layer], self.length[layer] = turned.mean((0, 2)), np.abs(turned).mean((0, 2))

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        now = max(entry.position for head in heads for entry in head.entries) + 1
        found = []
        for head in heads:
            mean, length = self.mean[head.layer], self.length[head.layer]
            group = len(mean) // len(heads)
            of_group = []
            for query in range(head.number * group, (head.number + 1) * group):
                logits = []
                for slot in self.candidates(head):
                    entry = head.entries[slot]
                    key = complex_of(entry.key) * np.exp(-1j * entry.position * self.frequencies)
                    seen = []
                    for power in range(self.furthest.bit_length()):
                        distance = now + 2**power - entry.position
                        turned = mean[query] * np.exp(1j * distance * self.frequencies)
                        seen.append((turned * key.conj()).real.sum())
                    spare = ((length[query] - np.abs(mean[query])) * np.abs(key)).sum()
                    logits.append(getattr(np, self.over)(seen) + spare)
                of_group.append((np.array(logits) - np.mean(logits)) / np.std(logits))
            found.append(np.max(of_group, 0))
        return found


def complex_of(vectors):
    """Dimensions j and j + D/2 as one complex number."""
    half = vectors.shape[-1] // 2
    return vectors[..., :half] + 1j * vectors[..., half:]


@pytest.mark.parametrize("every", [1, 4])
def test_keys_along_the_common_direction_of_queries_stay(every):
    given = 12, every, 1, 3
    tokens, queries = queries_on_text()
    policy = shipped("q_filters", *given)

    def method(*numbers):
        return Filters(*numbers, queries=queries)

    assert_holds_what_the_oracle_holds(policy, method, *given, calibration=policy.calibrate(build(), tokens))


@pytest.mark.parametrize("over", ["mean", "max"])
def test_keys_that_typical_queries_would_attend_to_stay(over):
    given = 12, 4, 1, 3
    tokens, queries = queries_on_text()
    policy = shipped("triattention", *given, furthest=Trigonometric.furthest, over=over, prefill=True, prompt=False)
    frequencies = build().model.rotary_emb.inv_freq.double().numpy()

    def method(*numbers):
        return Trigonometric(*numbers, queries=queries, frequencies=frequencies, over=over)

    assert_holds_what_the_oracle_holds(policy, method, *given, calibration=policy.calibrate(build(), tokens))
