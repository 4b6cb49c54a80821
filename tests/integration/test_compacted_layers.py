"""Compaction of layers by kernels leaves what compaction without them leaves."""

import copy

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.cache.compaction.batched_compaction import compact_layers
from kvpolicy.plan.compress.step import Compressed
from kvpolicy_kernels import UnsupportedInputError
from tests.support.driving import HEADS, drive, new_layer, worth_plan
from tests.support.examples import examples
from tests.support.policies import held


@attrs.frozen
class Cache:
    """As far as `held` looks at one."""

    managed: list


@st.composite
def rounds(draw):
    """A plan, two of its layers, rows that are due, which slots stay, and whether holes are filled."""
    how = draw(st.sampled_from(("close up", "fill", "ragged")))
    ragged, batch, budget = how == "ragged", draw(st.integers(1, 3)), draw(st.integers(4, 7))
    plan = worth_plan(budget, draw(st.integers(1, 4)), ragged=ragged, any_order=True)
    layers = [new_layer(plan) for _ in range(2)]
    counts = [draw(st.one_of(st.just(12), st.integers(1, 12))), *[1] * draw(st.integers(0, 6))]
    for seed, layer in enumerate(layers):
        drive(layer, *counts, rows=batch, seed=seed)
    rows = sorted(draw(st.sets(st.integers(0, batch - 1), min_size=1)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    left = draw(st.one_of(st.just(budget), st.integers(0, budget)))  # with the budget, storage often stays
    results = [_result(layer, rows, left, random, ragged=ragged) for layer in layers]
    return plan, layers, rows, results, how == "fill"


def _result(layer, rows, most, random, *, ragged):
    """Up to `most` slots of every head of the rows, equally many unless `ragged`; and new attention mass."""
    lengths = [layer.storage.slots.lengths[row] for row in rows]
    width = min(most, *map(min, lengths))
    kept = torch.full((len(rows), HEADS, width), -1)
    for row, counts in enumerate(lengths):
        for head, length in enumerate(counts):
            stay = int(torch.randint(width + 1, (1,), generator=random)) if ragged else width
            kept[row, head, :stay] = torch.randperm(length, generator=random)[:stay].sort().values
    stays = tuple(map(tuple, (kept >= 0).sum(-1).tolist()))
    mass = layer.storage.slots.padded("attention", rows)
    return Compressed(kept, stays, {"attention": torch.rand(mass.shape, generator=random)})


@settings(max_examples=examples(20))
@given(rounds())
def test_the_same_entries_stand_in_the_same_slots(problem):
    _, layers, rows, results, fills = problem
    expected = copy.deepcopy(layers)
    for layer, result in zip(expected, results, strict=True):
        layer.apply(rows, result, fills=fills)
    done = _compact(layers, rows, results, fills=fills)
    for layer, result, moved in zip(layers, results, done, strict=True):
        assert moved
        layer.apply(rows, result, fills=fills, moved=moved)
    for layer, other in zip(layers, expected, strict=True):
        layer.storage.check_integrity()
        assert layer.storage.slots.layout == other.storage.slots.layout
        for store, right in zip(_stores(layer), _stores(other), strict=True):
            assert store.lengths == right.lengths
            for name, row, head in ((name, row, head) for name in store.columns for row, head in _segments(store)):
                assert torch.equal(store.segment(name, row, head), right.segment(name, row, head))
            assert all(tensor.isfinite().all() for tensor in store.tensors.values())


@pytest.mark.parametrize("left", [6, 4], ids=["storage stays", "storage shrinks"])
@pytest.mark.parametrize(
    "name", ["kvpolicy_kernels.compact.compact.check_moves", "kvpolicy_kernels.common.segments.addresses_of"]
)
def test_what_kernels_refuse_is_left_to_the_references(monkeypatch, name, left):
    """Entries that they cannot move, or storages that they cannot address: nothing has moved then."""
    plan = worth_plan(6, 3)
    layer = new_layer(plan)
    drive(layer, 9, 1, 1)
    kept = torch.arange(1, left + 1).expand(1, HEADS, -1)
    before = held(Cache([layer]))
    monkeypatch.setattr(name, _refuse)
    assert _compact([layer], [0], [Compressed(kept, ((left,) * HEADS,), {})], fills=False) == [False]
    assert held(Cache([layer])) == before


def _compact(layers, rows, results, *, fills):
    return compact_layers(
        [layer.storage for layer in layers], [layer.limit for layer in layers], rows, results, fills=fills
    )


def _refuse(*_args, **_named):
    raise UnsupportedInputError("no such luck")


def _stores(layer):
    return layer.storage.keys.residual, layer.storage.values.residual, layer.storage.slots


def _segments(store):
    return [(row, head) for row in range(store.layout.rows) for head in range(store.layout.heads)]
