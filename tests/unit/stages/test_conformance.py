"""The conformance suite finds what is wrong with a plugin, and says so."""

import attrs
import pytest
import torch

from kvpolicy.errors import PluginContractError
from kvpolicy.stages import (
    Entries,
    HeadAllocator,
    JointAllocator,
    LayerAllocator,
    Merger,
    Needs,
    Scorer,
    Selector,
    State,
)
from kvpolicy.stages.checking.returned import check_scores
from kvpolicy.stages.conformance import Promises, check_plugin, conformance_cases
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.views import view_of


def broken(score, needs=Needs(), **members):  # noqa: B008
    """A scorer whose `score` is the function given."""
    body = {
        "name": "broken",
        "score": lambda self, view: score(view),
        "needs": lambda self: needs,
        "__module__": __name__,
        **members,
    }
    return attrs.frozen(type("Broken", (Scorer,), body))()


def norms(view):
    return view.keys.norm(dim=-1)


def writing(view):
    view.keys.mul_(2)
    return norms(view)


SCORERS = {
    "returned shape (3, 2, 22), expected (batch=3, kv_heads=2, seq=23)": lambda view: norms(view)[..., 1:],
    "returned torch.float64, expected torch.float32": lambda view: norms(view).double(),
    "returned list, expected a tensor": lambda view: norms(view).tolist(),
    "scores that are not finite for zero keys": lambda view: view.keys.sum(-1) / norms(view),
    "changed its input 'keys'": writing,
    "the second time": lambda view: torch.rand(view.positions.shape),
    "for the rows": lambda view: norms(view) - norms(view).mean(),
    "with other empty slots": lambda view: norms(view) - norms(view).mean(-1, keepdim=True),
    "for heads swapped": lambda view: norms(view) + torch.arange(norms(view).shape[1])[:, None],
    "raised KeyError: 'mine'": lambda view: view.slot_state["mine"],
}


@pytest.mark.parametrize(("message", "score"), SCORERS.items(), ids=SCORERS)
def test_a_broken_scorer_is_found_out(message, score):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(broken(score))
    assert message in str(caught.value)
    assert "scorer 'broken'" in str(caught.value)


def test_state_must_be_declared_and_shaped():
    observed = {"observe": lambda self, view: {"mine": torch.zeros(1)}}
    with pytest.raises(PluginContractError, match=r"observed \['mine'\], expected only \[\]"):
        check_plugin(broken(lambda view: norms(view).float(), **observed))
    declared = {**observed, "slot_state": lambda self: (State("mine"),)}
    with pytest.raises(PluginContractError, match=r"returned shape \(1,\), expected \(batch=3"):
        check_plugin(broken(lambda view: norms(view).float(), **declared))


def test_a_layer_that_is_no_row_among_others_is_found_out():
    """Of a scorer, a selector and a merger that say they look at no layer, and do."""
    scorer = broken(lambda view: norms(view).float() * (1 + view.layer), layers_as_rows=True)
    check = dict(conformance_cases(scorer))["looks at no layer"]
    with pytest.raises(PluginContractError, match="for another layer"):
        check()
    honest = broken(lambda view: norms(view).float() * (1 + view.layer))
    dict(conformance_cases(honest))["looks at no layer"]()

    def select(_self, request):
        shown = request.scores if request.layer % 2 else -request.scores
        return TopK().select(attrs.evolve(request, scores=shown))

    def merge(_self, view, kept):
        entries = Drop().merge(view, kept)
        return attrs.evolve(entries, keys=entries.keys + view.layer, changed=torch.ones_like(kept, dtype=torch.bool))

    for kind, members in ((Selector, {"select": select}), (Merger, {"merge": merge})):
        body = {"name": "broken", "layers_as_rows": True, "__module__": __name__, **members}
        plugin = attrs.frozen(type("Broken", (kind,), body))()
        with pytest.raises(PluginContractError, match="for another layer"):
            dict(conformance_cases(plugin))["looks at no layer"]()


def test_scores_that_mix_heads_alike_are_no_fault():
    check = dict(conformance_cases(broken(SCORERS["for heads swapped"]), Promises(heads_apart=False)))
    check["keeps heads apart"]()


def test_a_scorer_that_minds_the_order_must_not_deny_it():
    denies = {"in_any_order": lambda self: True}
    with pytest.raises(PluginContractError, match="in another order"):
        check_plugin(broken(lambda view: norms(view).cumsum(-1), **denies))
    check = dict(conformance_cases(broken(lambda view: norms(view) - view.age, **denies)))
    check["scores the same in any order"]()


