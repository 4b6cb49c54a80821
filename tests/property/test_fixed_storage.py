"""A storage for steps of fixed shapes against plain lists: host and device agree, whatever steps and others change."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.storage.fixed_storage import FixedStorage, close_up
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from tests.support.driving import DIM, HEADS, plan_of
from tests.support.examples import examples
from tests.support.policies import small

CAPACITY, LIMIT, CPU = 8, 12, torch.device("cpu")
PLAN = plan_of(small("h2o"))


class FixedStorageMachine(RuleBasedStateMachine):
    """One cache: its entries are in a storage that grows, or in that of a session, which nothing replaces."""

    @initialize(rows=st.integers(1, 3))
    def start(self, rows):
        self.fixed = FixedStorage(PLAN, 0, rows, CPU, CAPACITY)
        self.storage = SegmentedStorage(PLAN, 0, rows, CPU)
        self.tokens, self.name = [0] * rows, 0
        self.held = [[[] for _ in range(HEADS)] for _ in range(rows)]  # [row][head] of (position, key)
        self.addresses = [tensor.data_ptr() for tensor in self._in_step()]

    def _in_step(self):
        return [*self.fixed.tensors.values(), self.fixed.lengths_in_step, self.fixed.starts]

    @property
    def is_in(self):
        return self.storage is self.fixed

    @property
    def longest(self):
        return max(len(head) for row in self.held for head in row)

    def _token(self):
        """Keys [B, K, 1, D] that name an entry, and positions [B]."""
        names = self.name + torch.arange(len(self.held) * HEADS).reshape(-1, HEADS, 1, 1)
        self.name += names.numel()
        for row, heads in enumerate(self.held):
            for head, entries in enumerate(heads):
                entries.append((self.tokens[row], names[row, head].item()))
        positions = torch.tensor(self.tokens, dtype=torch.int32)
        self.tokens = [count + 1 for count in self.tokens]
        return names.expand(-1, -1, 1, DIM).float(), positions

    def _kept(self, data):
        """Slots [B, K, C] that stay, of some rows all: as many of each head, but others."""
        kept = torch.full((len(self.held), HEADS, CAPACITY), -1)
        for row, heads in enumerate(self.held):
            count = data.draw(st.integers(0, len(heads[0])), "left")
            for head, entries in enumerate(heads):
                order = data.draw(st.permutations(range(len(entries))), "order")
                slots = sorted(order[:count])
                kept[row, head, :count] = torch.tensor(slots, dtype=torch.int64)
                heads[head] = [entries[slot] for slot in slots]
        return kept

    @precondition(lambda self: not self.is_in and self.longest <= CAPACITY)
    @rule()
    def enter(self):
        self.fixed.fill(self.storage)
        self.storage = self.fixed

    @precondition(lambda self: self.is_in)
    @rule(data=st.data(), left=st.sampled_from([torch.nan, 3.0]))
    def leave(self, data, left):
        rows = data.draw(st.lists(st.integers(0, len(self.held) - 1), min_size=len(self.held), max_size=len(self.held)))
        self.fixed.require_agreement()
        self.storage = self.fixed.selected(rows)
        assert type(self.storage) is SegmentedStorage
        self.held = [[list(head) for head in self.held[row]] for row in rows]
        self.tokens = [self.tokens[row] for row in rows]
        for tensor in self.fixed.tensors.values():  # another cache was in, and has left anything
            tensor.fill_(left if tensor.is_floating_point() else 3)

    @precondition(lambda self: self.is_in and self.longest < CAPACITY)
    @rule()
    def step(self):
        keys, positions = self._token()
        self.fixed.append_in_step(keys, -keys, positions)
        self.fixed.note_appended()

    @precondition(lambda self: self.is_in)
    @rule(data=st.data())
    def compress_in_step(self, data):
        close_up(self.fixed.in_step, self._kept(data))
        self.fixed.note_left([len(heads[0]) for heads in self.held])

    @precondition(lambda self: not self.is_in)
    @rule()
    def append(self):
        keys, positions = self._token()
        self.storage.append(keys, -keys, positions[:, None, None].expand(-1, HEADS, -1), LIMIT)

    @precondition(lambda self: not self.is_in)
    @rule(data=st.data())
    def compress(self, data):
        if self.longest <= CAPACITY:
            kept = self._kept(data)[..., : self.longest] if self.longest else self._kept(data)[..., :0]
            self.storage.evict(CompactionPlan(range(len(self.held)), kept), LIMIT)

    @invariant()
    def both_copies_of_the_lengths_agree(self):
        if self.is_in:
            self.fixed.check_integrity()
            device = self.fixed.in_step.slots.lengths_on_device.view(-1, HEADS).tolist()
            assert device == [[len(head) for head in row] for row in self.held]

    @invariant()
    def the_lists_are_held(self):
        assert self.storage.lengths == tuple(tuple(map(len, row)) for row in self.held)
        for row, heads in enumerate(self.held):
            for head, entries in enumerate(heads):
                assert self.storage.positions(row, head).tolist() == [position for position, _ in entries]
                names = [float(name) for _, name in entries]
                assert self.storage.keys.residual.segment("keys", row, head)[:, 0].tolist() == names
                assert self.storage.values.residual.segment("values", row, head)[:, -1].tolist() == [-n for n in names]

    @invariant()
    def a_step_sees_positions_where_entries_are_and_numbers_everywhere(self):
        if self.is_in:
            seen = self.fixed.in_step
            at = seen.everything
            positions = seen.column("positions", at)
            assert positions.shape == (len(self.held), HEADS, CAPACITY)
            expected = [[len(head) for head in row] for row in self.held]
            assert (positions >= 0).sum(-1).tolist() == expected
            assert seen.values.read(at, 0, CAPACITY, positions).isfinite().all()

    @invariant()
    def nothing_is_replaced(self):
        assert [tensor.data_ptr() for tensor in self._in_step()] == self.addresses


TestFixedStorage = FixedStorageMachine.TestCase
TestFixedStorage.settings = settings(max_examples=examples(25), stateful_step_count=25)
