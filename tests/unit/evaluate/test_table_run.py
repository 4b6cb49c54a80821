"""The evaluation from policies to a record: which lines there are, what they say, how decode steps are timed."""

import json
from fractions import Fraction
from statistics import mean

import attrs
import pytest
import torch
from kvpolicy.evaluate.calibrations import SEED as CALIBRATION
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.fit import fit
from kvpolicy.evaluate.table.lines import Kind, distinct, main_lines, merge_lines, with_merger
from kvpolicy.evaluate.table.run import evaluate
from kvpolicy.evaluate.table.setup import DecodeSetup, TableSetup
from kvpolicy.evaluate.table.speed import DecodeBench, StepTime, decode_model

import kvpolicy
from kvpolicy.errors import EvaluationError

SHARES = (Fraction(1, 4), Fraction(1, 8))
DECODE = DecodeSetup((64, 128), pairs=2, hidden=32, layers=2, heads=2, kv_heads=1)


def named(*names):
    return tuple(kvpolicy.load(name) for name in names)


@pytest.fixture(scope="module")
def setup():
    policies = (
        *named("snapkv", "full"),
        kvpolicy.load("kivi4", store={"use": "kivi", "group": 8, "residual": 16}),
        kvpolicy.load("quest", read={"use": "pages", "page": 4}),
    )
    return TableSetup(
        policies,
        bases=named("snapkv"),
        mergers=("window_fit", "drop", "keepkv"),
        shares=SHARES,
        tasks=("recall", "tracking"),
        items=3,
        length=128,
        rows=2,
        error_items=2,
        error_steps=3,
        calibration=(2, 32),
        decode=DECODE,
    )


class Watch:
    """Counts what the progress display is told."""

    def __init__(self):
        self.begun, self.done = {}, {}

    def begin(self, what, steps):
        self.begun[what] = steps
        self.done[what] = 0

        def done(_text):
            self.done[what] += 1

        return done


@pytest.fixture(scope="module")
def run(tiny, setup):
    """The record as it is written, and the watch."""
    watch = Watch()
    found = evaluate(*tiny, setup, watch)
    return json.loads(json.dumps(found)), watch


def lines_of(tiny, setup):
    calibrations = Calibrations(tiny[0], *setup.calibration)
    return [make(setup, tiny[0], 128, calibrations) for make in (main_lines, merge_lines)]


def test_every_policy_has_its_lines(tiny, setup):
    """One for those that keep and read everything, one a share for the others; whole ones first."""
    main, _ = lines_of(tiny, setup)
    quarter, eighth = SHARES

    assert [(one.name, one.kind, one.share) for one in main] == [
        ("full", Kind.WHOLE, 1),
        ("kivi4", Kind.WHOLE, 1),
        ("snapkv", Kind.BUDGET, quarter),
        ("snapkv", Kind.BUDGET, eighth),
        ("quest", Kind.READ, quarter),
        ("quest", Kind.READ, eighth),
    ]


def test_mergers_are_compared_at_the_same_bytes(tiny, setup):
    """`drop` first, which is the policy itself and so measured once; votes cost entries."""
    main, mergers = lines_of(tiny, setup)
    by_name = {one.merge: one for one in mergers if one.share == SHARES[0]}

    assert [one.merge for one in mergers[:3]] == ["drop", "keepkv", "window_fit"]
    assert by_name["drop"].policy == next(one.policy for one in main if one.name == "snapkv")
    assert by_name["keepkv"].policy.spec.budget.tokens < by_name["drop"].policy.spec.budget.tokens
    assert len(list(distinct((*main, *mergers)))) == len(main) + len(mergers) - 2


def test_a_merger_that_needs_queries_gets_them():
    """Where no scorer observes any; otherwise it takes what is there."""
    streaming, snapkv = (with_merger(one.spec, "window_fit").merge for one in named("streaming_llm", "snapkv"))

    assert (streaming.queries, snapkv.queries) == (32, 0)


def test_a_policy_that_does_not_fit_costs_its_line_only(tiny, setup):
    """The reason stands in its place."""
    wide = kvpolicy.load("kivi4", store={"use": "kivi", "group": 32})  # heads of the model are narrower
    main = main_lines(attrs.evolve(setup, policies=(wide, *named("full"))), tiny[0], 128, Calibrations(tiny[0]))

    assert main[0].policy is None
    assert "group" in main[0].refusal
    assert main[1].policy is not None