@attrs.define
class Loose(Scorer):
    name = "loose"

    def score(self, view):
        return norms(view)


def test_a_plugin_must_be_frozen():
    with pytest.raises(PluginContractError, match="expected an immutable instance"):
        dict(conformance_cases(Loose()))["is frozen"]()
    with pytest.raises(PluginContractError, match=r"must be decorated with @attrs.frozen"):
        dict(conformance_cases(Loose()))["can be named in a policy"]()


@attrs.frozen
class Spendthrift(LayerAllocator):
    name = "spendthrift"

    def allocate(self, request):
        return request.room


@attrs.frozen
class Newest(Selector):
    name = "newest"
    best = True  # which is not true

    def select(self, request):
        back = request.candidates.flip(-1).cumsum(-1).flip(-1)
        return request.candidates & (back <= request.counts[..., None])


@attrs.frozen
class Oldest(Selector):
    name = "oldest"

    def select(self, request):
        return request.candidates & (request.candidates.cumsum(-1) <= request.counts[..., None])


@attrs.frozen
class Doubling(Merger):
    name = "doubling"

    def merge(self, view, kept):
        slots = kept.clamp(min=0)[..., None].expand(*kept.shape, view.keys.shape[-1])
        return Entries(2 * view.keys.gather(2, slots), view.values.gather(2, slots))


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Spendthrift(), "layer allocator 'spendthrift' gave [65] candidates of [65], expected [8]"),
        (Newest(), "left a candidate that scores higher than one it chose"),
        (Newest(), "chose later entries among equal scores"),
        (Oldest(), "chose a candidate whose score is NaN, and left one whose score is a number"),
        (Doubling(), "returned keys that differ from the kept slots"),
    ],
)
def test_other_stages(plugin, message):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(plugin)
    assert message in str(caught.value)


def test_the_check_of_an_attachment_names_the_plugin():
    view = view_of(torch.zeros(1, 8, 511, 4))
    with pytest.raises(PluginContractError) as caught:
        check_scores(Loose(), torch.zeros(1, 8, 512), view)
    expected = "scorer 'loose' returned shape (1, 8, 512), expected (batch=1, kv_heads=8, seq=511)"
    assert str(caught.value).endswith(expected)


def test_a_tile_is_a_tile_or_a_reason():
    """An empty reason would make a plan fuse nothing and say nothing."""
    with pytest.raises(PluginContractError, match="offered '' as its tile, expected a Tile or why there is none"):
        check_plugin(broken(lambda view: norms(view).float(), tile=lambda self: ""))


@attrs.frozen
class Whole(UniformHeads):
    """Lets the rows of a batch share what they may keep."""

    name = "whole"

    def allocate(self, request):
        return super().allocate(attrs.evolve(request, total=request.total.flip(-1)))


@attrs.frozen
class Mixing(HeadAllocator):
    """Gives a layer what it gives the first one."""

    name = "mixing"

    def allocate(self, request):
        return UniformHeads().allocate(request)[:1].expand(request.room.shape)


@attrs.frozen
class Sparing(HeadAllocator):
    """Keeps nothing, also where all would fit."""

    name = "sparing"
    exact = False

    def allocate(self, request):
        return torch.zeros_like(request.room)


@attrs.frozen
class Lavish(Sparing):
    """Keeps everything."""

    name = "lavish"

    def allocate(self, request):
        return request.room


@attrs.frozen
class Even(UniformHeads):
    """Says that it may keep less, and that heads are equally long."""

    name = "even"
    exact = False


@attrs.frozen
class Topmost(JointAllocator):
    """Gives everything to the first head, whatever it can hold."""

    name = "topmost"

    def allocate(self, request):
        counts = torch.zeros_like(request.room)
        counts[0, :, 0] = request.total
        return counts


@pytest.mark.parametrize(
    ("plugin", "check", "message"),
    [
        (Whole(), "keeps rows apart", "for a row alone"),
        (Mixing(), "keeps layers apart", "for a layer alone"),
        (Topmost(), "gives no more than there is", "expected from 0 to"),
        (Sparing(), "spends the whole budget", r"of \[\[.*expected at most"),
        (Lavish(), "spends the whole budget", r"expected at most"),
        (Even(), "keeps less only where lengths are read", "is not exact"),
    ],
)
def test_other_allocators(plugin, check, message):
    with pytest.raises(PluginContractError, match=message):
        dict(conformance_cases(plugin))[check]()
