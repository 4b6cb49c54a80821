"""Fitted policies keep their recipe and never take more bytes than their share."""

from fractions import Fraction
from functools import cache

import attrs
import pytest
import torch

import kvpolicy
import kvpolicy.spec.load
from kvpolicy.errors import CalibrationError, EvaluationError, ParameterError
from kvpolicy.evaluate.fitting.fit import fit_calibrated, keeps_everything, share_of
from kvpolicy.evaluate.fitting.sizes import reading, reads
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.traced_prompts import trace_prompts
from kvpolicy.spec.policy import NEVER
from kvpolicy.stages.registry.plugins import registry
from kvpolicy_plugins.codecs.tada import Tada
from tests.support.models import build, prompt

LENGTH = 1024
SHARES = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 10))
SPECS = {name: kvpolicy.load(name).spec for name in registry().policies()}
WHOLE = [name for name, spec in SPECS.items() if keeps_everything(spec)]
DECODING = [name for name, spec in SPECS.items() if not spec.compress.prefill]
EVICTING = [name for name in SPECS if name not in WHOLE + DECODING]


@cache
def model_of(dtype):
    """Heads wide enough for every shipped store."""
    return build(num_hidden_layers=2, head_dim=32, max_position_embeddings=2048, dtype=dtype)


@pytest.fixture(scope="module")
def wide():
    return model_of(torch.float32)


@pytest.fixture(scope="module")
def traced(wide):
    """A prompt that leaves some tokens of the length to be decoded."""
    return trace_prompts(wide, [prompt(LENGTH - 40)[0][0].tolist()])


def fitted_to(model, name, **sizes):
    """A shipped policy scaled to a share, and what it is calibrated with, if it must be."""
    calibrations = Calibrations(model, lambda: prompt(64, 64, seed=7)[0])
    fitted = kvpolicy.fit(kvpolicy.load(name), model, calibration=calibrations.of, **sizes)
    return fitted, calibrations.of(fitted)


def slack(spec):
    """Entries that may come on top of the budget before some are evicted."""
    return 0 if spec.compress.every == NEVER else spec.compress.every


def total(footprint, entries):
    """Bytes of one sequence with so many entries, by the plan's own formula."""
    return footprint.nbytes(entries) + footprint.window_bytes + footprint.state_bytes


def full_bytes(model, length):
    """Bytes of a full cache, from the shapes of its keys and values."""
    config = model.config
    return length * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", EVICTING)
def test_bytes_stay_within_the_share_and_use_it_up(name, share, dtype):
    """Slack, queries and state included; one more token everywhere, or unpacked group, would exceed the share."""
    model = model_of(dtype)
    fitted, calibration = fitted_to(model, name, length=LENGTH, share=share)
    plan = fitted.compile(model, calibration=calibration)
    limit, tokens = full_bytes(model, LENGTH) * share, fitted.spec.budget.tokens

    if tokens < LENGTH:
        most = tokens + slack(plan.spec)
        assert max(total(plan.footprint, entries) for entries in range(1, most + 1)) <= limit
        assert total(plan.footprint, most + 1) > limit
        return
    assert tokens == LENGTH
    most = LENGTH + slack(plan.spec)
    assert max(total(plan.footprint, entries) for entries in range(1, most + 1)) <= limit
    store = fitted.spec.store
    more = attrs.evolve(store, residual=store.residual + (getattr(store, "group", 0) or 1))
    other = attrs.evolve(fitted, spec=attrs.evolve(fitted.spec, store=more)).compile(model, calibration=calibration)
    assert store.residual >= LENGTH or total(other.footprint, most) > limit


@pytest.mark.parametrize("name", EVICTING)
def test_a_real_cache_never_takes_more_than_the_share(wide, traced, name):
    """From the end of the prompt on, after each of the tokens up to the length, if these are compressed too."""
    share = Fraction(1, 10)
    fitted, calibration = fitted_to(wide, name, length=LENGTH, share=share)
    plan = fitted.compile(wide, calibration=calibration)
    taken = []
    with kvpolicy.load("full").attach(wide) as attachment, torch.inference_mode():
        made = traced.compressed(plan, attachment)
        for step in range(slack(plan.spec) + 2 if plan.compresses_while_decoding else 1):
            made.count()
            taken.append(sum(layer.nbytes for layer in made.stats))
            wide(torch.tensor([[5 + step]]), past_key_values=made)

    limit = full_bytes(wide, LENGTH) * share
    assert max(taken) <= limit
    assert max(taken) > 0.95 * limit


