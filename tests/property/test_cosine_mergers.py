"""What holds for the published mergers whatever they are given, and that they compute what plain loops compute."""

import attrs
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages.slots import gather, indices_of
from kvpolicy_plugins.mergers.cam import CaM
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.weightedkv import WeightedKV
from tests.property.layers import generators, layers, row_alone
from tests.property.merger_loops import PLAIN, d2o_mean, head_of, plain_d2o

fractions = st.sampled_from((0.3, 0.5, 0.75, 1.0))
by_similarity = st.one_of(
    st.builds(Weighted, st.booleans()),
    st.builds(Pivot, st.booleans()),
    st.builds(ToMe, st.sampled_from((0.0, 0.2, 0.5)), fractions),
)
expected_cams = st.builds(
    CaM,
    st.integers(1, 6),
    st.just("expected"),
    st.sampled_from(("targets", "recent")),
    st.integers(0, 3),
)
d2os = st.builds(
    D2O,
    st.sampled_from((0.3, 0.5)),
    st.sampled_from((0.5, 0.7)),
    st.sampled_from(("count", "softmax")),
    st.sampled_from(("position", "rank")),
)
kvmergers = st.builds(KVMerger, st.sampled_from((-1.0, 0.0, 0.75)))
deterministic = st.one_of(by_similarity, expected_cams, d2os, kvmergers, st.just(WeightedKV()))
mergers = st.one_of(deterministic, st.builds(CaM, st.integers(1, 6), seed=st.integers(0, 9)))
within_hull = st.one_of(by_similarity, kvmergers, st.just(WeightedKV()), st.builds(D2O, normalize=st.just("softmax")))
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float64))
shares = st.sampled_from((0.1, 0.5, 0.9))


def in_dtype(view, dtype):
    return attrs.evolve(view, keys=view.keys.to(dtype), values=view.values.to(dtype))


def with_rows(view, merger, threshold=None):
    """The view with the merger's row state, as new or with `threshold` [B]."""
    state = {one.name: torch.full((len(view.keys),), one.fill) for one in merger.row_state()}
    return attrs.evolve(view, row_state=state if threshold is None or not state else {"threshold": threshold})


def some_of(view, random, share):
    """Keep indices: protected entries and a random share of the others."""
    return indices_of(view.protected | view.valid & (torch.rand(view.positions.shape, generator=random) < share))


def heads_of(tensor):
    return torch.cartesian_prod(*map(torch.arange, tensor.shape[:2])).reshape(-1, 2).tolist()


@given(layers(), mergers, dtypes)
def test_nothing_changes_where_nothing_is_evicted(view, merger, dtype):
    view = with_rows(in_dtype(view, dtype), merger, torch.full((len(view.keys),), 0.25))
    kept = indices_of(view.valid)
    entries = merger.merge(view, kept)
    assert torch.equal(entries.keys, gather(view.keys, kept))
    assert torch.equal(entries.values, gather(view.values, kept))
    assert not entries.changed.any()
    assert all(torch.equal(state, view.row_state[name]) for name, state in entries.row_state.items())


@given(layers(), mergers, generators, shares, dtypes)
def test_changed_entries_are_told_and_inputs_stay(view, merger, random, share, dtype):
    view = with_rows(in_dtype(view, dtype), merger)
    kept = some_of(view, random, share)
    inputs = (view.keys, view.values, view.positions, view.queries, view.attention, kept, *view.row_state.values())
    copies = [tensor.clone() for tensor in inputs]
    entries = merger.merge(view, kept)
    assert all(map(torch.equal, inputs, copies))
    assert entries.log_votes is None
    assert not entries.slot_state
    differs = torch.zeros_like(kept, dtype=torch.bool)
    for name in ("keys", "values"):
        found, before = getattr(entries, name), gather(getattr(view, name), kept)
        assert (found.dtype, found.shape) == (dtype, before.shape)
        assert found.isfinite().all()
        assert not found[kept < 0].any()
        assert found.data_ptr() != getattr(view, name).data_ptr() or not found.numel()
        differs |= (found != before).any(-1)
    assert torch.equal(entries.changed, differs)


