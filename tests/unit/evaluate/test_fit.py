"""Fitted policies keep their recipe and never take more bytes than their share."""

from fractions import Fraction

import attrs
import pytest
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.fit import fit, fit_tokens, keeps_everything
from kvpolicy.evaluate.shrink import reading, reads

import kvpolicy
import kvpolicy.spec.load
from kvpolicy.errors import EvaluationError
from kvpolicy.plan.explain import explain

SHIPPED = ["adakv", "blend", "gkv", "h2o", "pyramidkv", "rkv", "snapkv", "streaming_llm", "tova"]


@pytest.mark.parametrize("share", [Fraction(1, 10), Fraction(1, 4), Fraction(1, 2)])
@pytest.mark.parametrize("name", SHIPPED)
def test_bytes_stay_within_the_share_and_use_it_up(tiny, name, share):
    """At capacity, slack included, the share is not exceeded, and one more token everywhere would exceed it."""
    model, _ = tiny
    fitted = fit(kvpolicy.load(name), model, length=1024, share=share)
    plan = fitted.compile(model)
    limit, held = plan.footprint.full_bytes(1024) * share, explain(plan, 1024).held_bytes
    one_more = plan.footprint.entry_bytes * plan.geometry.layers * plan.geometry.kv_heads

    assert held <= limit < held + one_more


@pytest.mark.parametrize("name", SHIPPED)
def test_only_sizes_change(tiny, name):
    """Plugins, weights and every other parameter stay as shipped."""
    model, _ = tiny
    shipped = kvpolicy.load(name)
    fitted = fit(shipped, model, length=1024, share=Fraction(1, 10))
    kinds = [(type(one.scorer), one.weight, one.normalise) for one in fitted.spec.score]

    assert kinds == [(type(one.scorer), one.weight, one.normalise) for one in shipped.spec.score]
    assert fitted.spec.allocate == shipped.spec.allocate
    assert fitted.spec.compress.prefill == shipped.spec.compress.prefill
    assert fitted.spec.compress.every == min(shipped.spec.compress.every, 12)
    assert fitted.digest != shipped.digest


