"""What is NaN or infinite is merged into nothing, whatever the merger: its row goes on without it, the others alike."""

import math
import warnings

import attrs
import pytest
import torch

from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.plan.compress import step
from kvpolicy.plan.compress.blocks import Block
from kvpolicy.plan.compress.finite import faults_of, is_finite
from kvpolicy.plan.compress.step import Chosen, choose, compress_one
from kvpolicy.stages import Entries, Merger, State
from kvpolicy.stages.conformance.samples import query_logits_of, sample_view
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy_plugins.mergers.cam import CaM
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.weightedkv import WeightedKV
from kvpolicy_plugins.mergers.window_fit import WindowFit
from tests.support.policies import small

ROW, EVICTED, KEPT = 1, 5, 6  # the faulty row, a slot that goes, and a slot that stays, of head 0
WRONG = (torch.nan, torch.inf, -torch.inf)


@attrs.frozen
class Careless(Merger):
    """A third party's: adds the mean of all that it is shown, its own state and the newest query to every value."""

    name = "careless"
    votes = True
    reads_window = True

    def slot_state(self):
        return (State("noted"),)

    def row_state(self):
        return (State("total"),)

    def merge(self, view, kept):
        there, count = view.valid[..., None], view.lengths[..., None, None].clamp(min=1)
        mean = ((view.values + view.keys) * there).sum(2, keepdim=True) / count
        mean = (
            mean
            + view.row_state["total"][:, None, None, None]
            + view.window[:, :, -1].mean((1, 2))[:, None, None, None]
        )
        votes = (view.log_votes * view.valid).mean(-1, keepdim=True)
        held = kept >= 0
        return Entries(
            keys=gather(view.keys, kept),
            values=gather(view.values, kept) + mean * held[..., None],
            log_votes=gather(view.log_votes, kept) + votes * held,
            slot_state={"noted": gather(view.slot_state["noted"], kept) + mean[..., 0] * held},
            row_state={"total": view.row_state["total"] + mean.mean((1, 2, 3))},
        )


MERGERS = {
    "cam": CaM(),
    "cam expected": CaM(window=3, mode="expected", over="recent", queries=0),
    "d2o": D2O(),
    "d2o rank": D2O(together="rank", normalize="softmax"),
    "keepkv": KeepKV(threshold=-1, window=2),
    "keepkv fitted": KeepKV(threshold=-1, window=2, key="additive", gqa="lstsq"),
    "keepkv bias": KeepKV(threshold=-1, window=2, key="bias", estimate="window"),
    "kvmerger": KVMerger(similarity=-1),
    "pivot": Pivot(),
    "tome": ToMe(),
    "tome half": ToMe(fraction=0.5),
    "weighted": Weighted(),
    "weightedkv": WeightedKV(),
    "window_fit": WindowFit(attended=0.5),
    "window_fit ward": WindowFit(assign="ward", attended=0),
    "careless": Careless(),
}


def view_for(merger):
    """Three rows; the merger has followed one forward."""
    view = sample_view(merger)
    if merger.needs().forward_queries:
        view = attrs.evolve(
            view,
            slot_state={**view.slot_state, **merger.observe_forward(query_logits_of(merger, view), view.slot_state)},
        )
    state = {f"merge.{name}": values for name, values in view.slot_state.items()}
    return attrs.evolve(view, slot_state=state)


def kept_of(view):
    """A third of the slots, and the protected ones."""
    return indices_of(view.protected | (view.candidates & (view.positions % 3 == 0)))


def merged(merger, view, kept):
    spec = attrs.evolve(small("snapkv").spec, merge=merger)
    lengths = tuple(map(tuple, (kept >= 0).sum(-1).tolist()))
    faults, most = int(faults_of(view, queries=True).sum()), int((view.lengths - (kept >= 0).sum(-1)).max())
    return step.merged(spec, view, Chosen(kept, lengths, {}, faults, most, Block(view)), torch.zeros(1))


def parts(result):
    """Every tensor that a compression gives, those of slots and those of rows."""
    entries = result.entries
    slots = {"keys": entries.keys, "values": entries.values, "votes": entries.log_votes, **result.slot_state}
    return {name: one for name, one in slots.items() if one is not None}, result.row_state


def spoilt(view, where, wrong):
    """The view with a number that is not finite in row `ROW`."""
    name, slot = where
    column = getattr(view, name).clone()
    column[ROW, 0, slot, 3] = wrong
    return attrs.evolve(view, **{name: column})


