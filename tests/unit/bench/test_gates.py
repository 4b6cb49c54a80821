"""Gates: which number is held against which threshold."""

import math

import attrs
import pytest
import torch

from kvpolicy.bench.baselines.contenders import DYNAMIC, PREALLOCATED, QUANTO, STATIC
from kvpolicy.bench.cases.compaction import GATHER
from kvpolicy.bench.cases.compress import NAIVE
from kvpolicy.bench.gates import GATES, QUICK, Scale, compressing, decoding, judge, packed
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.errors import InputError


def case(facts=None, **seconds):
    names = {"naive": NAIVE, "gather": GATHER, "dynamic": DYNAMIC, "preallocated": PREALLOCATED, "static": STATIC}
    samples = {OURS: (1.0,) * 3, AGAIN: (1.0,) * 3}
    samples.update({names.get(name, name.replace("_", " ")): (float(one),) * 3 for name, one in seconds.items()})
    return Case("policy", 100, samples, facts=facts or {})


def verdicts(name, monkeypatch, where, target, found):
    """The verdicts of one gate when measuring finds that."""
    *kind, method = target.split(".")
    monkeypatch.setattr(getattr(where, *kind) if kind else where, method, lambda *_: found)
    return {one.gate: one for one in GATES[name](QUICK, None)[0]}


@pytest.mark.parametrize(
    ("name", "least"), [("snapkv-bfloat16", 3.0), ("snapkv-float32", 2.5), ("rkv", 20.0), ("compaction", 4.0)]
)
def test_times_faster_must_not_be_below_the_threshold(monkeypatch, name, least):
    target = "Compaction.measure" if name == "compaction" else "measure_one"
    for ratio in (least, least - 0.01):
        peaks = {"peak_bytes": {OURS: 1, NAIVE: 100}}
        found = verdicts(name, monkeypatch, compressing, target, case(peaks, naive=ratio, gather=ratio))
        assert found[name].value == ratio
        assert found[name].passed == (ratio >= least)


@pytest.mark.parametrize(("bytes_", "passes"), [(10, True), (11, False)])
def test_redundancy_must_take_a_tenth_of_the_memory(monkeypatch, bytes_, passes):
    measured = case({"peak_bytes": {OURS: bytes_, NAIVE: 100}}, naive=99)
    found = verdicts("rkv", monkeypatch, compressing, "measure_one", measured)
    assert found["rkv-memory"].passed == passes


def test_decode_is_held_against_each_of_the_full_caches(monkeypatch):
    found = case({"compression_share": 0.05}, dynamic=8.0, preallocated=2.4, static=3.0)
    gate = verdicts("decode", monkeypatch, decoding, "measure_one", [found])

    assert {name: one.passed for name, one in gate.items()} == {
        "decode": True,
        "decode-preallocated": False,
        "decode-static": True,  # told, not claimed
        "compression-share": True,
    }
    slower = case({"compression_share": 0.051}, dynamic=7.9, preallocated=3.0, static=0.4)
    gate = verdicts("decode", monkeypatch, decoding, "measure_one", [slower])
    assert [one.passed for one in gate.values()] == [False, True, True, False]


@pytest.mark.parametrize(("plain", "passes"), [(1 / 1.03, True), (1 / 1.031, False)])
def test_attaching_may_cost_three_percent(monkeypatch, plain, passes):
    found = verdicts("attach", monkeypatch, decoding, "Overhead.measure", case(dynamic=plain))
    assert found["attach"].passed == passes


@pytest.mark.parametrize(("again", "passes"), [(1.0, False), (0.8, True)])
def test_old_sequences_may_be_slower_by_the_noise(monkeypatch, again, passes):
    """Old steps take 1, young ones 0.85: only noise of as much excuses that."""
    found = verdicts("age", monkeypatch, decoding, "Age.measure", case(young=0.85, young_again=again * 0.85))
    assert found["age"].passed == passes


