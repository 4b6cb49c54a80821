"""A plan with fused stages does what the references do: random policies, shapes and dtypes, through the interpreter."""

import attrs
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.plan.compress.fusion import fusion_of
from kvpolicy.plan.compress.score import scored
from kvpolicy.plan.compress.scored import select
from kvpolicy.plan.forward_observers import state_name
from kvpolicy.stages import Geometry, View
from kvpolicy.stages.slots import indices_of
from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from tests.support.compressing import allocated, chosen, chosen_together, fused, score
from tests.support.examples import examples
from tests.support.references import near_threshold

NONE = {"kind": "none"}
# The interpreter computes with NumPy, which reports overflows in slots that are masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # a seed does not shrink, and the interpreter is slow


def attention(pick):
    """Any of the variants."""
    return {
        "use": "attention",
        "queries": pick([1, 3, 8]),
        "softmax": pick(["all", "candidates"]),
        "group": pick(["mean", "max", "sum"]),
        "group_at": pick(["logits", "probabilities", "scores", "pooled"]),
        "reduce": pick(["mean", "sum"]),
        "pool": pick([NONE, {"kind": "max", "size": 5}, {"kind": "average", "size": 3}]),
        "deviation": pick([0, 0.5]),
        "spread": pick(["deviation", "variance"]),
        "shared": pick([True, False]),
    }


def redundancy(pick):
    """Any of the variants."""
    return {
        "use": "redundancy",
        "threshold": pick([0.1, 0.5]),
        "forgive": pick([0, 1, 2]),
        "forgive_end": pick(["last", "first"]),
        "empty_row": pick(["slot0", "none"]),
    }


def simple(pick):
    """What has no or few parameters; the last one has no tile function."""
    return pick(
        [
            {"use": "key_norm"},
            {"use": "value_norm", "order": 1},
            {"use": "value_norm", "order": 3},
            {"use": "recency"},
            {"use": "accumulated_attention", "group": "max"},
            {"use": "accumulated_attention", "group": "mean"},
            {"use": "history", "of": {"use": "value_norm"}},
        ]
    )


def term(pick):
    """A weighted scorer."""
    beside = {"weight": pick([1, 0.3, -0.7]), "normalise": pick(["none", "max", "standard"])}
    return {**pick([attention, redundancy, simple])(pick), **beside}


def scene(seed):
    """A random policy, and views of one or two layers whose heads hold different numbers of entries."""
    numbers = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=numbers))]

    heads = pick(["uniform", {"use": "adaptive", "floor": 0.3}, {"use": "adaptive", "normalise": "mass"}])
    spec = kvpolicy.load(
        "snapkv",
        budget=pick(range(8, 41)),
        protect={"sinks": pick(range(4)), "recent": pick(range(5))},
        score=[term(pick) for _ in range(pick([1, 2, 3]))],
        allocate={"heads": heads},
    ).spec
    kv_heads, group = pick([1, 2]), pick([1, 2, 3])
    geometry = Geometry((0, 1), kv_heads * group, kv_heads, pick([16, 24]))
    dtype, rows, layers = pick([torch.float32, torch.bfloat16]), pick([1, 2]), pick([1, 2])
    return spec, [view_of(spec, geometry, dtype, rows, numbers) for _ in range(layers)]


def view_of(spec, geometry, dtype, rows, numbers):
    """Random entries in a storage with room behind them, as a layer's own."""
    slots, capacity = int(torch.randint(12, 50, (), generator=numbers)), 64
    shape = (rows, geometry.kv_heads, capacity, geometry.head_dim)
    lengths = torch.randint(1, slots + 1, shape[:2], generator=numbers)
    lengths[0, 0] = slots
    shared_heads = any(getattr(weighted.scorer, "shared", False) for weighted in spec.score)
    if shared_heads:
        lengths = lengths[:, :1].expand(lengths.shape)  # heads that keep one set hold equally many
    positions = torch.arange(capacity, dtype=torch.int32).expand(shape[:3]).contiguous()
    positions[torch.arange(capacity) >= lengths[..., None]] = -1
    shared = torch.randn(*shape[:2], 1, shape[3], generator=numbers)
    scorers = [weighted.scorer for weighted in spec.score]
    window = max(scorer.needs().queries for scorer in scorers)
    queries = torch.randn(rows, geometry.query_heads, window, shape[3], generator=numbers).to(dtype)
    mass = torch.rand(*shape[:3], geometry.group, generator=numbers)
    states = {
        state_name(place, state.name): torch.rand(shape[:3], generator=numbers)[:, :, :slots]
        for place, scorer in enumerate(scorers)
        for state in scorer.slot_state()
    }
    pinned = pinned_of(positions, torch.Generator().manual_seed(slots + int(lengths.sum())))
    if pinned is not None and shared_heads:
        pinned = pinned[:, :1].expand(pinned.shape).contiguous()  # of which the same are protected
    return View(
        keys=(torch.randn(shape, generator=numbers) + shared).to(dtype)[:, :, :slots],
        values=torch.randn(shape, generator=numbers).to(dtype)[:, :, :slots],
        positions=positions[:, :, :slots],
        geometry=geometry,
        scaling=geometry.head_dim**-0.5,
        sinks=spec.protect.sinks,
        recent=spec.protect.recent,
        pinned=None if pinned is None else pinned[:, :, :slots],
        queries=queries if window else None,
        attention=mass[:, :, :slots].transpose(-1, -2),
        slot_state=states,
    )


