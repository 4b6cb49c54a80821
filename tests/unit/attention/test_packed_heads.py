"""Attention over packed heads of different length, against float64 over the unpacked entries."""

import pytest
import torch

from kvpolicy.attention import ragged_heads
from kvpolicy.attention.attend import attend
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages import AsIs
from tests.property.test_packed_layers import DIM, GROUP, HEADS, SCALING, STORES, entries, plan_of
from tests.support.driving import feed, new_layer
from tests.support.storage import segment

ROWS = 3
PACKED = [store for store in STORES if store not in ("plain", "tada", "latent")]


def held_by(store, count, merge="drop"):
    """A layer whose heads have been compressed to different lengths, `count` tokens later; queries of these."""
    layer, generator = new_layer(plan_of(store, 20, every=64, ragged=True, merge=merge)), torch.Generator()
    feed(layer, *entries(generator.manual_seed(3), ROWS, 60))
    new = entries(generator, ROWS, count)
    for token in zip(*(one.split(1, 2) for one in new), strict=True):  # a chunk would be compressed as a prompt is
        feed(layer, *token)
    positions = torch.arange(60, 60 + count).expand(ROWS, -1)
    return layer.storage, QueryBatch(new[2], positions, padded=False, scaling=SCALING)


def expected(storage, batch):
    """[B, H, q, D] in float64, over what each head holds once it is unpacked."""
    out = torch.empty(batch.queries.shape, dtype=torch.float64)
    for row in range(ROWS):
        for head in range(HEADS):
            own = slice(head * GROUP, (head + 1) * GROUP)
            keys, values = (segment(storage, name, row, head).double() for name in ("keys", "values"))
            logits = batch.queries[row, own].double() @ keys.mT * SCALING
            if LOG_VOTES in storage.columns:
                logits = logits + segment(storage, LOG_VOTES, row, head).double()
            later = segment(storage, POSITIONS, row, head) > batch.positions[row][:, None]
            out[row, own] = logits.masked_fill(later, -torch.inf).softmax(-1) @ values
    return out


@pytest.mark.parametrize("most", [1, 25 * DIM, 2**20], ids=["in blocks", "a head or two", "all"])
@pytest.mark.parametrize(("count", "merge"), [(1, "drop"), (1, "window_fit"), (5, "window_fit")])
@pytest.mark.parametrize("store", PACKED)
def test_what_is_read_is_what_each_head_holds_however_much_is_unpacked_at_once(store, count, merge, most, monkeypatch):
    monkeypatch.setattr(ragged_heads, "_UNPACKED", most)
    storage, batch = held_by(store, count, merge)
    assert len({length for row in storage.lengths for length in row}) > 1
    torch.testing.assert_close(attend(storage, batch, pads=False).double(), expected(storage, batch), rtol=0, atol=1e-5)


def test_many_queries_are_masked_in_blocks(monkeypatch):
    """A mask of a long turn over long heads would take more than what is held."""
    storage, batch = held_by("rotation", 5)
    assert ragged_heads.are_short(storage, batch)
    monkeypatch.setattr(ragged_heads, "_MASKED", 5 * storage.longest - 1)
    assert not ragged_heads.are_short(storage, batch)
    torch.testing.assert_close(attend(storage, batch, pads=False).double(), expected(storage, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("store", PACKED)
def test_all_heads_of_all_rows_are_unpacked_at_once(store, monkeypatch):
    """One call for the keys and one for the values; a format with a basis for each head is called for each."""
    storage, batch = held_by(store, 1)
    calls = []
    for form in {type(states.form) for states in (storage.keys, storage.values)}:
        once = form.decode_in_basis
        monkeypatch.setattr(form, "decode_in_basis", lambda *given, once=once: calls.append(given) or once(*given))
    attend(storage, batch, pads=False)
    one_by_one = sum(states.form.of_entries([0], [1]) is None for states in (storage.keys, storage.values))
    assert one_by_one == (store == "nova_vq")
    assert len(calls) <= 2 - one_by_one + one_by_one * ROWS * HEADS


def test_a_format_whose_heads_differ_is_read_head_by_head_unless_it_says_how():
    class Own(AsIs):
        def of_head(self, head):
            return Own({})

    assert Own({}).of_entries([0, 1], [2, 2]) is None
