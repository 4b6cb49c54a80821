"""Budgets by heads that copy: HeadKV (arXiv:2410.19258), SurfaceLogicKV (2508.15806), DuoAttention (2410.10819).

The plain model reads rows of a text whose last n tokens are replaced by n tokens that stand earlier in the row, the
needle, and the attention of each head at these last n queries is looked at here. HeadKV and Duo: the attention to those
of the n highest entries that are in the needle, by n. SurfaceLogicKV: precision and recall of the ten highest, as
attention, and their harmonic mean. Averages over queries and rows, then over the query heads of a KV head (Surface-
LogicKV and Duo: the highest).
"""

import json
import math

import numpy as np
import pytest
import torch

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import softmax
from tests.oracles.test_snapkv import Adaptive, evenly
from tests.support.models import build, prompt
from tests.support.oracle import attending_by

ROWS, TOKENS, NEEDLE = 3, 41, 6


class Recorder:
    """Attends as the plain model does, and keeps the attention of each layer, [S, H, T, T]."""

    def __init__(self):
        self.attention = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **call):
        group, count = query.shape[1] // key.shape[1], query.shape[2]
        logits = scaling * query @ key.repeat_interleave(group, 1).transpose(-1, -2)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        weights = softmax(logits.masked_fill(later, -torch.inf).double().numpy())
        self.attention[module.layer_idx] = weights
        return (torch.from_numpy(weights).to(value.dtype) @ value.repeat_interleave(group, 1)).transpose(1, 2), None


def texts():
    """Rows of a text, and where their needles begin: in the middle of equal parts, one for each row."""
    tokens = torch.cat([prompt(TOKENS, seed=30 + row)[0] for row in range(ROWS)])
    return tokens, [math.floor((row + 0.5) / ROWS * (TOKENS - 2 * NEEDLE)) for row in range(ROWS)]


def copying():
    """The text, and of each layer and query head the attention of the last queries with where their needle is."""
    tokens, starts = texts()
    probes = [row[:-NEEDLE] + row[start : start + NEEDLE] for row, start in zip(tokens.tolist(), starts, strict=True)]
    recorder, plain = Recorder(), build()
    with attending_by(plain, recorder), torch.no_grad():
        plain(torch.tensor(probes), use_cache=False)
    seen = {
        (layer, head): [
            (own[row, head, query], range(start, start + NEEDLE))
            for row, start in enumerate(starts)
            for query in range(TOKENS - NEEDLE, TOKENS)
        ]
        for layer, own in recorder.attention.items()
        for head in range(own.shape[1])
    }
    return tokens, seen


def retrieval(attention, needle):
    highest = sorted(range(len(attention)), key=lambda slot: -attention[slot])[: len(needle)]
    return sum(attention[slot] / len(needle) for slot in highest if slot in needle)


def inference(attention, needle):
    highest = sorted(range(len(attention)), key=lambda slot: -attention[slot])[:10]
    hit = sum(attention[slot] for slot in highest if slot in needle)
    missed = sum(attention[slot] for slot in needle if slot not in highest)
    looked = sum(attention[slot] for slot in highest)
    return 2 * (hit / looked) * (hit / (hit + missed)) / (hit / looked + hit / (hit + missed)) if hit else 0.0


class Measured(Adaptive):
    """SnapKV's votes; budgets by importance, over all layers."""

    competing = True
    group = 2

    def __init__(self, *given, seen, measure, reduce):
        super().__init__(*given)
        of_queries = {place: np.mean([measure(*test) for test in tests]) for place, tests in seen.items()}
        layers, heads = (1 + max(place[axis] for place in seen) for axis in (0, 1))
        self.importance = [
            [reduce([of_queries[layer, head + member] for member in range(self.group)])
             for head in range(0, heads, self.group)]
            for layer in range(layers)
        ]  # fmt: skip

    def shares(self, scores: list[np.ndarray], each: int) -> list[int]:
        rooms = [len(own) for own in scores]
        exact = self.quotas(rooms, each)
        whole = [int(share + 1e-9) for share in exact]
        largest = sorted(range(len(exact)), key=lambda head: (-round(exact[head] - whole[head], 9), head))
        for head in largest[: each * len(scores) - sum(whole)]:
            whole[head] += 1
        return whole

    def floor_and_weights(self, base):
        """Candidates that all heads keep, and by what the others are divided."""
        share = base // 1.1
        return base - share, [own for layer in self.importance for own in layer]

    def quotas(self, rooms, base):
        floor, weights = self.floor_and_weights(base)
        pool, shares = (base - floor) * len(rooms), {}
        while len(shares) < len(rooms):
            left = [head for head in range(len(rooms)) if head not in shares]
            level = (pool - sum(shares.values())) / sum(weights[head] for head in left)
            full = [head for head in left if rooms[head] - floor < weights[head] * level]
            shares |= {h: rooms[h] - floor for h in full} if full else {h: weights[h] * level for h in left}
        return [floor + shares[head] for head in range(len(rooms))]


