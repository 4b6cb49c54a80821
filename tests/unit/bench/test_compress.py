"""Time of a compression: what stands in a case, and what is left out and why."""

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.bench.cases import attention, compaction, compress
from kvpolicy.bench.cases.attention import LIBRARY, AttentionSetup
from kvpolicy.bench.cases.compaction import GATHER, Compaction
from kvpolicy.bench.cases.compress import NAIVE, CompressSetup
from kvpolicy.bench.cases.floors import LARGE
from kvpolicy.bench.protocol.case import AGAIN, OURS
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.protocol.model_shapes import attention_shape
from kvpolicy.errors import InputError

CPU = torch.device("cpu")
SHAPE = attention_shape(2, 4, 2, 16)


def setup(*policies, **rest):
    given = policies or (kvpolicy.load("rkv", budget=24),)
    options = {"lengths": (64,), "protocol": Repetitions(3), **rest}
    return CompressSetup(given, SHAPE, device=CPU, dtype=torch.float32, **options)


def all_of(setup, clock, left_out, deadline=None):
    return dict(compress.measure(setup, clock, deadline or Deadline(), left_out))


def test_a_case_has_ours_twice_the_baseline_and_the_floors(scripted, left_out):
    (case,) = all_of(setup(), scripted(2.0), left_out)["rkv at 64 entries"]

    assert set(case.samples) == {OURS, AGAIN, NAIVE}
    assert case.ratio(NAIVE) == 1.0
    assert case.seconds(OURS) == 1.0  # of two layers
    assert case.floors["gemm"] == 2.0
    assert case.floors["bytes"] == case.facts["moved_bytes"] * 2.0 / (2 * LARGE["cpu"])
    assert case.facts["peak_bytes"][NAIVE] > case.facts["peak_bytes"][OURS] > 0
    assert case.facts["digest"] == kvpolicy.load("rkv", budget=24).digest
    assert {"rows": 1, "kv_heads": 2, "budget": 24, "window": 8, "keys": "shared"}.items() <= case.shape.items()
    assert left_out == []


def test_every_policy_at_every_length_the_short_ones_first(scripted, left_out):
    policies = kvpolicy.load("rkv", budget=24), kvpolicy.load("gkv", budget=24)
    found = all_of(setup(*policies, lengths=(64, 40)), scripted(), left_out)

    assert list(found) == [f"{name} at {length} entries" for length in (40, 64) for name in ("rkv", "gkv")]
    assert NAIVE not in found["gkv at 64 entries"][0].samples


def test_what_evicts_nothing_is_left_out_and_the_rest_goes_on(scripted, left_out):
    found = all_of(setup(kvpolicy.load("full"), kvpolicy.load("rkv", budget=24)), scripted(), left_out)

    assert found["full at 64 entries"] == []
    assert len(found["rkv at 64 entries"]) == 1
    assert left_out == [("full at 64", "policy full evicts nothing at 64 entries")]


def test_all_pairs_that_would_not_fit_are_left_out(scripted, left_out, monkeypatch):
    needed = 24 * 2 * 64**2
    monkeypatch.setattr(compress, "free_bytes", lambda _device: 2 * needed - 1)
    (case,) = all_of(setup(), scripted(), left_out)["rkv at 64 entries"]

    assert NAIVE not in case.samples
    assert left_out[0][0] == f"{NAIVE} of rkv at 64"
    monkeypatch.setattr(compress, "free_bytes", lambda _device: 2 * needed)
    assert NAIVE in all_of(setup(), scripted(), left_out)["rkv at 64 entries"][0].samples


def test_without_time_nothing_begins(scripted, left_out):
    clock = scripted()
    assert all_of(setup(), clock, left_out, Deadline(0.0)) == {"rkv at 64 entries": []}
    assert clock.calls == 0
    assert left_out == [("rkv at 64", "no time was left")]


@pytest.mark.parametrize("wrong", [{"policies": ()}, {"lengths": ()}, {"rows": 0}, {"lengths": (1,)}])
def test_bad_setups_are_refused(wrong):
    with pytest.raises(InputError):
        attrs.evolve(setup(), **wrong)


def test_compaction_moves_what_the_policy_chose(scripted, monkeypatch):
    moved = []
    take = compaction.due

    def watched(plan, shape, layers):
        cache, finish_forward = take(plan, shape, layers)
        moved.append(cache)
        return cache, finish_forward

    monkeypatch.setattr(compaction, "due", watched)
    case = Compaction(kvpolicy.load("snapkv", budget=40), SHAPE, 64, CPU, torch.float32, Repetitions(3, 0)).measure(
        scripted(1.0)
    )

    assert set(case.samples) == {OURS, AGAIN, GATHER}
    assert case.shape["kept"] == 40
    assert [one.managed[0].storage.slots.average for one in moved] == [64.0] + [40.0] * 6  # the first is the one shown


def test_attention_is_over_what_is_left_and_compared_with_the_library(scripted, left_out, monkeypatch):
    outputs = {}
    both = attention.interleave

    def watched(variants, clock, protocol, **rest):
        outputs.update((one.name, one.fresh()) for one in variants)
        return both(variants, clock, protocol, **rest)

    monkeypatch.setattr(attention, "interleave", watched)
    only = AttentionSetup((kvpolicy.load("snapkv", budget=40),), SHAPE, (50,), 2, CPU, torch.float32, Repetitions(3))
    ((what, (case,)),) = attention.measure(only, scripted(1.0), Deadline(), left_out)

    assert what == "attention over 50 entries of snapkv"
    assert set(case.samples) == {OURS, AGAIN, LIBRARY}
    assert case.facts["read_bytes"] == 2 * 2 * 2 * 51 * 2 * 16 * 4
    assert case.floors["bytes"] == case.facts["read_bytes"] / (2 * LARGE["cpu"])
    assert left_out == []
    assert list(attention.measure(only, scripted(), Deadline(0.0), left_out)) == [(what, [])]
    assert left_out == [(what, "no time was left")]


def test_attention_over_fewer_entries_than_are_protected_is_refused():
    with pytest.raises(InputError, match="more entries than are protected"):
        AttentionSetup((kvpolicy.load("snapkv"),), SHAPE, (32,), 1, CPU, torch.float32)
