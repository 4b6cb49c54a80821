"""Retention: what layers hold, which tokens matter; and that the pictures are drawn."""

from fractions import Fraction

import pytest
import torch
from kvpolicy.evaluate.answers import answer
from kvpolicy.evaluate.compare import compare
from kvpolicy.evaluate.fit import fit
from kvpolicy.evaluate.setup import Setup
from kvpolicy.evaluate.tradeoff import plot_tradeoff

from kvpolicy.evaluate.report.heatmap import plot_retention
from kvpolicy.evaluate.report.plots import can_plot
from kvpolicy.evaluate.report.retention import held_tokens, retention, tokens_that_matter
from kvpolicy.evaluate.testbed import Item

SHARE = Fraction(1, 4)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def kept(tiny, policies):
    return retention(*tiny, policies, share=SHARE, seed=2)


def test_held_tokens_add_up_to_what_the_store_holds(tiny, policies):
    """The fractions of a layer's row, times the heads, are its entries."""
    model, tokenizer = tiny
    item = Item("recall", "note falcon gold . " + "the child walks . " * 30, "ask falcon", "gold", "gold", 4)
    fitted = fit(policies[0], model, length=130, share=SHARE)
    _, cache = answer(model, tokenizer, [item], fitted)
    held = held_tokens(cache, 1000)

    assert (held * 2).sum(1).tolist() == [sum(layer.storage.slots.lengths[0]) for layer in cache.managed]


def test_streaming_keeps_both_ends(kept):
    """Sinks at the start, a recent window at the end, nothing between: in every layer and head."""
    streaming = kept.by_policy[1]
    sinks = streaming.policy.spec.protect.sinks
    row = streaming.held[0]
    held = row.nonzero()[:, 0].tolist()

    assert torch.equal(streaming.held, row.expand_as(streaming.held))
    assert set(row.unique().tolist()) == {0.0, 1.0}
    assert held[:sinks] == list(range(sinks))
    assert held[sinks:] == list(range(held[sinks], len(kept.tokens)))


def test_tokens_that_matter_are_question_and_its_facts():
    """A fact matters when its name is in the question or the target; fillers and other facts do not."""
    item = Item(
        "tracking", "set falcon gold . the gold sings . set oak jade . set maple falcon .", "ask maple", "", "", 4
    )
    item = Item(item.task, item.context, item.question, "falcon gold", "gold", 4)
    tokens = ("<bos>", *item.prompt.split())
    marked = [token for token, matters in zip(tokens, tokens_that_matter(item, tokens), strict=True) if matters]

    assert " ".join(marked) == "set falcon gold . set maple falcon . ask maple"


@pytest.mark.skipif(not can_plot(), reason="needs kvpolicy[plots]")
@pytest.mark.filterwarnings("error")
def test_pictures_are_drawn(tiny, policies, kept, tmp_path):
    """Both files are PNGs of a size that a page can carry, and drawing them warns of nothing."""
    setup = Setup(policies, (SHARE, Fraction(1, 2)), tasks=("recall", "tracking"), items=1, length=128)
    plot_tradeoff(setup, compare(*tiny, setup), tmp_path / "tradeoff.png")
    plot_retention(kept, tmp_path / "retention.png")

    for file in tmp_path.iterdir():
        assert file.read_bytes().startswith(PNG)
        assert file.stat().st_size < 300_000