class Surface(Measured):
    def floor_and_weights(self, base):
        share = base // 1.351
        weights = [own + 0.01 * own / sum(layer) for layer in self.importance for own in layer]
        return (base - share + 0.5, weights) if share else (base, weights)


class Duo(Measured):
    def quotas(self, rooms, base):
        flat = [own for layer in self.importance for own in layer]
        order = sorted(range(len(flat)), key=lambda head: (flat[head], head))
        left, shares = base * len(rooms), {}
        for heads in (order[len(order) // 2 :], order[: len(order) // 2]):
            own = [rooms[head] for head in heads]
            given = min(left, sum(own))
            shares |= dict(zip(heads, evenly(own, given), strict=True))
            left -= given
        return [shares[head] for head in range(len(rooms))]


class Gated(Duo):
    """With gates that are given, a layer a line."""

    def __init__(self, *given, gates):
        Adaptive.__init__(self, *given)
        self.importance = gates


def test_heads_with_the_lowest_gates_stream(tmp_path):
    """The first layer has one, the second none, the last both of its heads; every other number is a tie."""
    given, gates = (14, 4, 1, 4), [[0.5, 0.75], [0.9, 0.75], [0.125, 0.5]]
    path = tmp_path / "gates.tsv"
    path.write_text("\n".join("\t".join(map(str, layer)) for layer in gates) + "\n")
    policy = shipped("duoattention", *given, queries=4, pool={"kind": "max", "size": 7})

    def method(*numbers):
        return Gated(*numbers, gates=gates)

    calibration = policy.calibrate_from_table(build(), path)
    assert_holds_what_the_oracle_holds(policy, method, *given, 4, calibration=calibration)


class Published(Measured):
    """With importances of KV heads that are given."""

    def __init__(self, *given, importance):
        Adaptive.__init__(self, *given)
        self.importance = importance


def test_heads_with_the_highest_published_importances_keep_more(tmp_path):
    """Scores of query heads in runs: averages over runs, then over the query heads of a KV head."""
    given = 14, 4, 1, 4
    scores = {f"{layer}-{head}": [layer + 1, 2 * head, 3] for head in (3, 1, 0, 2) for layer in (1, 2, 0)}
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(scores))
    means = [[np.mean(scores[f"{layer}-{head}"]) for head in range(4)] for layer in range(3)]
    importance = [[(own[0] + own[1]) / 2, (own[2] + own[3]) / 2] for own in means]
    policy = shipped("headkv", *given, queries=4)

    def method(*numbers):
        return Published(*numbers, importance=importance)

    calibration = policy.calibrate_from_table(build(), path)
    assert_holds_what_the_oracle_holds(policy, method, *given, 4, calibration=calibration)


@pytest.mark.parametrize(
    ("name", "kind", "measure", "reduce"),
    [
        ("headkv", Measured, retrieval, np.mean),
        ("surfacelogickv", Surface, inference, max),
        ("duoattention", Duo, retrieval, max),
    ],
)
@pytest.mark.parametrize("every", [1, 4])
def test_heads_that_look_back_at_what_they_copy_keep_more(name, kind, measure, reduce, every):
    given = 14, every, 1, 4
    tokens, seen = copying()
    changed = {"pool": {"kind": "max", "size": 7}}
    policy = shipped(name, *given, queries=4, needle=NEEDLE, **changed)

    def method(*numbers):
        return kind(*numbers, seen=seen, measure=measure, reduce=reduce)

    calibration = policy.calibrate(build(), tokens)
    assert_holds_what_the_oracle_holds(policy, method, *given, 4, calibration=calibration)