@pytest.mark.parametrize("installed", [True, False])
def test_packed_steps_are_held_against_quanto_where_it_is_installed(monkeypatch, installed):
    asked = []
    monkeypatch.setattr(packed, "is_optimum_quanto_available", lambda: installed)
    monkeypatch.setattr(packed, "DecodeSetup", lambda *_, full, **__: asked.append(full))
    samples = {OURS: (1.0,), AGAIN: (1.0,), DYNAMIC: (0.5,)} | ({QUANTO: (1.25,)} if installed else {})
    measured = [Case("kivi4", 100, samples, floors={DYNAMIC: 0.1})]
    found = verdicts("packed", monkeypatch, packed, "measure_one", measured)

    assert asked == [(DYNAMIC, QUANTO) if installed else (DYNAMIC,)]
    assert {name: (one.value, one.met) for name, one in found.items()} == {
        f"packed-kivi4-{length}{rival}": value
        for length in QUICK.packed
        for rival, value in {"": (2.0, False), "-quanto": (0.8, True)}.items()
        if installed or not rival
    }


def test_all_gates_run_at_tiny_sizes(scripted):
    """The whole way with real layers and models; every sample is one second."""
    results = dict(judge(tuple(GATES), QUICK, scripted(1.0)))
    found = {one.gate: one for ours, _ in results.values() for one in ours}

    beside = {"rkv-memory", "decode-preallocated", "decode-static", "compression-share", "compaction-prompt"}
    stores, thin = ("kivi4", "rotation4", "rotation3"), ("full", "snapkv", "rkv", "adakv", "kivi4", "h2o", "keepkv")
    packed = {f"packed-{store}-{length}" for store in stores for length in QUICK.packed}
    chunks, prompts = {f"chunk-{store}" for store in stores}, {f"prompt-{name}" for name in ("h2o", "d2o", "gkv")}
    tenth = {f"tenth-{name}{other}" for name in ("snapkv", "rkv") for other in ("", "-preallocated")}
    host = {f"thin-{name}-{rows}" for name in thin for rows in QUICK.thin_rows} | {"wide-full", "wide-snapkv"}
    several = {"packed", "chunk", "prompt", "tenth", "thin", "wide"}  # gates of several verdicts
    assert set(found) == {*GATES, *beside, *packed, *chunks, *prompts, *tenth, *host} - several
    shares = {"rkv-memory", "compression-share"}
    assert {one.value for name, one in found.items() if name not in shares | {"wide-full", "wide-snapkv"}} == {1.0}
    assert {found[f"wide-{name}"].value for name in ("full", "snapkv")} == {1e6 / QUICK.wide.layers}
    assert {name for name, one in found.items() if one.floor is not None} == {*packed, *host}
    assert {found[f"wide-{name}"].floor for name in ("full", "snapkv")} == {1e6 / QUICK.wide.layers}
    assert {name for name, one in found.items() if not one.claimed} == {*packed, *chunks, *prompts, *tenth, *host}
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
    monkeypatch.setattr(compressing, "measure_one", lambda *_: case())
    with pytest.raises(InputError, match="the gate rkv needs the naive form"):
        GATES["rkv"](QUICK, None)


@pytest.mark.parametrize("at_most", [False, True])
def test_what_is_not_a_number_fails(at_most):
    assert not Verdict("x", "y", math.nan, 1.0, at_most=at_most).passed


def test_an_aim_may_be_missed():
    one = Verdict("x", "y", 2.0, 1.0, at_most=True, claimed=False, floor=1.5)
    assert (one.met, one.passed) == (False, True)
    assert attrs.evolve(one, claimed=True).passed is False


def test_compressing_is_part_of_a_step_over_a_tenth(monkeypatch):
    found = case({"compression_share": 0.25}, dynamic=2.0, preallocated=1.6)
    gate = verdicts("tenth", monkeypatch, decoding, "measure_one", [found])

    assert {name: (one.value, one.met) for name, one in gate.items()} == {
        "tenth-policy": (1.5, False),
        "tenth-policy-preallocated": (pytest.approx(1.2), True),
    }


def test_a_verdict_read_again_is_the_same():
    one = Verdict("x", "y", 2.0, 1.0, noise=0.1, floor=3.0)
    assert Verdict.from_dict(one.to_dict()) == one
    assert one.to_dict()["passed"] is True


def test_measuring_leaves_threads_alone(scripted):
    before = torch.get_num_threads()
    GATES["snapkv-float32"](QUICK, scripted())
    assert torch.get_num_threads() == before
