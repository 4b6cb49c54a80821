"""A cache layer against plain Python lists, whatever is asked of it and in whichever order."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from tests.support import driving
from tests.support.driving import GROUP, HEADS, NAME, WORTH, feed, new_layer, random_entries, worth_plan
from tests.support.examples import examples
from tests.support.storage import STATES, segments_of

ROWS = 4


class Row:
    """What one row must hold: per head a list of (position, name, worth, key, value), oldest first."""

    def __init__(self):
        self.real = 0
        self.heads = [[] for _ in range(HEADS)]
        self.recent = []  # newest columns that may still be undone: whether each is a real token

    def copy(self):
        other = Row()
        other.real, other.heads, other.recent = self.real, [list(head) for head in self.heads], list(self.recent)
        return other

    def append(self, keys, values, valid):
        """One token: its keys and values [K, D]."""
        self.recent.append(valid)
        if valid:
            for head, held in enumerate(self.heads):
                key = keys[head]
                held.append((self.real, int(key[NAME]), float(key[WORTH]), key, values[head]))
            self.real += 1

    def undo(self, count):
        for valid in self.recent[len(self.recent) - count :] if count else []:
            if valid:
                self.real -= 1
                for held in self.heads:
                    held.pop()
        del self.recent[len(self.recent) - count :]

    def compress(self, budget, sinks, recent, *, ragged):
        """Keep the protected and the best, ties by position."""
        chosen = [[] for _ in self.heads]
        for head, held in enumerate(self.heads):
            protected = [one for age, one in enumerate(reversed(held)) if age < recent or one[0] < sinks]
            chosen[head] = protected
        free = budget * HEADS - sum(map(len, chosen))
        for head, held in enumerate(self.heads):
            names = {one[1] for one in chosen[head]}
            ranked = sorted((one for one in held if one[1] not in names), key=lambda one: (-one[2], one[0]))
            share = min(len(ranked), free if ragged else (budget - len(names)))
            free -= share
            chosen[head] = sorted([*chosen[head], *ranked[:share]], key=lambda one: one[0])
        self.heads = chosen

    def attention(self, queries, positions):
        """Float64 attention [H, q, D]; zeros for pads."""
        out = torch.zeros(queries.shape, dtype=torch.float64)
        for head in range(queries.shape[0]):
            held = self.heads[head // GROUP]
            for place, position in enumerate(positions):
                seen = [one for one in held if one[0] <= position]
                if position >= 0 and seen:
                    keys, values = (torch.stack([one[part] for one in seen]).double() for part in (3, 4))
                    weights = (keys @ queries[head, place].double() * driving.DIM**-0.5).softmax(0)
                    out[head, place] = weights @ values
        return out


class LayerMachine(RuleBasedStateMachine):
    """Appends, evictions, rollbacks and moves of rows."""

    ragged = False
    spare = 0  # slots of a segment that storage may hold beyond what it is allowed
    new_layer = staticmethod(new_layer)

    @initialize(
        rows=st.integers(1, 3),
        budget=st.integers(4, 8),
        every=st.integers(1, 4),
        sinks=st.integers(0, 2),
        recent=st.integers(0, 1),
        prefill=st.booleans(),
        fills=st.booleans(),
    )
    def start(self, rows, budget, every, sinks, recent, prefill, fills):
        self.plan = worth_plan(budget, every, sinks, recent, ragged=self.ragged, prefill=prefill, any_order=fills)
        assert self.plan.fills_holes == (fills and not self.ragged)
        self.budget, self.every, self.sinks, self.recent, self.prefill = budget, every, sinks, recent, prefill
        self.layer = self.new_layer(self.plan)
        self.generator = torch.Generator().manual_seed(rows)
        self.names = 0
        self.batch = rows
        self._empty()

    def _empty(self):
        self.rows = [Row() for _ in range(self.batch)]
        self.seen, self.evicted = 0, False
        self.prompting, self.prompt = True, 0  # whether a recorded prompt comes next; its tokens, until it is digested
        self.history, self.waiting = [], False  # rows before each recorded token; whether the last is not digested

    @rule(count=st.sampled_from([2, 3, 7, 12]), padded=st.booleans(), data=st.data())
    def prompt(self, count, padded, data):
        valid = None
        if padded:
            flags = st.lists(st.booleans(), min_size=count, max_size=count).filter(any)
            valid = torch.tensor([data.draw(flags, "real") for _ in self.rows])
        self._forward(count, valid)

    @rule(steps=st.integers(1, 12))
    def decode(self, steps):
        for _ in range(steps):
            self._forward(1, None)

    def _forward(self, count, given):
        keys, values, queries = random_entries(self.generator, len(self.rows), count, self.names)
        self.names += keys.shape[0] * count
        output = feed(self.layer, keys, values, queries, given)
        valid = torch.ones(len(self.rows), count, dtype=torch.bool) if given is None else given
        if self.layer.record_past and not self.prompting:
            self._digest_prompt()
            for column in range(count):
                self._digest_token()
                self.history.append(([row.copy() for row in self.rows], self.evicted))
                self._take(
                    *(one[:, :, column : column + 1] for one in (keys, values, queries, output)), valid[:, [column]]
                )
                self.waiting = True
            return
        self._take(keys, values, queries, output, valid)
        if self.layer.record_past:
            self.prompt, self.prompting = count, False
        else:
            self._compress(decoding=count == 1)

    def _digest_prompt(self):
        if self.prompt:
            self._compress(decoding=self.prompt == 1)
        self.prompt = 0

    def _digest_token(self):
        if self.waiting:
            self._compress(decoding=True)
        self.waiting = False

    def _take(self, keys, values, queries, output, valid):
        count = keys.shape[2]
        for place, row in enumerate(self.rows):
            positions = []
            for column in range(count):
                real = bool(valid[place, column])
                positions.append(row.real if real else -1)
                row.append(keys[place, :, column], values[place, :, column], real)
            expected = row.attention(queries[place], positions)
            assert torch.allclose(output[place].double(), expected, atol=1e-5), (output[place] - expected).abs().max()
        self.seen += count

    def _compress(self, *, decoding):
        due = [row for row in self.rows if self._is_due(row, decoding=decoding)]
        for row in due:
            row.compress(min(self.budget, row.real), self.sinks, self.recent, ragged=self.ragged)
        self.evicted |= bool(due)
        gaps = any(not valid for row in self.rows for valid in row.recent)
        if due or (self.evicted and gaps):
            for row in self.rows:
                row.recent.clear()

    def _is_due(self, row, *, decoding):
        budget = min(self.budget, row.real)
        allowed = budget + self.every - 1 if decoding else budget if self.prefill else 10**9
        return sum(map(len, row.heads)) > allowed * HEADS

    @rule(data=st.data(), absolute=st.booleans())
    def crop(self, data, absolute):
        before = self.history[0][0] if self.history else self.rows
        possible = len(self.history) + len(before[0].recent)
        count = data.draw(st.integers(0, min(self.seen, possible + 2)), "undone")
        absolute = absolute and 0 < count < self.seen
        given = self.seen - count if absolute else -count
        if count > possible:
            with pytest.raises(CacheError, match="undo"):
                self.layer.crop(given)
            return
        self.layer.crop(given)
        self.seen -= count
        if self.history and count:
            undone = min(count, len(self.history))
            self.rows, self.evicted = self.history[-undone]
            count -= undone
        else:
            self._digest_token()
        for row in self.rows:
            row.undo(count)
        self.prompting = self.prompting or 0 < self.prompt <= count
        self.prompt = max(0, self.prompt - count)
        self._digest_prompt()
        self.history, self.waiting = [], False

    @rule()
    def record(self):
        self.layer.activate_past_recording()
        self.prompting = self.prompting or not (self.prompt or self.history)

    @precondition(lambda self: self.seen and len(self.rows) < ROWS)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        self.layer.batch_repeat_interleave(repeats)
        self._move([place for place in range(len(self.rows)) for _ in range(repeats)])

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def reorder(self, data):
        order = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=ROWS), "rows")
        if len(order) == len(self.rows):
            self.layer.reorder_cache(torch.tensor(order))
        else:
            self.layer.batch_select_indices(torch.tensor(order))
        self._move(order)

    def _move(self, order):
        self.rows = [self.rows[row].copy() for row in order]
        self.history = [([rows[row].copy() for row in order], evicted) for rows, evicted in self.history]

    @rule(again=st.booleans())
    def reset(self, again):
        if again:
            self.layer.reset()
            self.batch = len(self.rows)
            self._empty()

    @invariant()
    def holds_what_the_lists_hold(self):
        layer = self.layer
        assert layer.get_seq_length() == self.seen
        assert layer.get_mask_sizes(3) == (self.seen + 3, 0)
        if not self.seen:
            return
        layer.storage.check_integrity()
        assert layer.num_tokens == [row.real for row in self.rows]
        assert layer.compressed == self.evicted
        for place, row in enumerate(self.rows):
            read = {name: segments_of(layer.storage, name, place) for name in (*STATES, *self.plan.columns)}
            for head, held in enumerate(row.heads):
                columns = {name: own[head] for name, own in read.items()}
                real = (columns[POSITIONS] >= 0).nonzero()[:, 0]
                if not layer.in_order:
                    real = real[columns[POSITIONS][real].argsort()]
                assert columns[POSITIONS][real].tolist() == [one[0] for one in held]
                for name, part in (("keys", 3), ("values", 4)):
                    assert torch.equal(columns[name][real], _stacked([one[part] for one in held]))

    @invariant()
    def stays_within_its_capacity(self):
        if self.seen and self.evicted and self.prefill and not self.layer.record_past:
            most = len(self.rows) * HEADS * (self.budget + self.every + self.spare)
            assert sum(map(sum, self.layer.storage.capacities)) <= most or self.layer.padded


def _stacked(parts):
    return torch.stack(parts) if parts else torch.empty(0, driving.DIM)


class RaggedLayerMachine(LayerMachine):
    """The same, where heads keep different numbers of entries."""

    ragged = True


_settings = settings(max_examples=examples(40), stateful_step_count=20)
TestLayer, TestRaggedLayer = LayerMachine.TestCase, RaggedLayerMachine.TestCase
TestLayer.settings = TestRaggedLayer.settings = _settings