def pinned_of(positions, numbers):
    """What is protected beside both ends: nothing, all, whole heads, a prompt of each row, or any entries."""
    kind = int(torch.randint(6, (), generator=numbers))
    shape, held = positions.shape, positions >= 0
    some = torch.rand(shape, generator=numbers) < 0.3
    heads = torch.rand(*shape[:2], 1, generator=numbers) < 0.5
    prompts = positions < torch.randint(0, 40, (shape[0], 1, 1), generator=numbers)
    return [None, torch.zeros_like(held), held, held & heads, held & prompts, held & some][kind]


def rounding_decides(spec, views):
    """Whether the last bits decide: keys are as much alike as a threshold says, or a standard score is of nothing."""
    if any(is_flat(place, weighted, view) for place, weighted in enumerate(spec.score) for view in views):
        return True
    thresholds = {weighted.scorer.threshold for weighted in spec.score if isinstance(weighted.scorer, Redundancy)}
    heads = [keys for view in views for keys in view.keys.flatten(0, 1)]
    return any(near_threshold(keys, threshold) for threshold in thresholds for keys in heads)


def is_flat(place, weighted, view):
    """Whether the scores of a head differ by no more than rounding, and are divided by their deviation."""
    if weighted.normalise != "standard":
        return False
    scores, _ = scored(weighted.scorer, state_name(place, ""), view)
    heads = [one[inside] for one, inside in zip(scores.flatten(0, 1), view.candidates.flatten(0, 1), strict=True)]
    return any(len(one) > 1 and (one.amax() - one.amin()) <= 1e-2 * one.abs().amax() for one in heads)


@given(st.integers(0, 2**31))
@settings(max_examples=examples(16), phases=WITHOUT_SHRINKING)
def test_fused_scores_are_those_of_the_references(seed):
    """Up to rounding, on every candidate; new slot state is the same."""
    spec, views = scene(seed)
    assume(not rounding_decides(spec, views))
    group = fused(spec, fusion_of(spec, ""), views)

    assert group.nan.sum() == 0
    assert torch.equal(group.protected, torch.stack([view.protected.sum(-1) for view in views]))
    assert torch.equal(group.room, torch.stack([view.candidates.sum(-1) for view in views]))
    for found, noted, view in zip(group.scores, group.observed, views, strict=True):
        expected, fresh = score(spec, view)
        largest = expected[view.candidates].abs().amax().item() if view.candidates.any() else 0.0
        scale = largest or 1.0  # a head's only candidate has a standard score of 0
        tolerance = 1e-4 if view.keys.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            found[view.candidates] / scale, expected[view.candidates] / scale, atol=tolerance, rtol=0
        )
        assert (found[~view.candidates & view.valid] == -torch.inf).all()
        assert noted.keys() == fresh.keys()
        assert all(torch.equal(noted[name], fresh[name]) for name in fresh)


@given(st.integers(0, 2**31))
@settings(max_examples=examples(14), phases=WITHOUT_SHRINKING)
def test_fused_choice_follows_from_the_fused_scores_and_keeps_as_much(seed):
    """Budgets and slots are exactly those that the references give for the scores that the kernels found.

    Where rounding makes another choice than theirs for their own scores, it is one between equals.
    """
    spec, views = scene(seed)
    fusion, budgets = fusion_of(spec, ""), [[spec.budget.tokens] * len(view.positions) for view in views]
    group = fused(spec, fusion, views)

    results = chosen_together(spec, fusion, views, budgets)

    comparable = not spec.allocate.heads.ragged and not rounding_decides(spec, views)
    for one, scores, view, budget in zip(results, group.scores, views, budgets, strict=True):
        counts = allocated(spec, view, scores, budget)
        expected = indices_of(select(spec, view, scores, counts) | view.protected)
        assert torch.equal(one.kept, expected)
        if comparable:
            assert_as_much_score(spec, view, one.kept, chosen(spec, view, budget).kept)


