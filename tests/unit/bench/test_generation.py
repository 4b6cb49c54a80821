"""Batches that fit, whole generations and sampled ones."""

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.bench.baselines.contenders import COMPILED, DYNAMIC, PREALLOCATED, STATIC, FullCache, PolicyContender
from kvpolicy.bench.generation import GenerateSetup, batch_size, measure
from kvpolicy.bench.generation.batch_size import largest_batch, peak_at
from kvpolicy.bench.generation.sampled_steps import sampled
from kvpolicy.bench.generation.setup import ROOM, LargestBatch
from kvpolicy.bench.protocol.case import OURS
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.model_shapes import model_shape
from kvpolicy.errors import InputError

CPU = torch.device("cpu")
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of a token: layers, keys and values, KV heads, head dim, float32
EVERY = {"compress": {"prefill": True, "every": 8}}


def policy(budget=16):
    return kvpolicy.load("rkv", budget=budget, **EVERY)


def setup(**rest):
    given = {"prompt": 10, "new": 30, "memory": 5 * 40 * TOKEN, "full": (DYNAMIC, STATIC), "rounds": 3, **rest}
    return GenerateSetup((policy(),), model_shape("tiny"), device=CPU, dtype=torch.float32, **given)


def cases(setup, model, clock, left_out, deadline=None):
    *_, (what, found) = measure(setup, model, clock, deadline or Deadline(), left_out)
    assert what == "speed"
    return found


@pytest.mark.parametrize("name", [DYNAMIC, PREALLOCATED, STATIC])
def test_full_caches_take_every_token_of_every_row(tiny, name):
    assert peak_at(setup(), FullCache(name, tiny), 3) == 3 * 40 * TOKEN


def test_a_policy_takes_its_budget_and_its_slack(tiny):
    contender = PolicyContender.of(policy(), tiny)
    with contender.open():
        plain = 3 * (16 + 8) * TOKEN
        peak = peak_at(setup(), contender, 3)

    assert plain < peak < 1.1 * plain  # positions beside the entries


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_the_largest_batch_fills_the_memory(tiny, rows, left_out):
    found = largest_batch(setup(memory=rows * 40 * TOKEN), FullCache(STATIC, tiny), Deadline(), left_out)

    assert found == LargestBatch(rows, rows * 40 * TOKEN)


def test_what_does_not_fit_at_all_is_left_out(tiny, left_out):
    assert largest_batch(setup(memory=100), FullCache(DYNAMIC, tiny), Deadline(), left_out) == LargestBatch()
    assert left_out == [(DYNAMIC, "one row of 40 tokens does not fit 100 bytes")]


def test_out_of_memory_is_too_large(tiny, left_out, monkeypatch):
    def peak(_setup, _contender, rows):
        if rows > 6:
            raise torch.OutOfMemoryError
        return rows

    monkeypatch.setattr(batch_size, "peak_at", peak)
    assert largest_batch(setup(), FullCache(DYNAMIC, tiny), Deadline(), left_out) == LargestBatch(6, 6)


def test_the_batch_of_compiled_steps_is_that_of_the_same_cache(tiny, left_out, monkeypatch):
    tried = []

    def peak(_setup, contender, rows):
        tried.append(contender.name)
        return rows * 40 * TOKEN

    monkeypatch.setattr(batch_size, "peak_at", peak)
    assert largest_batch(setup(), FullCache(COMPILED, tiny), Deadline(), left_out).rows == 5
    assert set(tried) == {STATIC}


def test_every_token_is_generated_at_the_largest_batches(tiny, scripted, left_out):
    (case,) = cases(setup(), tiny, scripted(), left_out)

    assert case.facts["rows"] == {OURS: 8, DYNAMIC: 5, STATIC: 5}
    assert case.facts["how"] == "every token generated"
    assert {len(samples) for samples in case.samples.values()} == {3}
    assert case.facts["peak_bytes"][STATIC] == 5 * 40 * TOKEN
    for name, samples in case.samples.items():
        assert case.facts["tokens_per_second"][name] == pytest.approx(3 / sum(samples))
        assert len(case.facts["more"][name]["prompt_seconds"]) == 3
    assert left_out == []


def test_sampled_seconds_are_of_a_token_of_all_rows(tiny, scripted, left_out):
    """A clock on which every step takes a second: what is left is the number of rows."""
    only = setup(new=ROOM + 20, points=3, memory=4 * 94 * TOKEN)
    (case,) = cases(only, tiny, scripted(1.0), left_out)

    assert case.facts["rows"][DYNAMIC] == 4
    assert case.samples[DYNAMIC] == (0.25,) * 3
    assert case.samples[OURS] == (1 / case.facts["rows"][OURS],) * 3
    assert case.facts["how"] == "steps at 3 lengths"
    assert case.facts["more"][OURS]["compressing_steps"] == 1


def test_sampled_points_are_joined_by_straight_lines(tiny, left_out):
    class ByLength:
        """A step takes as many seconds as the cache has tokens."""

        def time(self, call):
            call()
            return float(call.__self__.cache.get_seq_length())

    only = setup(new=ROOM + 20, points=3)
    found = sampled(only, [FullCache(DYNAMIC, tiny)], {DYNAMIC: LargestBatch(2, 1)}, ByLength(), Deadline(), left_out)

    # Points at 10, 20 and 30 tokens; two steps of warm-up, then three that are timed.
    assert found[DYNAMIC].seconds == (23 / 2, 24 / 2, 25 / 2)


def test_without_time_speed_is_left_out(tiny, scripted, left_out):
    found = cases(setup(new=ROOM + 20, points=2), tiny, scripted(), left_out, Deadline(0.0))

    assert found == []
    names = (DYNAMIC, STATIC, "rkv")
    assert [what for what, _ in left_out] == [
        f"{what} of {name}" for what in ("larger batches", "speed") for name in names
    ]


def test_whole_generations_stop_after_a_round_when_time_is_up(tiny, scripted, left_out):
    (case,) = cases(setup(), tiny, scripted(), left_out, Deadline(0.0))

    assert {len(samples) for samples in case.samples.values()} == {1}
    assert left_out[-1] == ("round 2 of 3", "no time was left")
    assert set(case.facts["largest"].values()) == {False}


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 0},
        {"new": 1},
        {"memory": 0},
        {"rounds": 0},
        {"policies": ()},
        {"points": 3, "new": ROOM},
        {"points": 3, "new": 200, "rounds": 40},
    ],
)
def test_bad_setups_are_refused(wrong):
    with pytest.raises(InputError):
        attrs.evolve(setup(), **wrong)
