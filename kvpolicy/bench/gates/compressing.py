"""Gates of a compression: against plain torch, and of moving what stays."""

from collections.abc import Mapping

import torch

from kvpolicy.bench.cases.compaction import GATHER, Compaction
from kvpolicy.bench.cases.compress import NAIVE, CompressSetup, measure_one
from kvpolicy.bench.gates.gate import CPU, Judged, must_be_measured
from kvpolicy.bench.gates.scale import Scale
from kvpolicy.bench.protocol.case import OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.errors import InputError
from kvpolicy.policy import load


def snapkv(dtype: torch.dtype, threshold: float, scale: Scale, clock: Clock) -> Judged:
    """SnapKV against the form that repeats keys for their query heads."""
    case = _compressed("snapkv", scale.snapkv, dtype, scale, clock)
    name = str(dtype).removeprefix("torch.")
    claim = (
        f"SnapKV compression, {scale.snapkv} to {scale.budget} entries, {name}: times faster than with repeated keys"
    )
    return [Verdict(f"snapkv-{name}", claim, case.ratio(NAIVE), threshold, noise=case.noise)], [case]


def rkv(scale: Scale, clock: Clock) -> Judged:
    """R-KV against the form that holds the similarities of all pairs, in time and in temporaries."""
    case = _compressed("rkv", scale.rkv, torch.float32, scale, clock)
    peaks: Mapping[str, float] = case.facts["peak_bytes"]
    claim = f"R-KV compression of {scale.rkv} entries: times faster than with all pairs in memory"
    memory = f"R-KV compression of {scale.rkv} entries: its temporaries as a share of those"
    return [
        Verdict("rkv", claim, case.ratio(NAIVE), 20.0, noise=case.noise),
        Verdict("rkv-memory", memory, peaks[OURS] / peaks[NAIVE], 0.1, at_most=True),
    ], [case]


def compaction(scale: Scale, clock: Clock) -> Judged:
    """Moving what stays against a gather by expanded indices."""
    verdicts, cases, policy = [], [], load("kvpolicy:snapkv", budget=scale.budget)
    for gate, length, least in (("compaction", scale.moved, 4.0), ("compaction-prompt", scale.snapkv, None)):
        case = Compaction(policy, scale.moving, length, CPU, torch.float32).measure(clock)
        claim = f"compaction, {length} to {scale.budget} entries: times faster than an expanded gather"
        verdicts.append(Verdict(gate, claim, case.ratio(GATHER), least, noise=case.noise))
        cases.append(case)
    return verdicts, cases


def _compressed(name: str, length: int, dtype: torch.dtype, scale: Scale, clock: Clock) -> Case:
    policy = load(f"kvpolicy:{name}", budget=scale.budget)
    setup = CompressSetup((policy,), scale.attention, (length,), CPU, dtype, protocol=Repetitions(scale.rounds))
    case = measure_one(setup, policy, length, clock, Deadline(), must_be_measured)
    if NAIVE not in case.samples:
        raise InputError(f"the gate {name} needs the naive form, which was left out")
    return case