PLACES = [("keys", EVICTED), ("values", EVICTED), ("keys", KEPT), ("values", KEPT), ("queries", -1), ("queries", 0)]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("merger", MERGERS.values(), ids=MERGERS)
def test_a_fault_stays_where_it_is(merger, wrong):
    view = view_for(merger)
    kept = kept_of(view)
    assert KEPT in kept[ROW, 0]
    assert EVICTED not in kept[ROW, 0]
    expected = merged(merger, view, kept)
    for where in PLACES:
        if getattr(view, where[0]) is None:
            continue
        faulty = spoilt(view, where, wrong)
        with pytest.warns(NonFiniteScoreWarning, match="left out of merging"):
            result = merged(merger, faulty, kept)
        others = [row for row in range(3) if row != ROW]
        (slots, rows), (all_slots, all_rows) = parts(result), parts(expected)
        for found, usual in ((slots, all_slots), (rows, all_rows)):
            assert all(torch.equal(found[name][others], one[others]) for name, one in usual.items())
        own = (
            kept[ROW, 0] == KEPT if where in (("keys", KEPT), ("values", KEPT)) else torch.zeros_like(kept[ROW, 0]) > 0
        )
        for name, one in slots.items():
            if name in ("keys", "values"):
                whole = gather(getattr(faulty, name), kept)[ROW, 0]
                assert torch.equal(one[ROW, 0][own].nan_to_num(7.0), whole[own].nan_to_num(7.0))
                assert one[ROW, 0][~own].isfinite().all()
            assert not one[ROW, 1].isnan().any()
            assert not one[ROW, 0][~own].isnan().any()
        assert all(one[ROW].isfinite().all() for one in rows.values())


def without(view, kept, slot):
    """Row `ROW` of a view alone, as if head 0 had never held the entry in `slot`; and the kept slots then."""
    order = torch.arange(view.positions.shape[-1])
    order = torch.stack([torch.cat([order[order != slot], order[order == slot]]), order])[None]

    def moved(column):
        column = column[[ROW]]
        index = order.reshape(*order.shape, *[1] * (column.ndim - 3)).expand(*order.shape, *column.shape[3:])
        return column.gather(2, index)

    keys, values, positions = moved(view.keys), moved(view.values), moved(view.positions)
    keys[0, 0, -1], values[0, 0, -1], positions[0, 0, -1] = 0, 0, -1
    attention = None if view.attention is None else moved(view.attention.transpose(2, 3)).transpose(2, 3)
    alone = attrs.evolve(
        view,
        keys=keys,
        values=values,
        positions=positions,
        queries=None if view.queries is None else view.queries[[ROW]],
        attention=attention,
        log_votes=None if view.log_votes is None else moved(view.log_votes),
        slot_state={name: moved(state) for name, state in view.slot_state.items()},
        row_state={name: state[[ROW]] for name, state in view.row_state.items()},
    )
    fewer = kept[[ROW]].clone()
    fewer[0, 0] = torch.where(fewer[0, 0] > slot, fewer[0, 0] - 1, fewer[0, 0])
    return alone, fewer


@pytest.mark.parametrize("merger", MERGERS.values(), ids=MERGERS)
def test_a_row_with_a_faulty_entry_is_merged_as_if_it_had_never_been_there(merger):
    view = view_for(merger)
    if view.log_votes is not None:
        view = attrs.evolve(view, log_votes=view.log_votes.masked_fill(~view.valid, 0.0))
    kept = kept_of(view)
    for name in ("keys", "values"):
        with pytest.warns(NonFiniteScoreWarning):
            slots, rows = parts(merged(merger, spoilt(view, (name, EVICTED), torch.nan), kept))
        alone, fewer = without(view, kept, EVICTED)
        alone_slots, alone_rows = parts(merged(merger, alone, fewer))
        held = fewer[0] >= 0
        for found, one in ((slots[name], one) for name, one in alone_slots.items()):
            torch.testing.assert_close(found[ROW][held], one[0][held], rtol=1e-4, atol=1e-5)
        for found, one in ((rows[name], one) for name, one in alone_rows.items()):
            torch.testing.assert_close(found[ROW], one[0], rtol=1e-4, atol=1e-5)


@attrs.frozen
class Spoiling(Careless):
    """Gives something that is not finite for its second kept entry, and NaN for its row."""

    where: str = "values"
    wrong: float = torch.nan

    def merge(self, view, kept):
        given = super().merge(view, kept)
        tensors = {"keys": given.keys, "values": given.values, "log_votes": given.log_votes, **given.slot_state}
        tensors[self.where] = tensors[self.where].clone()
        tensors[self.where][ROW, 0, 1] = self.wrong
        noted = {"noted": tensors.pop("noted")}
        total = given.row_state["total"].clone()
        total[ROW] = torch.nan
        changed = torch.ones_like(kept, dtype=torch.bool)
        return Entries(**tensors, slot_state=noted, row_state={"total": total}, changed=changed)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("where", ["keys", "values", "log_votes", "noted"])