@given(layers(contents=("normal", "clustered")), mergers, generators, shares)
def test_a_row_gives_what_it_would_give_alone(view, merger, random, share):
    view = with_rows(view, merger, torch.rand(len(view.keys), generator=random) - 0.5)
    kept = some_of(view, random, share)
    assume(not rounding_decides(view, kept))
    together = merger.merge(view, kept)
    for row in range(len(kept)):
        alone = row_alone(view, row)
        state = {name: part[[row]] for name, part in view.row_state.items()}
        held = kept[[row]][..., : int((kept[row] >= 0).sum(-1).max())]
        found = merger.merge(attrs.evolve(alone, row_state=state), held)
        for name in ("keys", "values"):
            expected = getattr(together, name)[[row], :, : held.shape[-1]]
            assert_close(getattr(found, name), expected, atol=1e-5, rtol=1e-5)
        for name, part in found.row_state.items():
            assert_close(part, together.row_state[name][[row]])


@given(layers(), mergers, generators, shares, st.sampled_from((7.0, -1e30)))
def test_empty_slots_do_not_matter(view, merger, random, share, junk):
    view = with_rows(view, merger)
    kept = some_of(view, random, share)
    empty = ~view.valid
    other = attrs.evolve(
        view,
        keys=view.keys.masked_fill(empty[..., None], junk),
        values=view.values.masked_fill(empty[..., None], junk),
        attention=view.attention.masked_fill(empty[:, :, None], junk),
    )
    first, second = merger.merge(view, kept), merger.merge(other, kept)
    for name in ("keys", "values", "changed"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@given(layers(contents=("normal", "clustered")), deterministic, generators, shares)
def test_heads_in_another_order_give_the_same(view, merger, random, share):
    view = with_rows(view, merger)
    kept = some_of(view, random, share)
    assume(not rounding_decides(view, kept))
    swapped = attrs.evolve(
        view,
        **{name: getattr(view, name).flip(1) for name in ("keys", "values", "positions", "attention")},
        queries=view.queries.unflatten(1, (kept.shape[1], -1)).flip(1).flatten(1, 2),
    )
    first, second = merger.merge(view, kept), merger.merge(swapped, kept.flip(1))
    assert_close(second.keys.flip(1), first.keys, atol=1e-5, rtol=1e-5)
    assert_close(second.values.flip(1), first.values, atol=1e-5, rtol=1e-5)


def rounding_decides(view, kept):
    """Whether an entry is as similar to one kept entry as to another."""
    if kept.shape[-1] < 2:
        return False
    directions = torch.nn.functional.normalize(view.keys.double(), dim=-1)
    cosines = (directions @ gather(directions, kept).transpose(-1, -2)).masked_fill((kept < 0)[:, :, None], -2.0)
    first, second = cosines.topk(2, -1).values.unbind(-1)
    return bool((evicted_of(view, kept) & (second > -2) & (first - second < 1e-6)).any())


@given(layers(), within_hull, generators, shares)
def test_merged_entries_stay_among_those_they_come_from(view, merger, random, share):
    view = with_rows(view, merger)
    kept = some_of(view, random, share)
    entries = merger.merge(view, kept)
    for name in ("keys", "values"):
        source = getattr(view, name)
        empty = ~view.valid[..., None]
        low = source.masked_fill(empty, torch.inf).amin(2, keepdim=True)
        high = source.masked_fill(empty, -torch.inf).amax(2, keepdim=True)
        found, held = getattr(entries, name), (kept >= 0)[..., None]
        assert ((found >= low - 1e-5) & (found <= high + 1e-5))[held.expand_as(found)].all()


@given(
    layers(contents=("normal",), most=20),
    st.one_of(by_similarity, st.just(WeightedKV()), st.just(KVMerger(0.999)), d2os),
    dtypes,
)
def test_copies_change_nothing(view, merger, dtype):
    """Of every entry there are two; the earlier one is evicted."""
    twice = {name: getattr(view, name).repeat_interleave(2, 2) for name in ("keys", "values")}
    positions = torch.arange(twice["keys"].shape[2]).expand(twice["keys"].shape[:3])
    attention = view.attention.repeat_interleave(2, -1)
    view = attrs.evolve(view, **twice, positions=positions, attention=attention, sinks=0, recent=0)
    view = with_rows(in_dtype(view, dtype), merger)
    kept = indices_of(positions % 2 == 1)
    entries = merger.merge(view, kept)
    within = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert_close(entries.keys, gather(view.keys, kept), atol=within, rtol=within)
    assert_close(entries.values, gather(view.values, kept), atol=within, rtol=within)


@given(layers(contents=("normal",)), deterministic, generators, shares)
def test_half_precision_only_rounds_the_result(view, merger, random, share):
    halves = with_rows(in_dtype(view, torch.bfloat16), merger)
    kept = some_of(view, random, share)
    found, precise = merger.merge(halves, kept), merger.merge(in_dtype(halves, torch.float32), kept)
    assert torch.equal(found.keys, precise.keys.bfloat16())
    assert torch.equal(found.values, precise.values.bfloat16())


plain = st.one_of(by_similarity, kvmergers, expected_cams, st.just(WeightedKV()))


@given(layers(contents=("normal", "clustered"), most=16), plain, generators, shares, st.booleans())
def test_each_head_is_what_plain_loops_give(view, merger, random, share, precise):
    view = in_dtype(view, torch.float64) if precise else view
    kept = some_of(view, random, share)
    entries = merger.merge(view, kept)
    queries = getattr(merger, "queries", 1) or view.queries.shape[2]
    for row, number in heads_of(kept):
        head = head_of(view, kept, row, number, queries)
        found, margin = head.nearest()
        assume(margin > 1e-5)
        keys, values = PLAIN[type(merger)](head, merger, found)
        keys = keys if getattr(merger, "merge_keys", True) else [head.keys[slot] for slot in head.kept]
        # attention is float32 in any case
        within = 1e-9 if precise and not isinstance(merger, (CaM, WeightedKV)) else 2e-5
        for found_entries, expected in ((entries.keys, keys), (entries.values, values)):
            ours = found_entries[row, number, : len(head.kept)].double()
            assert_close(ours, torch.stack(expected) if expected else ours, atol=within, rtol=within)


@given(layers(contents=("normal", "clustered"), most=16), d2os, generators, shares, st.booleans())
def test_d2o_is_what_plain_loops_give(view, merger, random, share, later):
    view = in_dtype(view, torch.float64)
    old = torch.rand(len(view.keys), generator=random) if later else None
    view, kept = with_rows(view, merger, old), some_of(view, random, share)
    entries = merger.merge(view, kept)
    for row in range(len(kept)):
        heads = [head_of(view, kept, row, head, 1) for head in range(kept.shape[1])]
        found = [head.nearest() for head in heads]
        assume(all(margin > 1e-9 for _, margin in found))
        sets, threshold = plain_d2o(merger, [one for one, _ in found], old if old is None else float(old[row]))
        if threshold is not None:
            assert_close(float(entries.row_state["threshold"][row]), threshold, atol=1e-6, rtol=1e-6)
        for number, (head, joined) in enumerate(zip(heads, sets, strict=True)):
            for found_entries, source in ((entries.keys, head.keys), (entries.values, head.values)):
                for place, slot in enumerate(head.kept):
                    expected = d2o_mean(merger, source, slot, {e: u for e, (u, at) in joined.items() if at == slot})
                    assert_close(found_entries[row, number, place], expected, atol=1e-9, rtol=1e-9)
