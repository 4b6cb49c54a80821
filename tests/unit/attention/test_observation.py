"""What a layer observes and remembers of its rows, against plain loops."""

import pytest
import torch

from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import POSITIONS
from tests.property.test_packed_layers import DIM, entries
from tests.property.test_packed_layers import plan_of as packed_plan
from tests.support.driving import DIM as WIDTH
from tests.support.driving import GROUP, HEADS, NAME, feed, new_layer, random_entries, worth_plan

FORWARDS = {
    "a prompt": (5,),
    "a prompt in chunks": (4, 3, 2),
    "a token": (5, 1),
    "a prompt with an eviction": (9, 1),
    "a chunk after an eviction": (9, 4, 1),
    "steps after an eviction": (9, 1, 1),
}


class Mass:
    """Attention that each token has received, per row and query head, computed for one query at a time."""

    def __init__(self, rows):
        self.tokens = [[] for _ in range(rows)]  # (name, position, key [K, D]) of all that came
        self.received = [{} for _ in range(rows)]  # by name and query head

    def forward(self, keys, queries, valid, held):
        """`held` names what each row and head held before, None = all that came so far."""
        for row, tokens in enumerate(self.tokens):
            before = {name for name, _, _ in tokens}
            for column in range(keys.shape[2]):
                if valid[row, column]:
                    tokens.append((int(keys[row, 0, column, NAME]), len(tokens), keys[row, :, column].double()))
                    self._query(row, queries[row, :, column].double(), before, held)

    def _query(self, row, query, before, held):
        for head in range(HEADS * GROUP):
            own = head // GROUP
            seen = [one for one in self.tokens[row] if one[0] not in before or held is None or one[0] in held[row][own]]
            logits = torch.stack([one[2][own] @ query[head] for one in seen]) * WIDTH**-0.5
            for (name, _, _), share in zip(seen, logits.softmax(0).tolist(), strict=True):
                self.received[row][name, head] = self.received[row].get((name, head), 0.0) + share


def names_held(layer):
    keys, _ = (layer.storage.keys.residual.padded("keys", range(len(layer.num_tokens))), None)
    lengths = layer.storage.slots.lengths
    return [
        [{int(name) for name in keys[row, head, : lengths[row][head], NAME]} for head in range(HEADS)]
        for row in range(len(layer.num_tokens))
    ]


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("counts", FORWARDS.values(), ids=FORWARDS)
def test_every_query_of_every_forward_adds_to_the_attention_mass(counts, padded, ragged):
    layer, mass, generator = new_layer(worth_plan(budget=6, every=2, ragged=ragged)), Mass(2), torch.Generator()
    first = 0
    for count in counts:
        keys, values, queries = random_entries(generator.manual_seed(first), 2, count, first)
        first += 2 * count
        valid = torch.ones(2, count, dtype=torch.bool)
        if padded and count > 2:
            valid[0, 0] = valid[1, 1] = False
        held = names_held(layer) if layer.compressed else None
        feed(layer, keys, values, queries, valid if padded else None)
        mass.forward(keys, queries, valid, held)
    columns = layer.storage.slots
    for row, head in ((row, head) for row in range(2) for head in range(HEADS)):
        names = layer.storage.keys.residual.segment("keys", row, head)[:, NAME].tolist()
        positions = columns.segment(POSITIONS, row, head).tolist()
        for place, (name, position) in enumerate(zip(names, positions, strict=True)):
            found = columns.segment(ATTENTION, row, head)[place].tolist() if position >= 0 else [0.0] * GROUP
            expected = [mass.received[row].get((int(name), head * GROUP + i), 0.0) for i in range(GROUP)]
            assert found == pytest.approx(expected, abs=1e-5)


def merging_plan(budget=12, every=4):
    return packed_plan("plain", budget, every, merge={"use": "d2o"})


def fed(layer, *batches):
    for keys, values, queries, valid in batches:
        feed(layer, keys, values, queries, valid)
    return layer


def batch(rows, count, seed, pads=None):
    """Entries of two rows; `pads` are the pads on the left of each."""
    keys, values, queries = entries(torch.Generator().manual_seed(seed), rows, count, DIM)
    valid = None if pads is None else torch.arange(count) >= torch.tensor(pads)[:, None]
    return keys, values, queries, valid


def of_rows(batches, rows, first=0):
    """The same of some rows, without their pads."""
    return [
        (*(one[rows][:, :, first:] for one in given[:3]), None if given[3] is None else given[3][rows][:, first:])
        for given in batches
    ]


def state_of(layer):
    (values,) = layer.row_state.values()
    return values


def test_what_is_remembered_of_a_row_moves_with_it():
    prompt, more = [batch(2, 20, 0)], [batch(2, 5, 1), *(batch(2, 1, seed) for seed in range(2, 9))]
    layer, swapped = (fed(new_layer(merging_plan()), *of_rows(prompt, rows)) for rows in ([0, 1], [1, 0]))
    assert state_of(layer)[0] != state_of(layer)[1]
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(state_of(layer), state_of(swapped))
    for one in (layer, swapped):
        fed(one, *more)
    assert torch.equal(state_of(layer), state_of(swapped))
    assert torch.allclose(
        layer.storage.keys.residual.padded("keys", [0, 1]), swapped.storage.keys.residual.padded("keys", [0, 1])
    )
    layer.batch_repeat_interleave(2)
    assert torch.equal(state_of(layer), state_of(swapped)[[0, 0, 1, 1]])
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(state_of(layer), state_of(swapped)[[1]])


@pytest.mark.parametrize("due", [0, 1])
def test_a_compression_of_some_rows_changes_what_is_remembered_of_those(due):
    """One row is over its budget, the other is not."""
    pads = [15, 15]
    pads[due] = 0
    given = [batch(2, 20, 3, pads)]
    layer = fed(new_layer(merging_plan()), *given)
    alone = fed(new_layer(merging_plan()), *of_rows(given, [due]))
    assert torch.isfinite(state_of(alone)).all()
    assert state_of(layer)[due] == pytest.approx(state_of(alone)[0].item(), rel=1e-5)
    assert state_of(layer)[1 - due] == -torch.inf
    later = [batch(2, 1, seed) for seed in range(4, 30)]  # both become due, at times of their own
    fed(layer, *later)
    for row in (0, 1):
        alone = fed(new_layer(merging_plan()), *of_rows(given, [row], pads[row]), *of_rows(later, [row]))
        assert state_of(layer)[row].item() == pytest.approx(state_of(alone)[0].item(), rel=1e-5)
