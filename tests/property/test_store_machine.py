"""The store against plain Python lists: an exact gather, and nothing touched beside it."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import Column
from tests.support.examples import examples

COLUMNS = {
    POSITIONS: Column((), torch.int32, -1),
    "keys": Column((2,), torch.float32),
    "values": Column((32,), torch.float32),  # wide enough to be moved segment by segment
    "votes": Column((), torch.float32, 3.0),
}


def filled(slots):
    """Those that stay, in the order in which they stand when the last of them have filled the holes."""
    holes = [place for place in range(len(slots)) if place not in slots]
    standing = {slot: slot for slot in slots if slot < len(slots)} | dict(
        zip(holes, (slot for slot in slots if slot >= len(slots)), strict=True)
    )
    return [standing[place] for place in range(len(slots))]


class StoreMachine(RuleBasedStateMachine):
    """Segments grow together at their ends; rows are replaced, dropped and repeated."""

    @initialize(rows=st.integers(1, 3), heads=st.integers(1, 3))
    def start(self, rows, heads):
        self.store = SlotStore(COLUMNS, rows, heads, torch.device("cpu"))
        self.heads, self.next = heads, 1
        self.segments = [[[] for _ in range(heads)] for _ in range(rows)]

    def _fresh(self, rows, count):
        """Entries that no other has: positions, keys, values and votes, [rows, K, count, ...]."""
        names = self.next + torch.arange(rows * self.heads * count).reshape(rows, self.heads, count)
        self.next += names.numel()
        keys = torch.stack([names, -names], -1).float()
        return {POSITIONS: names.int(), "keys": keys, "values": keys.repeat(1, 1, 1, 16), "votes": names / 2}

    @rule(count=st.integers(0, 5), limit=st.integers(0, 12), voted=st.booleans())
    def append(self, count, limit, voted):
        fresh = self._fresh(len(self.segments), count)
        if not voted:
            del fresh["votes"]
        before = self.store.layout
        self.store.append(fresh, limit)
        for row, heads in enumerate(self.segments):
            for head, held in enumerate(heads):
                positions = fresh[POSITIONS][row, head].tolist()
                held += [(name, name / 2 if voted else 3.0) for name in positions]
        if before.uniform is not None and self.store.layout != before:
            assert self.store.layout.uniform <= max(limit, self.store.longest)

    @precondition(lambda self: self._shortest() > 0)
    @rule(data=st.data())
    def overwrite(self, data):
        count = data.draw(st.integers(1, self._shortest()), "newest")
        fresh = self._fresh(len(self.segments), count)[POSITIONS]
        self.store.overwrite_newest(POSITIONS, fresh)
        keys = torch.stack([fresh, -fresh], -1).float()
        self.store.overwrite_newest("keys", keys)
        self.store.overwrite_newest("values", keys.repeat(1, 1, 1, 16))
        self.store.overwrite_newest("votes", fresh / 2)
        for row, heads in enumerate(self.segments):
            for head, held in enumerate(heads):
                held[-count:] = [(name, name / 2) for name in fresh[row, head].tolist()]

    @precondition(lambda self: self._shortest() > 0)
    @rule(data=st.data())
    def truncate(self, data):
        count = data.draw(st.integers(0, self._shortest()), "dropped")
        self.store.truncate(count)
        for heads in self.segments:
            for held in heads:
                del held[len(held) - count :]

    @rule(data=st.data(), slack=st.integers(0, 3), even=st.booleans())
    def replace(self, data, slack, even):
        rows = data.draw(st.lists(st.integers(0, len(self.segments) - 1), unique=True, min_size=1).map(sorted), "rows")
        sizes = st.lists(st.integers(0, 6), min_size=self.heads, max_size=self.heads)
        lengths = tuple(tuple(data.draw(sizes, "lengths")) for _ in rows)
        fresh = self._fresh(len(rows), max(map(max, lengths)))
        after = [tuple(map(len, heads)) for heads in self.segments]
        for place, row in enumerate(rows):
            after[row] = lengths[place]
            for head, length in enumerate(lengths[place]):
                names = fresh[POSITIONS][place, head, :length].tolist()
                self.segments[row][head] = [(name, name / 2) for name in names]
        layout = Layout(tuple(tuple(length + slack for length in row) for row in after))
        if even:
            layout = Layout.even(len(after), self.heads, max(map(max, after)) + slack)
        before = {name: tensor.data_ptr() for name, tensor in self.store.tensors.items()}
        unchanged = layout == self.store.layout
        self.store.replace(rows, fresh, lengths, layout)
        if unchanged:
            assert before == {name: tensor.data_ptr() for name, tensor in self.store.tensors.items()}

    @rule(
        data=st.data(),
        slack=st.integers(0, 3),
        form=st.sampled_from(("even", "ragged", "as it is")),
        fills=st.booleans(),
    )
    def keep(self, data, slack, form, fills):
        rows = data.draw(st.lists(st.integers(0, len(self.segments) - 1), unique=True, min_size=1), "rows")
        stay = [
            [data.draw(st.lists(st.booleans(), min_size=len(h), max_size=len(h)), "stay") for h in self.segments[row]]
            for row in rows
        ]
        slots = [[[slot for slot, one in enumerate(head) if one] for head in row] for row in stay]
        most = max(len(head) for row in slots for head in row)
        kept = torch.tensor([[head + [-1] * (most - len(head)) for head in row] for row in slots], dtype=torch.int64)
        after = [tuple(map(len, heads)) for heads in self.segments]
        for row, heads in zip(rows, slots, strict=True):
            after[row] = tuple(map(len, heads))
        layout = {
            "even": Layout.even(len(after), self.heads, max(map(max, after)) + slack),
            "ragged": Layout(tuple(tuple(length + slack for length in row) for row in after)),
            "as it is": self.store.layout,
        }[form]
        before = {name: tensor.data_ptr() for name, tensor in self.store.tensors.items()}
        unchanged = layout == self.store.layout
        stand = filled if fills and unchanged else list
        evicted = max(
            len(held) - len(left)
            for row, own in zip(rows, slots, strict=True)
            for held, left in zip(self.segments[row], own, strict=True)
        )
        holes = evicted + data.draw(st.integers(0, 2), "spare") if fills else None
        for row, heads in zip(rows, slots, strict=True):
            self.segments[row] = [
                [held[slot] for slot in stand(head)] for held, head in zip(self.segments[row], heads, strict=True)
            ]
        self.store.keep(CompactionPlan(rows, kept.reshape(len(rows), self.heads, most), holes), layout)
        if unchanged:
            assert before == {name: tensor.data_ptr() for name, tensor in self.store.tensors.items()}

    @rule(data=st.data())
    def write(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.segments) - 1), unique=True, min_size=1), "rows")
        self.store.write(rows, {"votes": torch.zeros_like(self.store.padded("votes", rows))})
        for row in rows:
            self.segments[row] = [[(name, 0.0) for name, _ in held] for held in self.segments[row]]

    @rule(data=st.data())
    def select(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.segments) - 1), min_size=1, max_size=4), "rows")
        self.store = self.store.selected(rows)
        self.segments = [[list(held) for held in self.segments[row]] for row in rows]

    def _shortest(self):
        return min(len(held) for heads in self.segments for held in heads)

    @invariant()
    def holds_what_the_lists_hold(self):
        store = self.store
        store.check_integrity()
        assert store.lengths == tuple(tuple(map(len, heads)) for heads in self.segments)
        assert store.longest == max(len(held) for heads in self.segments for held in heads)
        assert store.even == (store.layout.uniform is not None and len({n for row in store.lengths for n in row}) == 1)
        for row, heads in enumerate(self.segments):
            for head, held in enumerate(heads):
                self._compare({name: store.segment(name, row, head) for name in COLUMNS}, held)

    @invariant()
    def shows_the_same_in_every_form(self):
        store, rows = self.store, list(range(len(self.segments)))
        for chosen in (rows, rows[-1:], rows[:1]):
            padded = {name: store.padded(name, chosen) for name in COLUMNS}
            longest = max(len(held) for row in chosen for held in self.segments[row])
            for place, row in enumerate(chosen):
                for head, held in enumerate(self.segments[row]):
                    assert padded[POSITIONS].shape == (len(chosen), self.heads, longest)
                    self._compare({name: padded[name][place, head, : len(held)] for name in COLUMNS}, held)
                    assert (padded[POSITIONS][place, head, len(held) :] == -1).all()
        if store.layout.uniform is not None:
            assert torch.equal(store.dense(POSITIONS), store.padded(POSITIONS, rows))

    @invariant()
    def holds_numbers_behind_the_lengths_too(self):
        assert all(tensor.isfinite().all() for tensor in self.store.tensors.values())

    @invariant()
    def counts_its_bytes(self):
        assert self.store.nbytes == self.store.layout.slots * (4 + 8 + 128 + 4)

    def _compare(self, columns, held):
        assert columns[POSITIONS].tolist() == [name for name, _ in held]
        assert columns["keys"].tolist() == [[name, -name] for name, _ in held]
        assert columns["values"].tolist() == [[name, -name] * 16 for name, _ in held]
        assert columns["votes"].tolist() == [votes for _, votes in held]


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=examples(30), stateful_step_count=20)
