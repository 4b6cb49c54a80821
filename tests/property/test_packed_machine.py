"""Packed layers, whatever is asked of them: what is decoded is what came, within the error of the format."""

import attrs
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpolicy.attention import blockwise
from kvpolicy.plan.plan import POSITIONS
from tests.property.snapshots import Forward, appended, attention, held_by, nothing
from tests.property.test_packed_layers import HEADS, STORES, entries, plan_of
from tests.support.driving import FirstHeads, feed, new_layer
from tests.support.examples import examples

ROWS, PROMPT, BUDGET = 4, 24, 14
PACKED = sorted(set(STORES) - {"plain"})
JOINT = ("tada", "latent")
TIMES = 2.5  # the error of one packing, for entries that have been packed again and again


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Layers of a test are short: blocks must be shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_LEAST", 4)
        patch.setattr(blockwise, "_NUMBERS", {"cpu": 16})
        patch.setattr(blockwise, "_LOGITS", 500)
        patch.setattr(blockwise, "_JOINED", 600)  # some are read at once, and some block by block
        yield


class PackedMachine(RuleBasedStateMachine):
    """Keeps what every position was given."""

    readers = ("all",)

    @initialize(rows=st.integers(1, 3), every=st.integers(1, 7), ragged=st.booleans(), data=st.data())
    def start(self, rows, every, ragged, data):
        store = data.draw(st.sampled_from(PACKED), "store")
        self.ragged = ragged and store not in JOINT
        self.plan = plan_of(store, BUDGET, every, ragged=self.ragged, read=data.draw(st.sampled_from(self.readers)))
        self.every, self.batch = every, rows
        self.layer, self.generator = new_layer(self.plan), torch.Generator().manual_seed(rows)
        self._empty()
        self._forward(torch.arange(PROMPT) >= torch.randint(PROMPT, (rows, 1), generator=self.generator))

    def _empty(self):
        self.given = [([], []) for _ in range(self.batch)]  # keys and values [K, D] by position

    def _forward(self, valid):
        keys, values, queries = entries(self.generator, self.batch, valid.shape[1])
        real = torch.tensor([len(one) for one, _ in self.given])
        positions = (real[:, None] + valid.cumsum(1) - 1).where(valid, -1)
        forward = Forward(queries, positions)
        before = held_by(self.layer) if self.layer.seq_len else nothing(self.plan, self.batch)
        expected = attention(appended(before, self.plan, forward, keys, values), forward)
        output = feed(self.layer, keys, values, queries, None if valid.all() else valid)
        if self.plan.spec.read.name == "all" or valid.shape[1] > 1:
            assert torch.allclose(output.double(), expected, atol=1e-4), (output - expected).abs().max()
        for row, (own_keys, own_values) in enumerate(self.given):
            own_keys += list(keys[row][:, valid[row]].unbind(1))
            own_values += list(values[row][:, valid[row]].unbind(1))

    @rule(count=st.integers(1, 9))
    def tokens(self, count):
        for _ in range(count):
            self._forward(torch.ones(self.batch, 1, dtype=torch.bool))

    @rule(count=st.sampled_from([2, 3, 5, 20]), seed=st.integers(0, 99), padded=st.booleans())
    def chunk(self, count, seed, padded):
        valid = torch.rand(self.batch, count, generator=torch.Generator().manual_seed(seed)) < 0.7
        valid[:, seed % count] = True
        self._forward(valid | torch.tensor(not padded))

    @precondition(lambda self: self.layer.seq_len)
    @rule(data=st.data(), how=st.sampled_from(["reorder", "repeat", "select"]))
    def move(self, data, how):
        before = held_by(self.layer)
        if how == "repeat" and self.batch <= ROWS // 2:
            rows = [row for row in range(self.batch) for _ in range(2)]
            self.layer.batch_repeat_interleave(2)
        else:
            size = data.draw(st.integers(1, ROWS), "size") if how == "select" else self.batch
            rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=size, max_size=size), "rows")
            move = self.layer.batch_select_indices if how == "select" else self.layer.reorder_cache
            move(torch.tensor(rows))
        self.batch = len(rows)
        self.given = [tuple(list(one) for one in self.given[row]) for row in rows]
        for found, source in zip(held_by(self.layer), rows, strict=True):
            for one, old in zip(found, before[source], strict=True):
                assert all(torch.equal(one[name], old[name]) for name in one)

    @rule(again=st.sampled_from([False, False, True]))
    def reset(self, again):
        if again:
            self.layer.reset()
            self._empty()

    @invariant()
    def holds_what_came(self):
        if not self.layer.seq_len:
            return
        layer = self.layer
        layer.storage.check_integrity()
        assert layer.num_tokens == [len(keys) for keys, _ in self.given]
        for row, heads in enumerate(held_by(layer)):
            for head, one in enumerate(heads):
                positions = one["positions"].long().tolist()
                assert positions == sorted(set(positions))
                assert not positions or positions[-1] == layer.num_tokens[row] - 1
                for name, own in zip(("keys", "values"), self.given[row], strict=True):
                    self._compare(getattr(layer.storage, name), one[name], [own[p] for p in positions], head)

    def _compare(self, half, found, given, head):
        """Within the error of the format: what is not packed now may have been before others were evicted."""
        if not given:
            return
        exact = torch.stack([one[head] for one in given]).double()
        assert (found - exact).abs().max() <= TIMES * self._error
        if half.form.residual_length or not self.layer.compressed:
            assert torch.equal(found[-1:], exact[-1:])

    @property
    def _error(self):
        """Half a step of 4 bits over the range of the entries; latents leave out dimensions, 2 bits are few."""
        name = self.plan.spec.store.name
        return {"fp8": 0.2, "latent": 4.0, "nova_vq": 1.5}.get(name, 0.35)

    @invariant()
    def stays_within_the_bytes_of_the_plan(self):
        layer = self.layer
        if not layer.seq_len or not layer.stats.compressions:
            return
        most = layer.plan.footprint.layer_bytes(0, BUDGET + self.every) * self.batch
        units = 0
        if self.ragged:  # each head of its own length rounds up its units by itself
            forms = (self.plan.formats[0].keys, self.plan.formats[0].values)
            sizes = (
                form.nbytes(form.residual_length + form.step, self.plan.geometry, self.plan.dtype) for form in forms
            )
            units = HEADS * self.batch * sum(sizes)
        assert layer.storage.nbytes <= most + units


