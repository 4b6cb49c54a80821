"""The conformance suite runs a scorer's tile through the score kernel, and finds what differs from its score."""

import importlib.util
import re

import attrs
import pytest
import torch
from triton.runtime.jit import JITFunction

from kvpolicy.errors import PluginContractError
from kvpolicy.stages import Needs, Postprocess, Scorer, State, Tile, WindowUse
from kvpolicy.stages.conformance import check_plugin, conformance_cases
from kvpolicy_kernels.score import score_kernel
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from tests.unit.stages import tile_functions as functions

EQUAL = "tile gives what score gives"


def norms(view):
    return view.keys.float().square().sum(-1) * 3


def age(view):
    return -3.0 * view.age


def of_head(view):
    own = norms(view).masked_fill(~view.valid, 0.0)
    return own / own.amax(-1, keepdim=True).clamp(min=1e-9)


def votes(view):
    """Of all queries in view, though the scorer has asked for four."""
    seen = view.valid[:, :, None, None] & (
        view.positions[:, :, None, None] <= view.window_positions[:, None, None, :, None]
    )
    return view.logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0).sum((2, 3))


def own_votes(view):
    """Of the four newest queries."""
    return votes(attrs.evolve(view, queries=view.window[:, :, -4:]))


def mean_key(request):
    """What a mean over all slots says, the empty ones included: [P, T] float32."""
    keys = request.keys.storages[0].float()
    return ((keys - keys.mean(2, keepdim=True)) ** 2).sum(-1).flatten(0, 1).contiguous()


def mean_of_held(view):
    """The same of the held entries alone."""
    keys = view.keys.float().masked_fill(~view.valid[..., None], 0.0)
    return ((keys - keys.sum(2, keepdim=True) / view.lengths[..., None, None].clamp(min=1)) ** 2).sum(-1)


def scorer(score, tile, needs=Needs(), **members):  # noqa: B008
    """A scorer whose `score` and `tile` are those given."""
    body = {
        "name": "tiled",
        "score": lambda self, view: score(view),
        "tile": lambda self: tile,
        "needs": lambda self: needs,
        "__module__": __name__,
        **members,
    }
    return attrs.frozen(type("Tiled", (Scorer,), body))()


def check(one):
    """The case about its tile alone."""
    dict(conformance_cases(one))[EQUAL]()


RIGHT = {
    "keys": scorer(norms, Tile(functions.squared, arguments=(3.0,))),
    "window": scorer(own_votes, Tile(functions.of_votes, window=WindowUse(4), keys=False), Needs(queries=4)),
    "softmax": scorer(
        lambda view: (norms(view) / 100).masked_fill(~view.valid, -torch.inf).softmax(-1).nan_to_num(),
        Tile(functions.squared, arguments=(0.03,), postprocess=Postprocess(softmax=True)),
    ),
}


@pytest.mark.parametrize("one", RIGHT.values(), ids=RIGHT)
def test_a_right_tile_passes(one):
    check(one)