def test_what_would_not_stay_finite_stays_as_it_was(where, wrong):
    if where != "noted" or math.isnan(wrong):  # state may be infinite
        merger = Spoiling(where=where, wrong=wrong)
        view = view_for(merger)
        kept = kept_of(view)
        expected = merged(Careless(), view, kept)
        with pytest.warns(NonFiniteScoreWarning, match="stay as they were"):
            result = merged(merger, view, kept)
        before = {
            "keys": gather(view.keys, kept),
            "values": gather(view.values, kept),
            "votes": gather(view.log_votes, kept),
            "merge.noted": gather(view.slot_state["merge.noted"], kept),
        }
        (slots, rows), (usual, usual_rows) = parts(result), parts(expected)
        for name, one in slots.items():
            assert torch.equal(one[ROW, 0, 1], before[name][ROW, 0, 1])
            one[ROW, 0, 1] = usual[name][ROW, 0, 1]
            assert torch.equal(one, usual[name])
        assert not result.entries.changed[ROW, 0, 1]
        assert result.entries.changed.sum() == kept.numel() - 1
        assert rows["total"][ROW] == view.row_state["total"][ROW]
        assert torch.equal(rows["total"][[0, 2]], usual_rows["total"][[0, 2]])


def test_sums_that_overflow_leave_the_value_as_it_was():
    merger = CaM(mode="expected", window=1)
    view = view_for(merger)
    values = torch.full_like(view.values, 6e4, dtype=torch.float16)
    view = attrs.evolve(view, keys=view.keys.half(), values=values, queries=view.queries.half())
    kept = kept_of(view)
    with pytest.warns(NonFiniteScoreWarning, match="stay as they were"):
        result = merged(merger, view, kept)
    assert result.entries.values.isfinite().all()
    assert (result.entries.values == 6e4).any()


def test_nothing_is_said_and_nothing_copied_where_all_is_finite():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for merger in MERGERS.values():
            view = view_for(merger)
            assert not faults_of(view, queries=True).any()
            merged(merger, view, kept_of(view))


def test_a_merger_that_only_moves_is_not_looked_after():
    view = spoilt(sample_view(), ("keys", EVICTED), torch.nan)
    (dropped,), (merged_into,) = (
        choose(
            attrs.evolve(small("streaming_llm").spec, merge=merger), None, [view], torch.full((1, len(view.keys)), 4)
        )
        for merger in (Drop(), Pivot())
    )
    assert (dropped.faults, merged_into.faults) == (0, 1)


def test_what_empty_slots_hold_is_not_merged_and_not_told():
    """What was evicted may stand there still, and a slot with weight 0 is multiplied."""
    for merger in MERGERS.values():
        view = view_for(merger)
        kept, clean = kept_of(view), attrs.evolve(view, keys=view.keys.masked_fill(~view.valid[..., None], 0))
        clean = attrs.evolve(clean, values=view.values.masked_fill(~view.valid[..., None], 0))
        junk = attrs.evolve(
            view,
            keys=view.keys.masked_fill(~view.valid[..., None], torch.nan),
            values=view.values.masked_fill(~view.valid[..., None], torch.inf),
        )
        if view.log_votes is not None:
            votes = view.log_votes.masked_fill(~view.valid, 0.0)
            clean, junk = attrs.evolve(clean, log_votes=votes), attrs.evolve(junk, log_votes=votes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, expected = parts(merged(merger, junk, kept)), parts(merged(merger, clean, kept))
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(ours[name], one) for name, one in theirs.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_number_of_a_vector_is_looked_at(dtype):
    vectors = torch.full((70, 67), torch.finfo(dtype).max, dtype=dtype)
    vectors[-1] = torch.finfo(dtype).min
    for channel in range(67):
        for row, wrong in enumerate(WRONG):
            spoilt_ = vectors.clone()
            spoilt_[row, channel] = wrong
            assert is_finite(spoilt_).tolist() == [at != row for at in range(70)]


def test_a_compression_as_a_whole_goes_on():
    """NaN ranks last, so it is what goes; it is not merged when it does."""
    spec = small("snapkv", merge="d2o", score=[{"use": "key_norm"}]).spec
    view = view_for(D2O())
    for wrong in WRONG:
        faulty = spoilt(view, ("keys", EVICTED), wrong)
        with pytest.warns(NonFiniteScoreWarning):
            result = compress_one(spec, faulty, [9, 9, 9])
        assert EVICTED not in result.kept[ROW, 0]
        assert result.entries.keys.isfinite().all()
        assert result.row_state["threshold"].isfinite().all()
