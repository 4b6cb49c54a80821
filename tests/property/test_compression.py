"""What holds for every compression, whatever the scores (NaN, infinities and ties among them)."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.spec.policy import Allocate, Weighted
from kvpolicy.stages import Scorer
from kvpolicy.stages.conformance.samples import shuffled
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.threshold import Threshold
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from tests.support.compressing import compress_one
from tests.support.driving import FirstHeads
from tests.support.policies import small
from tests.support.views import view_of

pytestmark = pytest.mark.filterwarnings("ignore::kvpolicy.errors.NonFiniteScoreWarning")
HEAD_ALLOCATORS = (UniformHeads(), Adaptive(), FirstHeads(), Threshold(0.0))
VALUES = (0.0, -0.0, 1.0, 2.5, -3.0, 1e-42, torch.inf, -torch.inf, torch.nan)


@attrs.frozen
class Given(Scorer):
    """The scores that stand in the keys."""

    name = "given"

    def score(self, view):
        return view.keys[..., 0].float()


def spec_of(heads, sinks=0, recent=0):
    spec = small("snapkv", budget=100, protect={"sinks": sinks, "recent": recent}).spec
    return attrs.evolve(spec, score=(Weighted(Given()),), allocate=Allocate(spec.allocate.layers, heads))


@st.composite
def problems(draw, allocators=HEAD_ALLOCATORS, odd=True):
    """A spec, a view and a budget per row."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    slots = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scores = torch.randn(batch, heads, slots, generator=generator)
    if odd and draw(st.booleans()):
        choice = torch.randint(0, len(VALUES), scores.shape, generator=generator)
        scores = torch.tensor(VALUES)[choice]
    lengths = torch.randint(1, slots + 1, (batch, 1), generator=generator).expand(batch, heads)
    sinks, recent = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    keys = torch.stack([scores, torch.arange(scores.numel()).reshape(scores.shape).float()], -1)
    view = view_of(keys, lengths=lengths, sinks=sinks, recent=recent)
    budget = [draw(st.integers(min(int(length), sinks + recent + 1), 26)) for length in lengths[:, 0]]
    return spec_of(draw(st.sampled_from(allocators)), sinks, recent), view, budget


@given(problems())
def test_kept_slots_are_unique_ascending_and_hold_an_entry(problem):
    spec, view, budget = problem
    kept = compress_one(spec, view, budget).kept
    for row, heads in enumerate(kept.tolist()):
        for head, slots in enumerate(heads):
            own = [slot for slot in slots if slot >= 0]
            assert own == sorted(set(own))
            assert slots == own + [-1] * (len(slots) - len(own))
            assert all(view.valid[row, head, slot] for slot in own)


@given(problems())
def test_the_same_entries_stay_in_whichever_slots_they_stand(problem):
    spec, view, budget = problem
    other, slots = shuffled(view)
    found, expected = compress_one(spec, other, budget).kept, compress_one(spec, view, budget).kept
    stood = slots.gather(-1, found.clamp(min=0)).masked_fill(found < 0, slots.shape[-1]).sort(-1).values
    assert torch.equal(stood, expected.masked_fill(expected < 0, slots.shape[-1]))


@given(problems())
def test_a_row_keeps_exactly_its_budget(problem):
    """At most that where the allocator says so, and everything that fits."""
    spec, view, budget = problem
    kept = (compress_one(spec, view, budget).kept >= 0).sum((1, 2))
    heads = view.positions.shape[1]
    for row, length in enumerate(view.lengths[:, 0].tolist()):
        most = min(length, budget[row]) * heads
        required = spec.allocate.divider.exact or length <= budget[row]
        assert kept[row] == most if required else kept[row] <= most


@given(problems(allocators=HEAD_ALLOCATORS[:1]))
def test_heads_keep_the_same_when_they_share_evenly(problem):
    spec, view, budget = problem
    counts = (compress_one(spec, view, budget).kept >= 0).sum(-1)
    assert (counts == counts[:, :1]).all()


@given(problems())
def test_protected_entries_stay_and_the_evicted_score_no_higher_than_the_kept(problem):
    spec, view, budget = problem
    kept = compress_one(spec, view, budget).kept
    scores = view.keys[..., 0].nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            stays = torch.zeros(view.positions.shape[2], dtype=torch.bool)
            stays[kept[row, head][kept[row, head] >= 0]] = True
            assert stays[view.protected[row, head]].all()
            candidates = view.candidates[row, head]
            evicted, chosen = scores[row, head][candidates & ~stays], scores[row, head][candidates & stays]
            if len(evicted) and len(chosen):
                assert evicted.max() <= chosen.min()


@given(problems())
def test_nan_is_kept_only_when_nothing_else_is_left(problem):
    spec, view, budget = problem
    kept = compress_one(spec, view, budget).kept
    wrong = view.keys[..., 0].isnan() & view.candidates
    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            slots = kept[row, head][kept[row, head] >= 0]
            stays = torch.zeros(view.positions.shape[2], dtype=torch.bool)
            stays[slots] = True
            if (stays & wrong[row, head]).any():
                left = view.candidates[row, head] & ~stays & ~wrong[row, head]
                assert not (left & (view.keys[row, head, :, 0] > -torch.inf)).any()


@given(problems())
def test_what_is_kept_is_an_exact_gather(problem):
    spec, view, budget = problem
    done = compress_one(spec, view, budget)
    assert done.entries is None  # the runtime moves them
    entries = spec.merge.merge(view, done.kept)
    for row, heads in enumerate(done.kept.tolist()):
        for head, slots in enumerate(heads):
            own = [slot for slot in slots if slot >= 0]
            for name in ("keys", "values"):
                held, before = getattr(entries, name)[row, head], getattr(view, name)[row, head]
                assert torch.equal(held[: len(own)].nan_to_num(7), before[own].nan_to_num(7))
                assert (held[len(own) :] == 0).all()


@given(problems())
def test_rows_know_nothing_of_each_other(problem):
    spec, view, budget = problem
    together = compress_one(spec, view, budget).kept
    for row in range(len(budget)):
        own = view_of(
            view.keys[row : row + 1], lengths=view.lengths[row : row + 1], sinks=view.sinks, recent=view.recent
        )
        alone = compress_one(spec, own, budget[row : row + 1]).kept
        assert [[s for s in slots if s >= 0] for slots in alone[0].tolist()] == [
            [s for s in slots if s >= 0] for slots in together[row].tolist()
        ]


@given(problems(allocators=HEAD_ALLOCATORS[:1]), st.randoms(use_true_random=False))
def test_heads_can_be_permuted(problem, random):
    spec, view, budget = problem
    order = list(range(view.positions.shape[1]))
    random.shuffle(order)
    moved = view_of(view.keys[:, order], lengths=view.lengths[:, order], sinks=view.sinks, recent=view.recent)
    assert torch.equal(compress_one(spec, moved, budget).kept, compress_one(spec, view, budget).kept[:, order])


@given(problems())
def test_compressing_again_changes_nothing(problem):
    spec, view, budget = problem
    once = compress_one(spec, view, budget)
    positions = torch.where(once.kept >= 0, view.positions.gather(-1, once.kept.clamp(min=0)), -1)
    entries = spec.merge.merge(view, once.kept)
    again = attrs.evolve(view, keys=entries.keys, values=entries.values, positions=positions)
    kept = compress_one(spec, again, budget).kept
    assert torch.equal(torch.where(kept >= 0, kept, -1), torch.where(positions >= 0, torch.arange(kept.shape[-1]), -1))