def test_windows_are_scaled(tiny):
    """A quarter of the budget is recent at most; shares of the budget stay what they are."""
    model, _ = tiny
    sizes = {"length": 1024, "share": Fraction(1, 10)}
    snapkv, h2o, streaming = (fit(kvpolicy.load(name), model, **sizes) for name in ("snapkv", "h2o", "streaming_llm"))

    assert snapkv.spec.protect.recent == snapkv.spec.budget.tokens // 4
    assert snapkv.spec.score[0].scorer.queries == snapkv.spec.budget.tokens // 12
    assert h2o.spec.protect == kvpolicy.load("h2o").spec.protect
    assert h2o.spec.protect.of(h2o.spec.budget.tokens) == (0, h2o.spec.budget.tokens // 2)
    assert streaming.spec.protect.of(streaming.spec.budget.tokens) == (4, streaming.spec.budget.tokens - 4)


def test_scorers_inside_scorers_are_scaled_too(tiny):
    """The window of a scorer that another one is built on."""
    model, _ = tiny
    fitted = fit(kvpolicy.load("gkv"), model, length=200, share=Fraction(1, 4))

    assert attrs.asdict(fitted.spec.score[0].scorer)["of"]["queries"] == 4


def test_no_room_is_an_error(tiny):
    """A share that holds not one entry beside the slack."""
    model, _ = tiny
    with pytest.raises(EvaluationError, match="snapkv: 1% of 100 tokens leaves no room"):
        fit(kvpolicy.load("snapkv"), model, length=100, share=Fraction(1, 100))


@pytest.fixture(scope="module")
def calibrations(tiny):
    return Calibrations(tiny[0], sequences=3, length=64)


def fitted(tiny, calibrations, text, **sizes):
    sizes = {"length": 1024, "share": Fraction(1, 4), **sizes}
    return fit(policy_of(text), tiny[0], calibrations=calibrations, **sizes).spec


def policy_of(text):
    head = "kvpolicy: 1\nname: one\n"
    score = "" if "score:" in text else "score: [{use: recency}]\n"
    return kvpolicy.policy.Policy(kvpolicy.spec.load.parse_policy(head + score + text, "one"))


def test_packed_entries_are_more_and_stay_within_the_share(tiny, calibrations):
    """Four bits hold more tokens than sixteen in the same bytes, the unpacked ones counted."""
    store = "store: {use: kivi, bits: 4, group: 8, residual: 128}\n"
    plain, packed = (fitted(tiny, calibrations, f"budget: 512\n{text}") for text in ("", store))
    plan = kvpolicy.policy.Policy(packed).compile(tiny[0])
    slack = packed.compress.every
    limit = plan.footprint.full_bytes(1024) // 4

    assert packed.budget.tokens > 2 * plain.budget.tokens
    assert (
        plan.footprint.nbytes(packed.budget.tokens + slack)
        <= limit
        < plan.footprint.nbytes(packed.budget.tokens + slack + 8)
    )


@pytest.mark.parametrize(
    ("store", "share", "residual"),
    [
        ("{use: kivi, group: 8, residual: 128}", Fraction(1, 4), 32),
        ("{use: kivi, group: 8, residual: 128}", Fraction(1, 10), 8),
        ("{use: kivi, group: 8, residual: 128}", Fraction(1, 32), 8),
        ("{use: kivi, group: 8, residual: 16}", Fraction(1, 4), 16),
        ("{use: fp8, residual: 100}", Fraction(1, 4), 32),
        ("{use: fp8}", Fraction(1, 4), 0),
    ],
)
def test_stores_leave_an_eighth_unpacked(tiny, calibrations, store, share, residual):
    """Of the share's tokens, in whole groups, at least one; never more than shipped."""
    spec = fitted(tiny, calibrations, f"budget: 512\nstore: {store}\n", share=share)

    assert spec.store.residual == residual


def test_windows_of_mergers_are_scaled_like_those_of_scorers(tiny, calibrations):
    """A twelfth of the budget; 0 stands for all that is observed."""
    score = "score: [{use: attention, queries: 32}]\n"
    spec = fitted(tiny, calibrations, f"budget: 512\n{score}merge: {{use: keepkv, window: 32}}\n", share=Fraction(1, 8))
    other = fitted(tiny, calibrations, f"budget: 512\n{score}merge: window_fit\n")

    assert spec.merge.window == spec.score[0].scorer.queries == spec.budget.tokens // 12
    assert other.merge.queries == 0


def test_a_policy_that_keeps_everything_still_does(tiny, calibrations):
    """Its share changes nothing but what its reader reads."""
    whole = "budget: 100%\ncompress: {prefill: false, every: never}\n"
    spec = fitted(tiny, calibrations, f"{whole}store: {{use: kivi, group: 8, residual: 128}}\n", length=512)

    assert keeps_everything(spec)
    assert spec.store.residual == 64
    assert spec.compress == policy_of(whole).spec.compress


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(1, 16)])
@pytest.mark.parametrize("reader", ["{use: pages, page: 16}", "{use: latent_topk}"])
def test_readers_read_the_share(tiny, calibrations, reader, share):
    """Of the entries; and no layer of a shallow model reads everything."""
    store = "store: latent\n" if "latent" in reader else ""
    spec = fitted(tiny, calibrations, f"budget: 100%\nread: {reader}\n{store}", share=share)

    assert reads(spec.read) == 1024 * share
    assert spec.read.dense_first == 0
    assert keeps_everything(spec)


def test_readers_of_evicting_policies_keep_their_part(tiny, calibrations):
    """Half of the budget is read, as shipped."""
    spec = fitted(tiny, calibrations, "budget: 1024\nread: {use: pages, budget: 512, page: 4}\n")

    assert reads(spec.read) == 512 * spec.budget.tokens // 1024


def test_dense_layers_are_an_eighth_at_most():
    """A deep model keeps those that its authors leave dense; a page is never split."""
    reader = policy_of("budget: 100%\nread: {use: pages, dense_first: 2, page: 16}\n").spec.read

    assert [reading(reader, 256, layers).dense_first for layers in (4, 8, 32)] == [0, 1, 2]
    assert reading(reader, 3, 4).budget == 16


def test_a_share_of_the_tokens_is_the_budget(tiny):
    """Where time is measured: whatever the bytes, with compressions as rare as shipped."""
    sizes = {"length": 4096, "share": Fraction(1, 8), "most_every": 128}
    specs = [fit_tokens(kvpolicy.load(name), tiny[0], **sizes).spec for name in ("snapkv", "h2o", "gkv")]
    quest = fit_tokens(kvpolicy.load("quest"), tiny[0], **sizes).spec

    assert [spec.budget.tokens for spec in specs] == [512] * 3
    assert [spec.compress.every for spec in specs] == [64, 1, 64]
    assert specs[1].protect.of(512) == (0, 256)
    assert keeps_everything(quest)
    assert reads(quest.read) == 512
