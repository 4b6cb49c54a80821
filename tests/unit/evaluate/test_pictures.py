"""Retention: what layers hold, which tokens matter; and that the pictures are drawn."""

from fractions import Fraction

import pytest
import torch

import kvpolicy
from kvpolicy.evaluate.fitting.fit import fit
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.harness.setup import FULL
from kvpolicy.evaluate.report.heatmap import plot_retention
from kvpolicy.evaluate.report.pictures import plot_tradeoff
from kvpolicy.evaluate.report.plots import can_plot
from kvpolicy.evaluate.report.retention import held_tokens, retention, tokens_that_matter
from kvpolicy.evaluate.tasks.case import Sources
from kvpolicy.evaluate.tasks.generated import Generated
from kvpolicy.evaluate.testbed import Item, make_item
from tests.support.evaluation_records import cell, record_of, two_tasks
from tests.support.policies import held

SHARE = Fraction(1, 4)
PNG = b"\x89PNG"
drawn = pytest.mark.skipif(not can_plot(), reason="needs kvpolicy[plots]")


@pytest.fixture(scope="module")
def kept(tiny, policies):
    made = Calibrations(tiny[0], lambda: torch.ones(1, 8, dtype=torch.long))
    return retention(*tiny, policies, made, share=SHARE, seed=2)


def test_held_tokens_are_the_positions_that_the_cache_holds(tiny, policies):
    """The fractions of a layer's row, times the heads; later tokens are left out."""
    model, tokenizer = tiny
    item = Item("recall", "note falcon gold . " + "the child walks . " * 30, "ask falcon", "gold", "gold", 4)
    case = Generated("recall", "").case(Sources(tokenizer, ()), item)
    run = GroupRun(model, tokenizer, [case], step=1)
    plan = fit(policies[0], model, length=130, share=SHARE).compile(model)
    with policies[0].attach(model) as attachment:
        _, (cache,) = run.caches_under(plan, attachment)
    found = held(cache)

    for length in (1000, 60):
        for row, (heads,) in zip(held_tokens(cache, length), found, strict=True):
            counts = [sum(place in positions for positions in heads) for place in range(length)]
            assert (row * 2).tolist() == counts


def test_the_item_is_the_first_whose_answer_stands_early(kept, tiny):
    """All that matters but the question is in the first half; tokens are those of the prompt."""
    matters = [place for place, one in enumerate(kept.matter) if one]
    asked = len(kept.item.question.split())

    assert kept.tokens == ("<bos>", *kept.item.prompt.split())
    assert matters[-asked:] == list(range(len(kept.tokens) - asked, len(kept.tokens)))
    assert matters[:-asked]
    assert matters[-asked - 1] < len(kept.tokens) // 2
    assert kept.item in [make_item("recall", 2, index, 128) for index in range(20)]


def test_policies_are_fitted_to_the_share(kept, policies, tiny):
    assert [one.policy.name for one in kept.by_policy] == [policy.name for policy in policies]
    for one in kept.by_policy:
        assert one.share == SHARE
        assert one.held.shape == (2, len(kept.tokens))
        assert one.held.mean() < 0.35
        assert one.right == (one.text.split() == kept.item.target.split())


def test_policies_that_cannot_be_used_are_left_out(tiny, policies):
    """The others are shown all the same."""
    wide = kvpolicy.load("kivi2")  # heads of the model are narrower than its groups
    made = Calibrations(tiny[0], lambda: torch.ones(1, 8, dtype=torch.long))

    assert [one.policy.name for one in retention(*tiny, [wide, policies[1]], made, share=SHARE).by_policy] == [
        policies[1].name
    ]


def test_streaming_keeps_both_ends(kept):
    """Sinks at the start, a recent window at the end, nothing between: in every layer and head."""
    streaming = kept.by_policy[1]
    sinks = streaming.policy.spec.protect.sinks
    row = streaming.held[0]
    places = row.nonzero()[:, 0].tolist()

    assert torch.equal(streaming.held, row.expand_as(streaming.held))
    assert set(row.unique().tolist()) == {0.0, 1.0}
    assert places[:sinks] == list(range(sinks))
    assert places[sinks:] == list(range(places[sinks], len(kept.tokens)))


def test_tokens_that_matter_are_question_and_its_facts():
    """A fact matters when its name is in the question or the target; fillers and other facts do not."""
    context = "set falcon gold . the gold sings . set oak jade . set maple falcon ."
    item = Item("tracking", context, "ask maple", "falcon gold", "gold", 4)
    tokens = ("<bos>", *item.prompt.split())
    marked = [token for token, matters in zip(tokens, tokens_that_matter(item, tokens), strict=True) if matters]

    assert " ".join(marked) == "set falcon gold . set maple falcon . ask maple"


# -- drawing ---------------------------------------------------------------------------------------------------


def assert_png(file):
    assert file.read_bytes().startswith(PNG)
    assert 5_000 < file.stat().st_size < 400_000


@drawn
@pytest.mark.filterwarnings("error")
def test_what_is_kept_is_drawn(kept, tmp_path):
    plot_retention(kept, tmp_path / "retention.png")

    assert_png(tmp_path / "retention.png")


def many_policies():
    """More than there are colours, on one task."""
    cells = [cell("text", 0, f"policy {n}", share, kl=[n + share]) for n in range(1, 21) for share in (0.25, 0.125)]
    return record_of(cell("text", 0, FULL, None, kl=[0.0]), *cells)


RECORDS = {
    "two tasks": two_tasks,
    "many policies": many_policies,
    "a policy that differs in nothing": lambda: record_of(
        *(cell("text", 0, name, share, kl=[0.0]) for name, share in ((FULL, None), ("a", 0.25), ("a", 0.5)))
    ),
    "the full cache alone": lambda: record_of(cell("needle", 0, FULL, None, correct=[1.0])),
    "nothing that was measured": lambda: record_of(cell("needle", 0, "a", 0.25, refusal="no")),
    "no cell": record_of,
}


@drawn
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_quality_against_bytes_is_drawn(record, tmp_path):
    """Of every record, without a warning."""
    plot_tradeoff(record(), tmp_path / "tradeoff.png")

    assert_png(tmp_path / "tradeoff.png")