def test_the_record_says_where_numbers_come_from(run, setup):
    """Versions, machine, date, seed, digests."""
    record, watch = run

    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["setup"]["seed"] == setup.seed
    assert record["setup"]["tasks"]["recall"] == {"question_visible_to_scorers": True}
    assert record["setup"]["decode"]["lengths"] == [64, 128]
    assert len(record["date"]) == 10
    assert all(one["digest"] and one["fitted_policy"].startswith("kvpolicy: 1") for one in record["policies"])
    assert watch.begun == watch.done
    assert watch.begun["answers and attention"] == (6 + 4) * 2 * (2 + 1)


def test_every_line_has_its_numbers(run):
    """Bytes within the share and as the formula says, all items, an error for every layer."""
    record, _ = run
    for one in (*record["policies"], *record["mergers"]):
        assert one["bytes_per_entry"] == one["bytes_per_entry_by_formula"]
        assert set(one["tasks"]) == {"recall", "tracking"}
        for task in one["tasks"].values():
            assert task["items"] == 3
            assert 0 <= task["accuracy"] <= task["share_before_first_mistake"] <= 1
        by_task = one["attention_error"]["by_task"]
        assert one["attention_error"]["mean"] == pytest.approx(mean(mean(layers) for layers in by_task.values()))
        assert one["attention_error"]["worst_layer"] == max(max(layers) for layers in by_task.values())
        if one["kind"] == "budget":
            assert one["share"] - 0.06 < one["held_share"] <= one["share"]
            assert one["read_share"] == 1
    full, kivi = record["policies"][:2]
    assert full["held_share"] == pytest.approx(1 + 4 / (2 * 8 * 4))  # positions
    assert kivi["held_share"] < full["held_share"]
    assert full["attention_error"]["worst_layer"] < 1e-5 < kivi["attention_error"]["mean"]
    quest = [one["read_share"] for one in record["policies"] if one["policy"] == "quest"]
    assert quest[1] < quest[0] <= SHARES[0]


def test_dropping_is_the_policy_itself(run):
    """The rows of `drop` repeat those of the first table."""
    record, _ = run
    snapkv = [one for one in record["policies"] if one["policy"] == "snapkv"]
    dropped = [one for one in record["mergers"] if one["merge"] == "drop"]

    assert [one["digest"] for one in snapkv] == [one["digest"] for one in dropped]
    assert [one["tasks"] for one in snapkv] == [one["tasks"] for one in dropped]


def test_every_policy_is_timed_at_every_length(run, setup):
    """Against the full cache; those that evict hold an eighth, and the slack."""
    record, _ = run
    timed = {(one["policy"], one["length"]): one for one in record["decode"]}

    assert set(timed) == {(policy.name, length) for policy in setup.policies for length in (64, 128)}
    for one in timed.values():
        assert one["ratio"] == pytest.approx((one["step_ms"] + one["compression_ms"]) / one["full_ms"])
        assert one["full_ms"] > 0
        assert one["step_ms"] > 0
    assert timed["full", 128]["entries_held"] == 128 + 2 + 2
    assert timed["full", 128]["compression_ms"] == 0
    assert 16 <= timed["snapkv", 128]["entries_held"] <= 16 + 2
    assert timed["snapkv", 128]["compression_ms"] > 0


def test_the_full_cache_is_as_long_for_every_policy():
    """It is returned to its length after each; nothing stays attached."""
    model = decode_model(DECODE)
    bench = DecodeBench(model, pairs=3)
    plan = fit(kvpolicy.load("snapkv"), model, length=96, share=Fraction(1, 4)).compile(model)

    for _ in range(2):
        found = bench.time(plan, 96)
        assert bench._full[96].get_seq_length() == 96
        assert found.held <= 24
    assert model.config._attn_implementation == "sdpa"


def test_compression_counts_in_the_ratio():
    """Divided by the tokens until the next one."""
    assert StepTime(full=4.0, step=1.0, compression=0.5, held=1.0).ratio == 0.375


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 0}, "items must be at least 1: 0"),
        ({"error_steps": 0}, "error_steps must be at least 1: 0"),
        ({"length": 5}, "length must be from 128 to 2048: 5"),
        ({"seed": CALIBRATION}, f"seed must be from 0 to {CALIBRATION - 1}: {CALIBRATION}"),
        ({"shares": (Fraction(1),)}, "a share must be above 0% and below 100%: 100%"),
        ({"policies": named("rkv", "rkv")}, "policies must have different names: rkv"),
    ],
)
def test_bad_setups_are_refused(setup, change, message):
    """Each with its rule and value; the seed of the calibration text is not one to evaluate with."""
    with pytest.raises(EvaluationError, match=message):
        attrs.evolve(setup, **change)


def test_lengths_too_short_to_time_are_refused():
    """There must be an entry left to hold."""
    with pytest.raises(EvaluationError, match="lengths must be at least 64"):
        DecodeSetup(lengths=(8,))
