"""Gates: which number is held against which threshold."""

import math

import attrs
import pytest
import torch

from kvpolicy.bench import gates
from kvpolicy.bench.baselines.contenders import DYNAMIC, PREALLOCATED, STATIC
from kvpolicy.bench.cases.compaction import GATHER
from kvpolicy.bench.cases.compress import NAIVE
from kvpolicy.bench.gates import GATES, QUICK, Scale, judge
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.errors import InputError


def case(facts=None, **seconds):
    names = {"naive": NAIVE, "gather": GATHER, "dynamic": DYNAMIC, "preallocated": PREALLOCATED, "static": STATIC}
    samples = {OURS: (1.0,) * 3, AGAIN: (1.0,) * 3}
    samples.update({names.get(name, name.replace("_", " ")): (float(one),) * 3 for name, one in seconds.items()})
    return Case("policy", 100, samples, facts=facts or {})


def verdicts(name, monkeypatch, target, found):
    """The verdicts of one gate when measuring finds that case."""
    kind, _, method = target.partition(".")
    if method:
        monkeypatch.setattr(getattr(gates, kind), method, lambda *_: found)
    else:
        monkeypatch.setattr(gates, kind, lambda *_: [found] if kind == "measure_decode" else found)
    return {one.gate: one for one in GATES[name](QUICK, None)[0]}


@pytest.mark.parametrize(
    ("name", "least"), [("snapkv-bfloat16", 3.0), ("snapkv-float32", 2.5), ("rkv", 20.0), ("compaction", 4.0)]
)
def test_times_faster_must_not_be_below_the_threshold(monkeypatch, name, least):
    target = "Compaction.measure" if name == "compaction" else "measure_one"
    for ratio in (least, least - 0.01):
        peaks = {"peak_bytes": {OURS: 1, NAIVE: 100}}
        found = verdicts(name, monkeypatch, target, case(peaks, naive=ratio, gather=ratio))
        assert found[name].value == ratio
        assert found[name].passed == (ratio >= least)


@pytest.mark.parametrize(("bytes_", "passes"), [(10, True), (11, False)])
def test_redundancy_must_take_a_tenth_of_the_memory(monkeypatch, bytes_, passes):
    found = verdicts("rkv", monkeypatch, "measure_one", case({"peak_bytes": {OURS: bytes_, NAIVE: 100}}, naive=99))
    assert found["rkv-memory"].passed == passes


def test_decode_is_held_against_each_of_the_full_caches(monkeypatch):
    found = case({"compression_share": 0.05}, dynamic=8.0, preallocated=2.4, static=3.0)
    gate = verdicts("decode", monkeypatch, "measure_decode", found)

    assert {name: one.passed for name, one in gate.items()} == {
        "decode": True,
        "decode-preallocated": False,
        "decode-static": True,  # told, not claimed
        "compression-share": True,
    }
    slower = case({"compression_share": 0.051}, dynamic=7.9, preallocated=3.0, static=0.4)
    gate = verdicts("decode", monkeypatch, "measure_decode", slower)
    assert [one.passed for one in gate.values()] == [False, True, True, False]


@pytest.mark.parametrize(("plain", "passes"), [(1 / 1.03, True), (1 / 1.031, False)])
def test_attaching_may_cost_three_percent(monkeypatch, plain, passes):
    found = verdicts("attach", monkeypatch, "Overhead.measure", case(dynamic=plain))
    assert found["attach"].passed == passes


@pytest.mark.parametrize(("again", "passes"), [(1.0, False), (0.8, True)])
def test_old_sequences_may_be_slower_by_the_noise(monkeypatch, again, passes):
    """Old steps take 1, young ones 0.85: only noise of as much excuses that."""
    found = verdicts("age", monkeypatch, "Age.measure", case(young=0.85, young_again=again * 0.85))
    assert found["age"].passed == passes


def test_all_gates_run_at_tiny_sizes(scripted):
    """The whole way with real layers and models; every sample is one second."""
    results = dict(judge(tuple(GATES), QUICK, scripted(1.0)))
    found = {one.gate: one for ours, _ in results.values() for one in ours}

    beside = {"rkv-memory", "decode-preallocated", "decode-static", "compression-share", "compaction-prompt"}
    packed = {f"packed-{store}-{length}" for store in ("kivi4", "rotation4", "rotation3") for length in QUICK.packed}
    assert set(found) == {*GATES, *beside, *packed} - {"packed"}
    ratios = {name: one.value for name, one in found.items() if name not in {"rkv-memory", "compression-share"}}
    assert set(ratios.values()) == {1.0}
    assert 0 < found["rkv-memory"].value < 1
    assert not found["snapkv-float32"].passed
    assert found["attach"].passed


def test_sizes_are_those_of_the_claims():
    scale = Scale()
    assert (scale.snapkv, scale.rkv, scale.decode, scale.old, scale.budget) == (8192, 4096, 16_384, 51_200, 1024)
    shape = scale.attention
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (1, 32, 8, 128)
    assert scale.moving == attrs.evolve(shape, layers=16)
    assert scale.moved == 1152


def test_a_gate_without_its_baseline_is_an_error(monkeypatch):
    monkeypatch.setattr(gates, "measure_one", lambda *_: case())
    with pytest.raises(InputError, match="the gate rkv needs the naive form"):
        GATES["rkv"](QUICK, None)


@pytest.mark.parametrize("at_most", [False, True])
def test_what_is_not_a_number_fails(at_most):
    assert not Verdict("x", "y", math.nan, 1.0, at_most=at_most).passed


def test_a_verdict_read_again_is_the_same():
    one = Verdict("x", "y", 2.0, 1.0, noise=0.1)
    assert Verdict.from_dict(one.to_dict()) == one
    assert one.to_dict()["passed"] is True


def test_measuring_leaves_threads_alone(scripted):
    before = torch.get_num_threads()
    GATES["snapkv-float32"](QUICK, scripted())
    assert torch.get_num_threads() == before
