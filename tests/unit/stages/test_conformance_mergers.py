"""The conformance suite finds what is wrong with a merger."""

import attrs
import pytest
import torch

from kvpolicy.errors import PluginContractError
from kvpolicy.stages import (
    Entries,
    Merger,
    Needs,
    State,
)
from kvpolicy.stages.conformance import check_plugin, conformance_cases
from kvpolicy.stages.slots import gather


def gathered(view, kept, **parts):
    """What `drop` returns, with other parts."""
    return Entries(**{"keys": gather(view.keys, kept), "values": gather(view.values, kept), **parts})


def broken_merger(merge, **members):
    """A merger whose `merge` is the function given."""
    states = {"slot_state": lambda self: (State("mine"),), "row_state": lambda self: (State("ours"),)}
    body = {"name": "broken", "merge": lambda self, view, kept: merge(view, kept), "__module__": __name__}
    return attrs.frozen(type("BrokenMerger", (Merger,), {**states, **body, **members}))()


def averaged(view, kept, **parts):
    """The mean over all slots, in place of every kept entry."""
    keys = view.keys.mean(2, keepdim=True).expand(*kept.shape, -1).contiguous()
    return gathered(view, kept, keys=keys, **parts)


def writing_back(view, kept):
    view.keys.mul_(2)
    return gathered(view, kept)


def zeros_of(kept, **options):
    return torch.zeros(kept.shape, **options)


VOTING = {"votes": True}
FOLLOWING = {"needs": lambda self: Needs(forward_queries=2)}
MERGERS = {
    "returned shape (3, 2, 0, 16), expected (batch=3, kv_heads=2, kept=": (
        lambda view, kept: gathered(view, kept[..., :0]),
        {},
    ),
    "returned torch.float32, expected torch.bfloat16": (
        lambda view, kept: gathered(view, kept, values=gathered(view, kept).values.float()),
        {},
    ),
    "returned entries that are not finite": (
        lambda view, kept: averaged(view, kept, values=view.values[:, :, : kept.shape[-1]] / 0),
        {},
    ),
    "returned NoneType, expected a tensor": (gathered, VOTING),
    "returned log-votes, expected `votes` to be True": (
        lambda view, kept: gathered(view, kept, log_votes=zeros_of(kept)),
        {},
    ),
    "returned log-votes that are not finite": (
        lambda view, kept: gathered(view, kept, log_votes=zeros_of(kept).log()),
        VOTING,
    ),
    "for votes of kept slots": (lambda view, kept: gathered(view, kept, log_votes=zeros_of(kept)), VOTING),
    "returned torch.int64, expected torch.bool": (lambda view, kept: gathered(view, kept, changed=kept), {}),
    "returned keys that are not marked in `changed`, but differ from the kept slots": (
        lambda view, kept: averaged(view, kept, changed=zeros_of(kept, dtype=torch.bool)),
        {},
    ),
    "returned slot state ['theirs'], expected only ['mine']": (
        lambda view, kept: gathered(view, kept, slot_state={"theirs": zeros_of(kept)}),
        {},
    ),
    "returned row state ['mine'], expected only ['ours']": (
        lambda view, kept: gathered(view, kept, row_state={"mine": torch.zeros(len(kept))}),
        {},
    ),
    "returned shape (1,), expected (batch=3": (
        lambda view, kept: gathered(view, kept, row_state={"ours": torch.zeros(1)}),
        {},
    ),
    "returned state that are not finite": (
        lambda view, kept: gathered(view, kept, slot_state={"mine": zeros_of(kept) / 0}),
        {},
    ),
    "for row 0 alone": (
        lambda view, kept: gathered(view, kept, row_state={"ours": kept.sum().float().expand(len(kept)).clone()}),
        {},
    ),
    "when the contents of empty slots differ": (lambda view, kept: averaged(view, kept, changed=kept >= 0), {}),
    "gave other entries the second time": (
        lambda view, kept: gathered(view, kept, slot_state={"mine": torch.rand(kept.shape)}),
        {},
    ),
    "changed its input 'keys'": (writing_back, {}),
    "returned log_votes in the memory of its input": (
        lambda view, kept: gathered(view, kept, log_votes=view.log_votes[..., : kept.shape[-1]]),
        VOTING,
    ),
    "declares slot state of the same name twice": (
        gathered,
        {"slot_state": lambda self: (State("mine"), State("mine"))},
    ),
    "observed a forward and returned ['theirs'], expected only ['mine']": (
        gathered,
        {**FOLLOWING, "observe_forward": lambda self, query_logits, state: {"theirs": state["mine"]}},
    ),
    "observed a forward and returned NaN in 'mine'": (
        gathered,
        {**FOLLOWING, "observe_forward": lambda self, query_logits, state: {"mine": state["mine"] * torch.nan}},
    ),
    "changed its input 'mine'": (
        gathered,
        {**FOLLOWING, "observe_forward": lambda self, query_logits, state: {"mine": state["mine"].add_(1)}},
    ),
    "raised ValueError: this view has no queries": (lambda view, kept: gathered(view, kept, keys=view.logits), {}),
}


@pytest.mark.parametrize(("message", "broken"), MERGERS.items(), ids=MERGERS)
def test_a_broken_merger_is_found_out(message, broken):
    merge, members = broken
    with pytest.raises(PluginContractError) as caught:
        check_plugin(broken_merger(merge, **members))
    assert message in str(caught.value)
    assert "merger 'broken'" in str(caught.value)


def test_a_merger_is_shown_what_it_asked_for():
    shown = []

    def look(view, kept):
        shown.append(view)
        return gathered(view, kept, log_votes=gather(view.log_votes, kept))

    members = {
        **VOTING,
        "reads_window": True,
        "needs": lambda self: Needs(attention=True, forward_queries=2),
        "observe_forward": lambda self, query_logits, state: {"mine": query_logits.logits[:, :, 0].exp().sum(2)},
    }
    for _, check in conformance_cases(broken_merger(look, **members))[3:]:  # those of the stage
        check()
    for view in shown:
        assert view.queries is not None
        assert view.attention is not None
        assert view.log_votes is not None
        assert view.row_state["ours"].shape == view.positions.shape[:1]
    assert any(view.slot_state["mine"].any() for view in shown)
    assert any(not view.slot_state["mine"].any() for view in shown)
