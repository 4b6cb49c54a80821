"""Entries that stand for others: attention with votes, and what a merger carries, whatever is asked of a layer."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpolicy.attention import blockwise
from tests.property.snapshots import Forward, appended, assert_same_state, attention, held_by, nothing, update_observers
from tests.property.test_packed_layers import HEADS, entries, plan_of
from tests.support.driving import feed, new_layer
from tests.support.examples import examples

ROWS, PROMPT = 4, 16
_EVERYONE = {"use": "keepkv", "threshold": -1}
MERGES = {
    "window_fit": {"use": "window_fit"},
    "scale": {**_EVERYONE, "key": "scale", "window": 3},
    "additive": {**_EVERYONE, "key": "additive", "window": 1, "alpha": 0.5},
    "lstsq": {**_EVERYONE, "key": "additive", "gqa": "lstsq", "window": 4},
    "bias": {**_EVERYONE, "key": "bias", "window": 2},
    "mean": {**_EVERYONE, "key": "mean", "estimate": "window", "window": 3},
    "some": {"use": "keepkv", "threshold": 0.3, "window": 32, "alpha": 0.0},
}
CONSERVING = ("scale", "additive", "lstsq", "mean")


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Layers of a test are short: blocks must be shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_LEAST", 4)
        patch.setattr(blockwise, "_NUMBERS", {"cpu": 16})
        patch.setattr(blockwise, "_LOGITS", 500)
        patch.setattr(blockwise, "_JOINED", 600)  # some are read at once, and some block by block
        yield


class VotesMachine(RuleBasedStateMachine):
    """Every forward is compared with attention in float64 over what was held before it."""

    ragged = False
    stores = ("plain", "kivi", "fp8", "tada")

    @initialize(
        rows=st.integers(1, 3),
        budget=st.integers(5, 10),
        every=st.integers(1, 5),
        merge=st.sampled_from(sorted(MERGES)),
        data=st.data(),
    )
    def start(self, rows, budget, every, merge, data):
        store = data.draw(st.sampled_from(self.stores), "store")
        self.plan = plan_of(store, budget, every, ragged=self.ragged, merge=MERGES[merge])
        self.merge, self.conserving = self.plan.spec.merge, merge in CONSERVING
        self.layer, self.generator = new_layer(self.plan), torch.Generator().manual_seed(rows)
        self.batch, self.budget, self.every = rows, budget, every
        self._empty()
        self._forward(torch.arange(PROMPT) >= torch.randint(PROMPT, (rows, 1), generator=self.generator))

    def _empty(self):
        self.real, self.valid = [0] * self.batch, []

    def _positions(self, valid):
        places = torch.tensor(self.real)[:, None] + valid.cumsum(1) - 1
        return places.where(valid, -1)

    @rule(count=st.integers(1, 6))
    def tokens(self, count):
        for _ in range(count):
            self._forward(torch.ones(self.batch, 1, dtype=torch.bool))

    @rule(count=st.sampled_from([2, 3, 5, 14]))
    def chunk(self, count):
        self._forward(torch.ones(self.batch, count, dtype=torch.bool))

    @rule(count=st.sampled_from([2, 5, 14]), seed=st.integers(0, 99), how=st.sampled_from(["left", "right", "any"]))
    def padded(self, count, seed, how):
        generator = torch.Generator().manual_seed(seed)
        real = torch.randint(1, count + 1, (self.batch, 1), generator=generator)
        places = torch.arange(count)
        valid = {"left": places >= count - real, "right": places < real}.get(how)
        if valid is None:
            valid = torch.rand(self.batch, count, generator=generator) < 0.6
            valid[:, seed % count] = True
        self._forward(valid)

    def _forward(self, valid):
        count = valid.shape[1]
        keys, values, queries = entries(self.generator, self.batch, count)
        forward = Forward(queries, self._positions(valid))
        before = held_by(self.layer) if self.layer.seq_len else nothing(self.plan, self.batch)
        expected = appended(before, self.plan, forward, keys, values)
        output = feed(self.layer, keys, values, queries, None if valid.all() else valid)
        assert output.isfinite().all()
        close = torch.allclose(output.double(), attention(expected, forward), atol=1e-4)
        assert close, (output - attention(expected, forward)).abs().max()
        self.real = [real + int(new) for real, new in zip(self.real, valid.sum(1), strict=True)]
        self.valid.append(valid)
        if self._follows:
            update_observers(expected, forward, self.merge)
        self._compare(expected)

    @property
    def _follows(self):
        return bool(self.merge.needs().forward_queries)

    def _compare(self, expected):
        if self._follows:
            held = held_by(self.layer) if self.layer.seq_len else []
            for rows in zip(held, expected, strict=False):
                for found, wanted in zip(*rows, strict=True):
                    assert_same_state(found, wanted)

    @precondition(lambda self: self.layer.seq_len)
    @rule(data=st.data(), how=st.sampled_from(["reorder", "repeat", "select"]))
    def move(self, data, how):
        before = held_by(self.layer)
        if how == "repeat" and self.batch <= ROWS // 2:
            rows = [row for row in range(self.batch) for _ in range(2)]
            self.layer.batch_repeat_interleave(2)
        else:
            size = self.batch if how != "select" else data.draw(st.integers(1, ROWS), "size")
            rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=size, max_size=size), "rows")
            move = self.layer.reorder_cache if how != "select" else self.layer.batch_select_indices
            move(torch.tensor(rows))
        self.batch, self.real = len(rows), [self.real[row] for row in rows]
        self.valid = [one[rows] for one in self.valid]
        for found, source in zip(held_by(self.layer), rows, strict=True):
            for one, old in zip(found, before[source], strict=True):
                assert one.keys() == old.keys()
                assert all(torch.equal(one[name], old[name]) for name in one)

    @rule(again=st.sampled_from([False, False, True]))
    def reset(self, again):
        if again:
            self.layer.reset()
            self._empty()

    @invariant()
    def holds_together(self):
        if not self.layer.seq_len:
            return
        self.layer.storage.check_integrity()
        assert self.layer.num_tokens == self.real
        for row, heads in enumerate(held_by(self.layer)):
            for one in heads:
                assert (one["positions"].diff() > 0).all()
                assert not len(one["positions"]) or one["positions"][-1] == self.real[row] - 1
                assert one["log_votes"].isfinite().all()
                if self.conserving:
                    assert abs(float(one["log_votes"].exp().sum()) - self.real[row]) < 1e-3 * max(1, self.real[row])

    @invariant()
    def stays_within_its_capacity(self):
        if self.layer.seq_len and self.layer.stats.compressions:
            most = HEADS * (self.budget + self.every) * self.batch
            assert self.layer.storage.slots.layout.slots <= most or self.layer.padded


class RaggedVotesMachine(VotesMachine):
    """The same, where heads keep different numbers of entries."""

    ragged = True
    stores = ("plain", "kivi", "fp8")


TestVotes, TestRaggedVotes = VotesMachine.TestCase, RaggedVotesMachine.TestCase
TestVotes.settings = TestRaggedVotes.settings = settings(max_examples=examples(16), stateful_step_count=14)