class ReadMachine(PackedMachine):
    """The same with a reader that keeps pages."""

    readers = ({"use": "pages", "page": 4, "budget": 8, "dense_first": 0},)


TestPacked, TestRead = PackedMachine.TestCase, ReadMachine.TestCase
TestPacked.settings = settings(max_examples=examples(14), stateful_step_count=14)
TestRead.settings = settings(max_examples=examples(10), stateful_step_count=14)


def test_a_head_with_nothing_packed_is_read_beside_one_that_is_full():
    """Ragged heads, where the reader picks single slots: one head is too short for its oldest to be packed."""
    read = {"use": "pages", "page": 4, "budget": 8, "dense_first": 0}
    plan = plan_of("kivi", 24, 4, ragged=True, read=read)
    heads = attrs.evolve(plan.spec.allocate, heads=FirstHeads())
    plan = attrs.evolve(plan, spec=attrs.evolve(plan.spec, allocate=heads))
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 1, 60))
    for _ in range(12):
        feed(layer, *entries(generator, 1, 1))
        assert layer.storage.keys.packed_lengths[0][0] > layer.storage.keys.packed_lengths[0][1] == 0


@pytest.mark.parametrize("store", PACKED)
def test_a_block_behind_what_is_packed_of_any_row_is_read_where_each_row_has_it(store):
    """Rows of different lengths have packed different numbers of entries; blocks of attention are shorter than both."""
    plan = plan_of(store, "100%")
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 2, 40), torch.arange(40) >= torch.tensor([[0], [7]]))
    positions = layer.storage.column(POSITIONS, layer.storage.everything)
    real = positions >= 0
    for size in (4, 8, 12):
        starts = range(0, positions.shape[2], size)
        blocks = [(start, min(start + size, positions.shape[2])) for start in starts]
        for half in (layer.storage.keys, layer.storage.values):
            whole = half.read(layer.storage.everything, 0, positions.shape[2], positions)
            read = [half.read(layer.storage.everything, *one, positions) for one in blocks]
            assert torch.allclose(torch.cat(read, 2)[real], whole[real], atol=1e-6)


@pytest.mark.parametrize("count", [6, 40], ids=["pads leave", "pads leave and entries are packed"])
def test_what_is_noted_of_a_step_is_what_it_leaves(count):
    layer, generator = new_layer(plan_of("kivi", "100%")), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 2, count), torch.arange(count) >= torch.tensor([[0], [3]]))
    assert layer.storage.is_plain == (count == 6)
    assert not layer.padded
    assert layer.stats.held == layer.storage.slots.average == count - 1.5
    assert layer.stats.entry_bytes == layer.storage.nbytes