WRONG = {
    "wrong sign": (scorer(norms, Tile(functions.wrong_sign, arguments=(3.0,))), "for equal, padded"),
    "forgets its argument": (scorer(norms, Tile(functions.unscaled, arguments=(3.0,))), "for equal, padded"),
    "reads another argument": (
        scorer(norms, Tile(functions.of_values, arguments=(3.0,), values=True)),
        "for equal, padded and ragged heads",
    ),
    "reads what it has not asked for": (scorer(norms, Tile(functions.of_values, arguments=(3.0,))), "raised"),
    "right for heads that are not ragged": (
        scorer(age, Tile(functions.counts_from_newest, arguments=(3.0,), keys=False, newest=True)),
        "row 2, head 1",
    ),
    "ignores which slots are empty": (
        scorer(mean_of_held, Tile(functions.from_column, keys=False, column=mean_key)),
        "for equal, padded and ragged heads (row 1",
    ),
    "right within one tile": (scorer(of_head, Tile(functions.over_tile)), "for more entries than a tile"),
    "no numbers": (scorer(norms, Tile(functions.nan)), "scores that are NaN by its tile"),
    "score reads older queries": (
        scorer(votes, Tile(functions.of_votes, window=WindowUse(4), keys=False), Needs(queries=4)),
        "with votes and older queries",
    ),
    "window that is not observed": (
        scorer(norms, Tile(functions.of_votes, window=WindowUse(4))),
        "this view has no queries",
    ),
    "scale that only a policy gives": (
        scorer(
            lambda view: (
                norms(view) / norms(view).masked_fill(~view.candidates, 0.0).amax(-1, keepdim=True).clamp(min=1)
            ),
            Tile(functions.squared, arguments=(3.0,), postprocess=Postprocess(normalise="max")),
        ),
        "by its tile",
    ),
    "state": (
        scorer(
            lambda view: norms(view) + view.slot_state["mine"],
            Tile(functions.squared, arguments=(3.0,)),
            slot_state=lambda self: (State("mine"),),
        ),
        "by its tile",
    ),
    "layer": (
        scorer(lambda view: norms(view) * (1 + view.layer), Tile(functions.squared, arguments=(3.0,))),
        "for more entries than a tile",
    ),
    "what kernels refuse": (
        scorer(norms, Tile(functions.squared, arguments=(3.0,), postprocess=Postprocess(pool="max", size=2))),
        "offered a tile that kernels refuse: a pool of 2",
    ),
}


@pytest.mark.parametrize(("one", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_tile_is_found_out(one, message):
    with pytest.raises(PluginContractError, match=re.escape(message)) as caught:
        check(one)
    assert "scorer 'tiled'" in str(caught.value)


def test_the_message_tells_scores_and_tolerance():
    where = r"\(row \d, head \d, slot \d+\), expected a difference of at most"
    with pytest.raises(PluginContractError, match=rf"gives -[\d.]+ by its tile, [\d.]+ by `score` .*{where}"):
        check(WRONG["wrong sign"][0])


def test_a_score_that_is_small_beside_another_part_is_seen():
    """The tolerance follows how far scores are apart, not only how large they are."""
    with pytest.raises(PluginContractError, match="by its tile"):
        check(scorer(lambda view: 1e-2 * norms(view) + 100, Tile(functions.squared, arguments=(0.03 * 1.01,))))


@attrs.frozen
class Plain(Scorer):
    name = "plain"

    def score(self, view):
        return norms(view)


def test_a_scorer_without_a_tile_has_nothing_to_compare():
    assert not [name for name, _ in conformance_cases(Plain()) if "compared" in name or name == EQUAL]
    check(scorer(norms, "has its reasons"))
    check_plugin(Plain())


def names(one):
    """The cases that are about tile and score."""
    return [name for name, _ in conformance_cases(one) if name.startswith("tile ")]


@pytest.mark.parametrize(
    ("interpret", "reason"),
    [("0", "no GPU, and TRITON_INTERPRET=1 is not set"), ("1", "TRITON_INTERPRET=1 was set after Triton was imported")],
)
def test_where_no_tile_runs_the_name_of_a_case_says_why(interpret, reason, monkeypatch):
    """Nothing fails then, and nothing passes under the name of what was not done."""
    KeyNorm().tile()  # whether a tile function is interpreted is decided for good where it is imported first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(score_kernel, "score", JITFunction(own_votes))  # what is not interpreted
    assert names(WRONG["wrong sign"][0]) == [f"tile is not compared with score: {reason}"]
    check_plugin(KeyNorm())


@attrs.frozen
class Lacking(Plain):
    """Its tile function is in a module that imports what is not there."""

    module: str

    def tile(self):
        raise ModuleNotFoundError(f"No module named '{self.module}'", name=self.module)


def test_without_triton_a_scorer_need_not_give_its_tile(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert names(Lacking("triton")) == ["tile is not compared with score: Triton is not installed"]
    dict(conformance_cases(Lacking("triton")))["offers a tile or a reason"]()


def test_another_module_that_a_tile_lacks_is_a_fault():
    with pytest.raises(PluginContractError, match="raised ModuleNotFoundError: No module named 'mine'"):
        dict(conformance_cases(Lacking("mine")))["offers a tile or a reason"]()
