"""On fixed shapes a compression keeps what it keeps on any shape; rows that are not due keep everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy.attention.attend
from kvpolicy.integrations.transformers.decode_graph import attend, evict
from kvpolicy.stages import View
from kvpolicy_kernels import UnsupportedInputError
from tests.support.compressing import compress_one
from tests.support.decisions import Decisions
from tests.support.driving import DIM, GROUP, HEADS, plan_of
from tests.support.examples import examples
from tests.support.policies import EVEN, small
from tests.unit.integrations.decode_graph.filling import CAPACITY, blocks, filled, lengths_of, view_of


def copy_of(view, row, length):
    """One row of a view without its empty slots, as other layers show it."""
    cut = {name: getattr(view, name)[row : row + 1, :, :length].clone() for name in ("keys", "values", "positions")}
    if view.attention is not None:
        cut["attention"] = view.attention[row : row + 1, :, :, :length].clone()
    if view.queries is not None:
        cut["queries"], cut["query_positions"] = view.queries[row : row + 1], view.query_positions[row : row + 1]
    state = {name: values[row : row + 1, :, :length].clone() for name, values in view.slot_state.items()}
    same = ("geometry", "scaling", "layer", "sinks", "recent", "rotary", "output_projection")
    return View(**cut, **{name: getattr(view, name) for name in same}, slot_state=state)


@pytest.mark.parametrize("name", EVEN)
@settings(max_examples=examples(25))
@given(
    lengths=st.lists(st.integers(9, CAPACITY), min_size=1, max_size=3),
    due=st.lists(st.booleans(), min_size=3, max_size=3),
    budget=st.integers(7, 9),
    seed=st.integers(0, 2**20),
)
def test_rows_that_are_due_keep_what_they_keep_alone(name, lengths, due, budget, seed):
    plan = plan_of(small(name, budget))
    layer = filled(plan, lengths, seed)
    held, view = blocks(layer), view_of(layer)
    before = [copy_of(view, row, length) for row, length in enumerate(lengths)]
    decisions = Decisions()
    with decisions.watched():
        expected = [compress_one(plan.spec, one, [budget]) for one in before]
    due, nan = torch.tensor(due[: len(lengths)]), torch.zeros(2, dtype=torch.int64)
    with decisions.followed():
        evict.evict([layer], due[None], torch.full((1, len(lengths)), budget), torch.tensor(lengths), nan)
    for row, (one, result) in enumerate(zip(before, expected, strict=True)):
        kept = result.kept[0] if due[row] else torch.arange(lengths[row]).expand(HEADS, -1)
        count = kept.shape[1]
        assert lengths_of(layer)[row] == [count] * HEADS
        for head in range(HEADS):
            for found, source in ((held["keys"], one.keys), (held["values"], one.values)):
                assert torch.equal(found[row, head, :count], source[0, head, kept[head]])
            positions = held["positions"][row, head]
            assert torch.equal(positions[:count], one.positions[0, head, kept[head]].int())
            assert (positions[count:] == -1).all()
            for state, values in one.slot_state.items():
                fresh = result.observed.get(state, values) if due[row] else values
                found = held[state][row, head, :count]
                assert torch.allclose(found, fresh[0, head, kept[head]], rtol=1e-5 if due[row] else 0, atol=0)
            if one.attention is not None:
                moved = one.attention[0, head][:, kept[head]].transpose(0, 1)
                assert torch.equal(held["attention"][row, head, :count], moved)
    candidates = sum(int(one.candidates.sum()) for one, here in zip(before, due.tolist(), strict=True) if here)
    assert nan.tolist() == [0, candidates]


def refuse(*_given, **_named):
    raise UnsupportedInputError("not these slots")


@pytest.mark.parametrize("slot", [0, 4, 9])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_an_evicted_entry_does_not_spread(kernels, refused, wrong, slot, monkeypatch):
    if refused:
        monkeypatch.setattr(kvpolicy.attention.attend, "attend_in_kernel", refuse)
    plan = plan_of(small("streaming_llm", 5, protect={"sinks": 0, "recent": 4}), kernels=kernels)
    layer = filled(plan, [CAPACITY, CAPACITY])
    blocks(layer)["values"][0, :, slot] = wrong
    due, nan = torch.tensor([[True, True]]), torch.zeros(2, dtype=torch.int64)
    evict.evict([layer], due, torch.tensor([[5, 5]]), torch.tensor([CAPACITY, CAPACITY]), nan)
    out = attend.attend_static(layer, torch.randn(2, HEADS * GROUP, 1, DIM), 1.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("kernels", [False, True])
def test_scores_that_are_nan_are_counted_in_rows_that_are_due(kernels):
    plan = plan_of(small("snapkv", 7), kernels=kernels)
    layer = filled(plan, [CAPACITY, CAPACITY, 12])
    blocks(layer)["keys"][:, 1, 5] = torch.nan
    nan = torch.zeros(2, dtype=torch.int64)
    due = torch.tensor([[True, False, True]])
    evict.evict([layer], due, torch.tensor([[7, 7, 7]]), torch.tensor([CAPACITY, CAPACITY, 12]), nan)
    candidates = CAPACITY + 12 - 2 * (2 + 4)
    assert nan.tolist() == [candidates, candidates * HEADS]  # a softmax spreads it over one of the heads
    assert lengths_of(layer) == [[7] * HEADS, [CAPACITY] * HEADS, [7] * HEADS]


@pytest.mark.parametrize("name", ["gkv", "h2o"])
def test_the_operators_say_what_they_change(name):
    plan = plan_of(small(name, 7))
    layer = filled(plan, [CAPACITY, 12])
    due, budget = torch.tensor([[True, False]]), torch.tensor([[7, 7]])
    tests = ("test_schema", "test_faketensor")
    tensors = [*layer.in_step, torch.zeros(2, dtype=torch.int64)]
    given = ([layer.name], tensors, layer.window.in_step, due, budget, torch.tensor([CAPACITY, 12]))
    torch.library.opcheck(evict._evict_op, given, test_utils=tests)
    queries = torch.randn(2, HEADS * GROUP, 1, DIM)
    keys, values, *columns, lengths = layer.in_step
    arguments = (layer.name, queries, layer.clock, [keys, values, lengths], columns, 0.4)
    torch.library.opcheck(attend._attend_op, arguments, test_utils=tests)
