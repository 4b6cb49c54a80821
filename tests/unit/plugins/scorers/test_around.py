"""Scorers that change the scores of another one."""

import inspect

import attrs
import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Scorer
from kvpolicy.stages.contracts import Observer, Plugin, ViewPlugin
from kvpolicy_plugins.scorers.by_region import ByRegion
from kvpolicy_plugins.scorers.recency import Recency
from kvpolicy_plugins.scorers.shared.around import ScorerAround
from tests.support.views import view_of

OWN = {"score", "tile"}  # what the scorer around another one is there for


def test_all_that_a_scorer_can_do_is_asked_of_the_one_inside():
    methods = {
        name
        for kind in (Scorer, Observer, ViewPlugin, Plugin)
        for name, member in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }
    assert len(methods) > 10
    assert methods - OWN <= vars(ScorerAround).keys()


@attrs.frozen
class Given(Scorer):
    """Scores that were thought up."""

    name = "given"
    scores: tuple[float, ...] = ()

    def score(self, view):
        return torch.tensor(self.scores).expand(view.positions.shape)


def view(regions, names=("other", "tools"), **options):
    regions = None if regions is None else torch.tensor(regions, dtype=torch.int8).expand(1, 1, -1)
    return attrs.evolve(view_of(torch.zeros(1, 1, 6, 4), **options), regions=regions, region_names=names)


def test_a_share_of_what_is_above_the_lowest_stays():
    scores = (5.0, -3.0, 1.0, 1.0, 4.0, 2.0)
    lowered = ByRegion(Given(scores), "tools", share=0.5).score(view([2, 2, 1, 2, 0, 0]))
    assert lowered.flatten().tolist() == [1.0, -3.0, 1.0, -1.0, 4.0, 2.0]


def test_half_is_left_of_what_is_as_many_tokens_old_as_the_half_life():
    lowered = ByRegion(Given((8.0, 8.0, 8.0, 0.0, 8.0, 8.0)), "tools", half_life=2).score(view([2, 2, 0, 2, 2, 2]))
    expected = [8 * 2**-2.5, 8 * 2**-2.0, 8.0, 0.0, 8 * 2**-0.5, 8.0]
    torch.testing.assert_close(lowered.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(("newest", "left"), [(0, (0, 0)), (1, (0, 1)), (2, (1, 1)), (9, (1, 1))])
def test_the_newest_spans_keep_their_scores(newest, left):
    """Of the two that have begun: a third one, from position 9 on, was named before it came."""
    shown = attrs.evolve(
        view([2, 2, 1, 2, 2, 0]), region_spans=torch.tensor([[[2, 0], [1, 2], [2, 3], [2, 9]]], dtype=torch.int32)
    )
    lowered = ByRegion(Given((5.0, 5.0, 5.0, 5.0, 5.0, 0.0)), "tools", share=0, newest=newest).score(shown)
    first, second = (5.0 * stays for stays in left)
    assert lowered.flatten().tolist() == [first, first, 5.0, second, second, 0.0]


def test_what_is_not_finite_stays_and_lowers_nothing():
    scores = (torch.inf, -torch.inf, torch.nan, 2.0, 4.0, 6.0)
    lowered = ByRegion(Given(scores), "tools", share=0).score(view([2] * 6))
    torch.testing.assert_close(lowered.flatten(), torch.tensor([*scores[:3], 2.0, 2.0, 2.0]), equal_nan=True)


def test_protected_entries_are_not_the_lowest():
    lowered = ByRegion(Given((0.0, 3.0, 5.0, 7.0, 1.0, 0.5)), "tools", share=0).score(view([2] * 6, sinks=1, recent=2))
    assert lowered.flatten()[1:4].tolist() == [3.0] * 3


@pytest.mark.parametrize("regions", [None, [1] * 6])
def test_where_the_request_has_no_such_region_nothing_changes(regions):
    scores = (5.0, -3.0, 1.0, 1.0, 4.0, 2.0)
    names = () if regions is None else ("other",)
    assert ByRegion(Given(scores), "tools", share=0).score(view(regions, names)).flatten().tolist() == list(scores)


def test_a_region_has_a_name():
    with pytest.raises(ParameterError, match=r"^region: must be a line of text, 1 to 64 characters: ''$"):
        ByRegion(Recency(), "")
