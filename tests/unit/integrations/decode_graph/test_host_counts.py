"""The host's counts are those of layers that run step by step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.decode_graph.host_counts import HostCounts
from kvpolicy.integrations.transformers.decode_graph.limits import capacities, fit
from tests.support.driving import drive, plan_of
from tests.support.examples import examples
from tests.support.policies import small


def lengths_of(layers):
    return [[heads[0] for heads in layer.storage.slots.lengths] for layer in layers]


@pytest.mark.parametrize("name", ["streaming_llm", "pyramidkv", "snapkv"])
@settings(max_examples=examples(15))
@given(prompt=st.integers(1, 30), budget=st.integers(7, 12), every=st.integers(1, 5), rows=st.integers(1, 2))
def test_lengths_follow_what_layers_do(name, prompt, budget, every, rows):
    plan = plan_of(small(name, budget, every), layers=3)
    layers = [PolicyLayer(plan, ordinal) for ordinal in range(3)]
    for layer in layers:
        drive(layer, prompt, 1, rows=rows)
    counts = HostCounts(plan, layers[0].num_tokens, lengths_of(layers))
    room = capacities(plan, min(layers[0].num_tokens))
    for _ in range(3 * every + 8):
        before = [layer.stats.compressions for layer in layers]
        assert all(max(lengths) < size for lengths, size in zip(counts.lengths, room, strict=True))
        due = counts.append()
        for layer in layers:
            drive(layer, 1, rows=rows)
        fired = [layer.stats.compressions > old for layer, old in zip(layers, before, strict=True)]
        assert due == any(fired)
        assert counts.layers_due == fired
        assert [any(row) for row in counts.due] == fired
        if due:
            counts.compress()
        assert counts.lengths == lengths_of(layers)


def test_rows_of_different_length_are_due_at_different_times():
    plan = plan_of(small("snapkv", 8, 4))
    counts = HostCounts(plan, [20, 5, 20], [[8, 5, 8]])
    due = []
    for _ in range(12):
        if counts.append():
            due.append(counts.due[0])
            counts.compress()
    assert due == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]
    assert counts.lengths == [[8, 9, 8]]
    assert counts.budgets == [[8, 8, 8]]


@pytest.mark.parametrize(("seen", "expected"), [(1, (30, 26, 20, 14)), (8, (30, 26, 20, 14)), (1000, (26, 20, 12, 10))])
def test_capacities_hold_whatever_comes(seen, expected):
    plan = plan_of(small("pyramidkv", budget=13, every=4, protect={"sinks": 0, "recent": 3}), layers=4)
    found = capacities(plan, seen)
    for later in range(seen, seen + 400):
        assert fit(found, [budget + 4 for budget in plan.budgets.per_layer(later)])


def test_what_fits():
    assert fit([4, 5], [4, 5])
    assert not fit([4, 5], [4, 6])