PACKED = [name for name in EVICTING if SPECS[name].store.name not in ("plain", "latent")]


@pytest.mark.parametrize("name", PACKED)
def test_a_cache_that_has_room_for_all_tokens_grows_within_the_share(wide, name):
    """Storage grows ahead of entries, but not beyond what was promised, whether a budget is of all layers or not."""
    fitted, calibration = fitted_to(wide, name, length=LENGTH, share=Fraction(3, 5))
    taken = []
    with fitted.attach(wide, calibration=calibration) as attachment, torch.inference_mode():
        made = attachment.cache()
        for tokens in prompt(LENGTH)[0].split([97, *([23] * 40), LENGTH - 97 - 23 * 40], dim=1):
            wide(tokens, past_key_values=made, logits_to_keep=1)
            made.count()
            taken.append(sum(layer.nbytes for layer in made.stats))
    assert fitted.spec.budget.tokens == LENGTH
    assert max(taken) <= full_bytes(wide, LENGTH) * Fraction(3, 5)


@pytest.mark.parametrize("name", WHOLE)
def test_policies_that_keep_everything_evict_nothing_at_any_share(wide, name):
    """Nor do they leave more unpacked than shipped."""
    shipped = kvpolicy.load(name)
    fitted = kvpolicy.fit(shipped, wide, length=LENGTH, share="10%")

    assert fitted.spec.budget == shipped.spec.budget
    assert fitted.spec.compress == shipped.spec.compress
    assert getattr(fitted.spec.store, "residual", 0) <= min(getattr(shipped.spec.store, "residual", 0), LENGTH // 8)


@pytest.mark.parametrize("name", EVICTING)
def test_only_sizes_change(wide, name):
    """Plugins, weights and every other parameter stay as shipped."""
    shipped = kvpolicy.load(name)
    fitted, _ = fitted_to(wide, name, length=1024, share=Fraction(1, 10))
    kinds = [(type(one.scorer), one.weight, one.normalise) for one in fitted.spec.score]

    assert kinds == [(type(one.scorer), one.weight, one.normalise) for one in shipped.spec.score]
    assert fitted.spec.allocate == shipped.spec.allocate
    assert type(fitted.spec.store) is type(shipped.spec.store)
    assert type(fitted.spec.merge) is type(shipped.spec.merge)
    assert fitted.spec.compress.prefill == shipped.spec.compress.prefill
    assert slack(fitted.spec) == min(slack(shipped.spec), 12)
    assert (fitted.spec.compress.every == NEVER) == (shipped.spec.compress.every == NEVER)
    assert fitted.digest != shipped.digest


@pytest.mark.parametrize("share", ["25%", 0.25, Fraction(1, 4), "25.0%"])
def test_a_share_may_be_given_in_several_ways(wide, share):
    fitted = kvpolicy.fit(kvpolicy.load("snapkv"), wide, length=512, share=share)

    assert share_of(share) == Fraction(1, 4)
    assert fitted == kvpolicy.fit(kvpolicy.load("snapkv"), wide, length=512, share=Fraction(1, 4))


@pytest.mark.parametrize("share", [0, 1, 2, -0.5, "x", "", "512", "0%", "100%", "64MiB", None, float("nan"), True, [1]])
def test_a_share_that_is_none_is_refused(wide, share):
    with pytest.raises(ParameterError, match="share must be a percentage above 0% and below 100%"):
        kvpolicy.fit(kvpolicy.load("snapkv"), wide, length=512, share=share)


@pytest.mark.parametrize("length", [0, -1, 2.5, "x", None, True])
def test_a_length_that_is_none_is_refused(wide, length):
    with pytest.raises(ParameterError, match="length must be a whole number, at least 1"):
        kvpolicy.fit(kvpolicy.load("snapkv"), wide, length=length, share="25%")


def test_windows_are_scaled(tiny):
    """A quarter of the budget is recent at most; shares of the budget stay what they are."""
    model, _ = tiny
    sizes = {"length": 1024, "share": Fraction(1, 10)}
    snapkv, h2o, streaming = (
        kvpolicy.fit(kvpolicy.load(name), model, **sizes) for name in ("snapkv", "h2o", "streaming_llm")
    )

    assert snapkv.spec.protect.recent == snapkv.spec.budget.tokens // 4
    assert snapkv.spec.score[0].scorer.queries == 102 // 12
    assert h2o.spec.protect == kvpolicy.load("h2o").spec.protect
    assert h2o.spec.protect.of(h2o.spec.budget.tokens) == (0, h2o.spec.budget.tokens // 2)
    assert streaming.spec.protect.of(streaming.spec.budget.tokens) == (4, streaming.spec.budget.tokens - 4)


def test_scorers_inside_scorers_are_scaled_too(tiny):
    """The window of a scorer that another one is built on."""
    model, _ = tiny
    fitted = kvpolicy.fit(kvpolicy.load("gkv"), model, length=200, share=Fraction(1, 4))

    assert attrs.asdict(fitted.spec.score[0].scorer)["of"]["queries"] == 4


@pytest.mark.parametrize("name", DECODING)
def test_a_policy_that_leaves_prompts_as_they_are_has_no_share(wide, name):
    with pytest.raises(EvaluationError, match=f"{name}: leaves prompts as they are"):
        kvpolicy.fit(kvpolicy.load(name), wide, length=LENGTH, share="25%")


def test_no_room_is_an_error(tiny):
    """A share that holds not one entry beside the slack."""
    model, _ = tiny
    with pytest.raises(EvaluationError, match="snapkv: 1% of 100 tokens leaves no room"):
        kvpolicy.fit(kvpolicy.load("snapkv"), model, length=100, share=Fraction(1, 100))


@pytest.fixture(scope="module")
def calibrations(tiny):
    return Calibrations(tiny[0], lambda: torch.arange(5, 5 + 3 * 64).reshape(3, 64))


def fitted(tiny, calibrations, text, **sizes):
    sizes = {"length": 1024, "share": Fraction(1, 4), **sizes}
    return fit_calibrated(policy_of(text), tiny[0], calibrate=calibrations.of, **sizes).spec


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


def test_windows_of_mergers_and_selectors_are_scaled_like_those_of_scorers(tiny, calibrations):
    """A twelfth of what a full cache of those bytes would hold; 0 stands for all that is observed."""
    score = "score: [{use: attention, queries: 32}]\n"
    spec = fitted(tiny, calibrations, f"budget: 512\n{score}merge: {{use: keepkv, window: 32}}\n", share=Fraction(1, 8))
    other = fitted(tiny, calibrations, f"budget: 512\n{score}merge: window_fit\n")

    assert spec.merge.window == spec.score[0].scorer.queries == 128 // 12
    assert other.merge.queries == 0
    omp = fitted(tiny, calibrations, f"budget: 512\n{score}select: {{use: omp, queries: 64}}\n", share=Fraction(1, 8))
    assert omp.select.queries == 128 // 12


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


def test_a_calibration_holds_for_a_store_that_is_resized(tiny, monkeypatch):
    """Also one that is given as a function of the policy. A codec that names no parameters needs another each time."""
    model, policy = tiny[0], kvpolicy.load("tada", budget=512, store={"use": "tada", "bits": "auto"})
    tokens = torch.randint(5, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    asked = []

    def calibrated(one):
        asked.append(one)
        return one.calibrate(model, tokens)

    fitted = kvpolicy.fit(policy, model, share="25%", length=1024, calibration=calibrated)

    assert fitted.spec.store.residual < policy.spec.store.residual
    assert fitted.compile(model, calibration=calibrated(fitted)).footprint.entries(10**6)
    assert kvpolicy.fit(policy, model, share="25%", length=1024, calibration=policy.calibrate(model, tokens)) == fitted
    monkeypatch.setattr(Tada, "calibrated_by", None)
    with pytest.raises(CalibrationError):
        kvpolicy.fit(policy, model, share="25%", length=1024, calibration=policy.calibrate(model, tokens))
