"""Turns, warm-up, order, deadlines; and what is said of the samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.bench.protocol.clock import HostClock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions, Variant, interleave
from kvpolicy.bench.protocol.samples import noise, paired_ratio, quantile

NAMES = ("a", "b", "c")
times = st.floats(1e-6, 1e3)


class Told:
    """A clock that hears the variant's name from its call."""

    def __init__(self):
        self.heard = []

    def time(self, call):
        self.heard.append(call())
        return float(len(self.heard))


def variants(names=NAMES):
    return [Variant(name, lambda name=name: lambda: name) for name in names]


def test_every_variant_runs_once_a_round_and_the_warm_up_is_not_counted():
    clock = Told()
    found = interleave(variants(), clock, Repetitions(rounds=4, warm_up=2))

    rounds = [clock.heard[start : start + 3] for start in range(0, 18, 3)]
    assert [sorted(one) for one in rounds] == [list(NAMES)] * 6
    assert {name: len(samples) for name, samples in found.items()} == dict.fromkeys(NAMES, 4)
    assert min(sample for samples in found.values() for sample in samples) == 7.0


def test_samples_stand_in_the_order_of_the_rounds():
    clock = Told()
    found = interleave(variants(), clock, Repetitions(rounds=5, warm_up=0))

    for name, samples in found.items():
        assert [clock.heard[int(sample) - 1] for sample in samples] == [name] * 5
        assert [(int(sample) - 1) // 3 for sample in samples] == list(range(5))


def test_order_is_drawn_anew_and_follows_the_seed():
    heard = []
    for seed in (1, 1, 2):
        clock = Told()
        interleave(variants(), clock, Repetitions(rounds=12, seed=seed))
        heard.append(clock.heard)

    assert heard[0] == heard[1] != heard[2]
    assert len({tuple(heard[0][start : start + 3]) for start in range(0, 39, 3)}) > 2


def test_after_the_deadline_there_are_three_rounds_and_no_more():
    found = interleave(variants(), Told(), Repetitions(rounds=9, warm_up=1), expired=lambda: True)

    assert {len(samples) for samples in found.values()} == {3}


def test_what_is_fresh_is_made_outside_the_time():
    made = []

    class Strict:
        def time(self, call):
            assert made == ["fresh"]
            made.clear()
            call()
            return 1.0

    def fresh():
        made.append("fresh")
        return lambda: None

    interleave([Variant("a", fresh)], Strict(), Repetitions(rounds=3))
    assert made == []


def test_host_clock_measures_the_call():
    done = []
    assert 0 < HostClock().time(lambda: done.append(1)) < 10
    assert done == [1]


@given(st.lists(times, min_size=1, max_size=20), st.floats(0, 1))
def test_quantile_is_that_of_numpy(samples, share):
    assert quantile(samples, share) == pytest.approx(float(np.quantile(samples, share)))


@given(st.lists(st.tuples(times, times), min_size=1, max_size=9), st.lists(st.floats(1, 50), min_size=9, max_size=9))
def test_slow_rounds_cancel(pairs, slow):
    """Slowing a whole round down changes no ratio."""
    one, other = zip(*pairs, strict=True)
    slower = [[time * factor for time, factor in zip(samples, slow, strict=False)] for samples in (one, other)]

    assert paired_ratio(*slower) == pytest.approx(paired_ratio(one, other))
    assert noise(*slower) == pytest.approx(noise(one, other), rel=1e-6, abs=1e-9)


def test_noise_is_what_half_of_the_rounds_stay_below():
    assert noise((1.0, 1.1, 0.7), (1.0, 1.0, 1.0)) == pytest.approx(0.1)
    assert paired_ratio((2.0, 8.0, 30.0), (1.0, 2.0, 3.0)) == 4.0


def test_deadline_counts_down_and_is_shared_out():
    now = [100.0]
    deadline = Deadline.within(60.0, lambda: now[0])
    half = deadline.share(0.5)

    assert (deadline.left, half.left) == (60.0, 30.0)
    now[0] = 131.0
    assert half.expired()
    assert not deadline.expired()
    now[0] = 170.0
    assert deadline.left == 0.0
    assert deadline.share(0.5).expired()


def test_no_deadline_never_comes():
    assert Deadline().left == float("inf")
    assert not Deadline().share(0.01).expired()