def assert_as_much_score(spec, view, kept, expected):
    scores, _ = score(spec, view)
    finite = scores.masked_fill(~view.candidates, 0.0)
    sums = [finite.gather(-1, each.clamp(min=0)).masked_fill(each < 0, 0.0).sum(-1) for each in (kept, expected)]
    scale = float(finite.abs().max()) or 1.0
    tolerance = 1e-4 if view.keys.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(sums[0] / scale, sums[1] / scale, atol=tolerance * 40, rtol=0)


def test_layers_do_not_influence_each_other():
    """A layer compressed with another one keeps what it keeps alone."""
    spec = kvpolicy.load("rkv", budget=12, protect={"recent": 2}).spec
    numbers = torch.Generator().manual_seed(3)
    geometry = Geometry((0, 1), 4, 2, 16)
    views = [view_of(spec, geometry, torch.float32, 1, numbers) for _ in range(2)]
    fusion = fusion_of(spec, "")
    together = chosen_together(spec, fusion, views, [[12], [12]])
    for view, one in zip(views, together, strict=True):
        (alone,) = chosen_together(spec, fusion, [view], [[12]])
        assert torch.equal(alone.kept, one.kept)


@pytest.mark.parametrize(
    "name", ["snapkv", "rkv", "adakv", "pyramidkv", "tova", "streaming_llm", "h2o", "blend", "keydiff"]
)
def test_shipped_policies_are_fused(name):
    """Every term, the budgets and the selection of the shipped eviction policies have kernels."""
    fusion = fusion_of(kvpolicy.load(name).spec, "")
    assert [term.reason for term in fusion.terms] == [""] * len(fusion.terms)
    assert (fusion.allocate, fusion.select) == ("", "")


def test_views_that_kernels_cannot_address_are_refused():
    """Entries with gaps between their elements: an error that the caller turns into the reference."""
    spec = kvpolicy.load("snapkv", budget=12, protect={"recent": 2}).spec
    view = view_of(spec, Geometry((0, 1), 4, 2, 16), torch.float32, 1, torch.Generator().manual_seed(3))
    spread = torch.stack([view.keys, view.keys], -1).flatten(-2)[..., ::2]
    with pytest.raises(UnsupportedInputError, match="contiguous"):
        chosen_together(spec, fusion_of(spec, ""), [attrs.evolve(view, keys=spread)], [[12]])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_scores_that_are_nan_rank_last_among_what_is_not_protected(heads, wrong):
    """Protected entries stay whatever they are, and the host is told of as many NaN as by the references."""
    spec = kvpolicy.load("snapkv", budget=16, protect={"recent": 2}, allocate={"heads": heads}).spec
    numbers = torch.Generator().manual_seed(4)
    view = view_of(spec, Geometry((0,), 4, 2, 16), torch.float32, 2, numbers)
    pinned = view.valid & (torch.rand(view.positions.shape, generator=numbers) < 0.3)
    view = attrs.evolve(view, pinned=pinned)
    view.keys[1, 0, 3:9] = wrong
    with pytest.warns(NonFiniteScoreWarning) as said:
        (kept,), (expected,) = (
            [one.kept for one in chosen_together(spec, fusion, [view], [[16, 16]])]
            for fusion in (fusion_of(spec, ""), None)
        )
    assert len({str(one.message) for one in said if one.category is NonFiniteScoreWarning}) == 1
    assert torch.equal(kept, expected)


def test_entries_out_of_order_are_refused():
    """Kernels take sinks and recent entries by slot."""
    spec = kvpolicy.load("snapkv", budget=12, protect={"recent": 2}).spec
    view = view_of(spec, Geometry((0, 1), 4, 2, 16), torch.float32, 1, torch.Generator().manual_seed(3))
    with pytest.raises(UnsupportedInputError, match="order"):
        chosen_together(spec, fusion_of(spec, ""), [attrs.evolve(view, in_order=False)], [[12]])
