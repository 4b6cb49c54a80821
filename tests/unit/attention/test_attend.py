"""Attention over what is held, against float64."""

import attrs
import pytest
import torch

from kvpolicy.attention import ragged_heads, sdpa
from kvpolicy.attention.attend import attend, observe_only
from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages import Column, Entries
from kvpolicy_kernels import UnsupportedInputError
from tests.support.driving import DIM, GROUP, HEADS, random_entries, worth_plan
from tests.support.storage import segment, tensors

LENGTHS = {
    "even": ((5, 5), (5, 5)),
    "rows differ": ((7, 7), (3, 3)),
    "ragged": ((7, 2), (1, 5)),
    "one head empty": ((4, 0), (2, 2)),
}
PAST = 20  # positions of what is held lie below it


def stored(lengths, count, dtype=torch.float32, *, votes=False, pads=0):
    """Old entries and `count` new ones, and the queries of these; the first row begins with pads."""
    plan = worth_plan(ragged=True)
    columns = {**plan.columns, LOG_VOTES: Column((), torch.float32)} if votes else plan.columns
    plan = attrs.evolve(plan, columns=columns, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    rows = len(lengths)
    longest = max(map(max, lengths))
    keys, values, queries = random_entries(generator, rows, longest + count)
    keys[..., :2] = 0
    keys, values, queries = keys.to(dtype), values.to(dtype), queries.to(dtype)
    entries = {POSITIONS: torch.zeros(keys.shape[:3], dtype=torch.int32)}
    for row, heads in enumerate(lengths):
        for head, length in enumerate(heads):
            chosen = torch.randperm(PAST, generator=generator)[:length].sort().values
            entries[POSITIONS][row, head, :length] = chosen.int()
    if votes:
        entries[LOG_VOTES] = torch.rand(keys.shape[:3], generator=generator)
    even = len({length for heads in lengths for length in heads}) == 1 or all(len(set(heads)) == 1 for heads in lengths)
    size = longest + count
    held = SegmentedStorage(plan, 0, rows, torch.device("cpu"))
    held._ragged = not even
    kept = (
        torch.arange(longest)
        .expand(rows, HEADS, -1)
        .where(torch.arange(longest) < torch.tensor(lengths)[..., None], -1)
    )
    old = {name: tensor[:, :, :longest] for name, tensor in entries.items()}
    old[ATTENTION] = torch.zeros(rows, HEADS, longest, GROUP)
    held.replace(CompactionPlan(range(rows), kept), Entries(keys[:, :, :longest], values[:, :, :longest]), old, size)
    positions = torch.arange(PAST, PAST + count).repeat(rows, 1)
    positions[0, :pads] = -1
    new = positions[:, None].expand(-1, HEADS, -1).int()
    held.append(keys[:, :, longest:], values[:, :, longest:], new, size)
    if votes:
        held.slots.overwrite_newest(LOG_VOTES, entries[LOG_VOTES][:, :, longest:])
    return plan, held, QueryBatch(queries[:, :, :count], positions, padded=bool(pads), scaling=DIM**-0.5)


def reference(held, batch):
    """Probabilities per row and head, and the attention [B, H, q, D], in float64; pads give zeros."""
    out = torch.zeros(batch.queries.shape, dtype=torch.float64)
    masses = {}
    for row in range(held.slots.layout.rows):
        for head in range(held.slots.layout.heads):
            names = ("keys", "values", *held.slots.columns)
            entries = {name: segment(held, name, row, head) for name in names}
            own = slice(head * GROUP, (head + 1) * GROUP)
            logits = batch.scaling * batch.queries[row, own].double() @ entries["keys"].double().T
            logits = logits + (entries[LOG_VOTES].double() if LOG_VOTES in entries else 0)
            seen = (entries[POSITIONS] >= 0) & (entries[POSITIONS][None] <= batch.positions[row][:, None])
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
            out[row, own] = weights @ entries["values"].double()
            masses[row, head] = weights.sum(1).T  # [T, G]
    return out, masses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize(("count", "pads"), [(1, 0), (6, 0), (6, 2), (1, 1)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_what_float64_gives(lengths, count, pads, votes, dtype):
    _, held, batch = stored(lengths, count, dtype, votes=votes, pads=pads)
    output = attend(held, batch, pads=bool(pads))
    expected, _ = reference(held, batch)
    real = batch.positions >= 0
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for row in range(len(lengths)):
        found, wanted = output[row][:, real[row]].double(), expected[row][:, real[row]]
        assert torch.allclose(found, wanted, atol=tolerance), (found - wanted).abs().max()
    assert output.dtype == dtype
    assert output.isfinite().all()


@pytest.mark.parametrize("most", [0, DIM * 100], ids=["one by one", "copied"])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
def test_heads_of_different_length_are_attended_to_one_by_one_or_as_copies(votes, count, most, monkeypatch):
    """Several forwards in a row: what is known about copies is made anew when storage is. A row or a head is a call."""
    monkeypatch.setattr(ragged_heads, "_COPIED", most)
    calls, once = [], sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda *given, **rest: calls.append(1) or once(*given, **rest)
    )
    _, held, batch = stored(LENGTHS["ragged"], count, votes=votes)
    assert [list(alike.rows) for alike in held.padded_rows(most)] == ([[0, 1]] if most else [])
    for turn in range(3):
        expected, _ = reference(held, batch)
        torch.testing.assert_close(attend(held, batch, pads=False).double(), expected, rtol=0, atol=1e-5)
        assert len(calls) == (turn + 1) * (1 if most else 2 * HEADS)
        keys, values, queries = random_entries(torch.Generator().manual_seed(turn), 2, count)
        positions = (PAST + count * (turn + 1) + torch.arange(count)).repeat(2, 1)
        held.append(keys, values, positions[:, None].expand(-1, HEADS, -1).int(), 4 if turn else 50)
        batch = QueryBatch(queries, positions, padded=False, scaling=DIM**-0.5)


@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize(("most", "count"), [(16 * 90, 2 + 3 * HEADS), (16 * 300, 3)], ids=["three by heads", "copied"])
def test_rows_whose_copies_are_equally_long_are_one_call_and_no_row_changes_another(votes, most, count, monkeypatch):
    """The longest heads have 8, 65, 66 and 96 entries, the newest among them: copies have 64, or 128.

    The heads of the last row do not differ: alone it is read without a copy. Every entry begins at a multiple of
    64 bytes: where vectors have as many, last bits of a product of matrices depend on that.
    """
    monkeypatch.setattr(ragged_heads, "_COPIED", most)
    for module in ("tests.unit.attention.test_attend", "tests.support.driving"):
        monkeypatch.setattr(f"{module}.DIM", 16)
    monkeypatch.setattr("tests.unit.attention.test_attend.PAST", 120)
    calls, once = [], sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda *given, **rest: calls.append(1) or once(*given, **rest)
    )
    _, held, batch = stored(((7, 2), (64, 5), (20, 65), (3, 95), (9, 9)), 1, votes=votes)
    together = attend(held, batch, pads=False)

    assert len(calls) == count
    torch.testing.assert_close(together.double(), reference(held, batch)[0], rtol=0, atol=1e-5)
    for row in range(5):
        alone = attrs.evolve(batch, queries=batch.queries[row : row + 1], positions=batch.positions[row : row + 1])
        assert attend(held.selected([row]), alone, pads=False).equal(together[row : row + 1])


@pytest.mark.parametrize("faulty", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_what_is_not_finite_in_one_head_stays_there(faulty):
    """Copies of shorter heads end in slots of their own, not in those of the next head."""
    _, held, batch = stored(LENGTHS["ragged"], 1)
    expected, _ = reference(held, batch)
    held.keys.residual.segment("keys", *faulty)[:] = torch.nan
    held.values.residual.segment("values", *faulty)[:] = torch.nan
    output = attend(held, batch, pads=False).double().unflatten(1, (HEADS, GROUP))
    assert output[faulty].isnan().all()
    for row in range(2):
        for head in range(HEADS):
            if (row, head) != faulty:
                wanted = expected[row, head * GROUP : (head + 1) * GROUP]
                torch.testing.assert_close(output[row, head], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize(("count", "pads"), [(1, 0), (6, 2), (300, 0)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_real_query_gives_a_mass_of_one_and_to_the_right_entries(lengths, count, pads, votes):
    plan, held, batch = stored(lengths, count, votes=votes, pads=pads)
    before = {name: tensor.clone() for name, tensor in tensors(held).items() if name[1] != ATTENTION}
    observe_only(held, batch, plan.observers)
    output = attend(held, batch, observers=plan.observers, pads=bool(pads))  # the same in one pass
    expected, masses = reference(held, batch)
    assert torch.allclose(output.double(), expected, atol=1e-5)
    for (row, head), expected in masses.items():
        found = segment(held, ATTENTION, row, head)
        assert torch.allclose(found.double(), 2 * expected, atol=1e-4)
        real = int((batch.positions[row] >= 0).sum())
        assert torch.allclose(found.sum(0), torch.full((GROUP,), 2.0 * real), atol=1e-3)
    assert all(torch.equal(tensors(held)[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_dropout_reaches_the_attention(lengths):
    _, held, batch = stored(lengths, 6)
    torch.manual_seed(0)
    assert not torch.equal(attend(held, batch, pads=False, dropout=0.5), attend(held, batch, pads=False))


def test_a_part_of_the_queries_and_of_the_rows_can_be_taken():
    _, _, batch = stored(LENGTHS["even"], 6)
    assert torch.equal(batch.first(2).queries, batch.queries[:, :, :2])
    assert torch.equal(batch.first(2).positions, batch.positions[:, :2])
    swapped = batch.select_rows([1, 0, 0])
    assert torch.equal(swapped.queries, batch.queries[[1, 0, 0]])
    assert torch.equal(swapped.positions, batch.positions[[1, 0, 0]])


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_kernel_has_left_behind_the_entries_does_not_spread(count, observed, monkeypatch):
    """A compaction in a kernel leaves what it evicts in slots that are empty then; it may be NaN."""

    def refuse(*_given, **_named):
        raise UnsupportedInputError("not here")

    monkeypatch.setattr("kvpolicy.attention.attend.attend_in_kernel", refuse)
    plan, held, batch = stored(LENGTHS["rows differ"], count)
    observers = plan.observers if observed else ()
    expected = attend(held, batch, None, observers, pads=False)
    for half in (held.keys, held.values):
        half.residual.dense(half.name)[1, :, 3 + count :] = torch.nan
    assert torch.equal(attend(held, batch, None, observers, pads=False, kernels=True), expected)
