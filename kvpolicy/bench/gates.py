"""The CPU gates: ratios within one run, each with its threshold."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import attrs
import torch
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import DYNAMIC, PREALLOCATED, STATIC
from kvpolicy.bench.cases.compaction import GATHER, Compaction
from kvpolicy.bench.cases.compress import NAIVE, CompressSetup, measure_one
from kvpolicy.bench.cases.decode import DecodeSetup
from kvpolicy.bench.cases.decode import measure_one as measure_decode
from kvpolicy.bench.cases.overhead import Age, Overhead
from kvpolicy.bench.protocol.case import OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.protocol.model_shapes import ModelShape, attention_shape, model_shape, random_model
from kvpolicy.bench.protocol.samples import noise
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.errors import InputError
from kvpolicy.policy import load

_CPU = torch.device("cpu")
_PACKED = ("kivi4", "rotation4", "rotation3")
_EVERY_128 = {"compress": {"prefill": True, "every": 128}}


@attrs.frozen
class Scale:
    """Sizes of the gates: those of the claims, or tiny ones for a smoke test."""

    attention: ModelShape = attention_shape(1, 32, 8, 128)
    model: ModelShape = model_shape("267m")
    small: ModelShape = model_shape("small")
    snapkv: int = 8192
    rkv: int = 4096
    moved: int = 1152
    moving: ModelShape = attention_shape(16, 32, 8, 128)  # all layers of a model: so many are compressed in one go
    decode: int = 16_384
    budget: int = 1024
    short: int = 1024  # tokens of context for attaching without evicting
    old: int = 51_200
    real: ModelShape = model_shape("135m")  # that of SmolLM2-135M
    packed: tuple[int, ...] = (2048, 8192)  # tokens, all of which are held
    rounds: int = 7


QUICK = Scale(
    attention=attention_shape(1, 4, 2, 16),
    model=model_shape("tiny"),
    small=model_shape("tiny"),
    snapkv=128,
    rkv=128,
    moved=96,
    moving=attention_shape(2, 4, 2, 16),
    decode=256,
    budget=64,
    short=64,
    old=512,
    real=ModelShape(2, 4, 2, 32, 64, 128, 128),
    packed=(192, 256),
    rounds=3,
)
Judged = tuple[list[Verdict], list[Case]]
Gate = Callable[[Scale, Clock], Judged]


def _snapkv(dtype: torch.dtype, threshold: float, scale: Scale, clock: Clock) -> Judged:
    case = _compressed("snapkv", scale.snapkv, dtype, scale, clock)
    name = str(dtype).removeprefix("torch.")
    claim = (
        f"SnapKV compression, {scale.snapkv} to {scale.budget} entries, {name}: times faster than with repeated keys"
    )
    return [Verdict(f"snapkv-{name}", claim, case.ratio(NAIVE), threshold, noise=case.noise)], [case]


def _rkv(scale: Scale, clock: Clock) -> Judged:
    case = _compressed("rkv", scale.rkv, torch.float32, scale, clock)
    peaks: Mapping[str, float] = case.facts["peak_bytes"]
    claim = f"R-KV compression of {scale.rkv} entries: times faster than with all pairs in memory"
    memory = f"R-KV compression of {scale.rkv} entries: its temporaries as a share of those"
    return [
        Verdict("rkv", claim, case.ratio(NAIVE), 20.0, noise=case.noise),
        Verdict("rkv-memory", memory, peaks[OURS] / peaks[NAIVE], 0.1, at_most=True),
    ], [case]


def _compaction(scale: Scale, clock: Clock) -> Judged:
    verdicts, cases, policy = [], [], load("kvpolicy:snapkv", budget=scale.budget)
    for gate, length, least in (("compaction", scale.moved, 4.0), ("compaction-prompt", scale.snapkv, None)):
        case = Compaction(policy, scale.moving, length, _CPU, torch.float32).measure(clock)
        claim = f"compaction, {length} to {scale.budget} entries: times faster than an expanded gather"
        verdicts.append(Verdict(gate, claim, case.ratio(GATHER), least, noise=case.noise))
        cases.append(case)
    return verdicts, cases


def _decode(scale: Scale, clock: Clock) -> Judged:
    policy = load("kvpolicy:snapkv", budget=scale.budget, **_EVERY_128)
    protocol = Repetitions(scale.rounds, warm_up=2)
    setup = DecodeSetup((policy,), scale.model, (scale.decode,), _CPU, torch.float32, protocol=protocol)
    (case,) = measure_decode(setup, _model(scale.model, scale.decode), scale.decode, clock, Deadline(), _fail)
    claim = f"decode at {scale.decode} tokens cut to {scale.budget}: times faster than"
    return [
        Verdict("decode", f"{claim} with {DYNAMIC}", case.ratio(DYNAMIC), 8.0, noise=case.noise),
        Verdict("decode-preallocated", f"{claim} with a full cache written in place", case.ratio(PREALLOCATED), 2.5),
        Verdict("decode-static", f"{claim} with {STATIC}", case.ratio(STATIC), None),
        Verdict(
            "compression-share",
            "compressing every 128 tokens: share of decode time",
            case.facts["compression_share"],
            0.05,
            at_most=True,
        ),
    ], [case]


def _attach(scale: Scale, clock: Clock) -> Judged:
    policy = load("kvpolicy:rkv", budget=scale.short + 100_000)
    protocol = Repetitions(6 * scale.rounds, warm_up=3)
    case = Overhead(policy, scale.short, protocol).measure(_model(scale.model, scale.short), clock)
    claim = "attached with a budget above the length: decode time as a multiple of the plain model's"
    return [Verdict("attach", claim, 1 / case.ratio(DYNAMIC), 1.03, at_most=True, noise=case.noise)], [case]


def _age(scale: Scale, clock: Clock) -> Judged:
    policy = load("kvpolicy:rkv", budget=scale.budget, **_EVERY_128)
    age = Age(policy, 2 * scale.budget, scale.old)
    case = age.measure(_model(scale.small, scale.old), clock)
    between = noise(case.samples["young"], case.samples["young again"])
    claim = f"step time after {scale.old} tokens as a multiple of that after {age.young}; at most 1 and the noise"
    return [Verdict("age", claim, 1 / case.ratio("young"), 1 + between, at_most=True, noise=between)], [case]


def _packed(scale: Scale, clock: Clock) -> Judged:
    policies = tuple(load(f"kvpolicy:{name}", budget="100%") for name in _PACKED)
    protocol = Repetitions(scale.rounds, warm_up=2)
    setup = DecodeSetup(policies, scale.real, scale.packed, _CPU, torch.float32, full=(DYNAMIC,), protocol=protocol)
    model, verdicts, cases = _model(scale.real, max(scale.packed)), [], []
    for length in scale.packed:
        for case in measure_decode(setup, model, length, clock, Deadline(), _fail):
            claim = f"{case.what} over {length} tokens, all held: decode time as a multiple of {DYNAMIC}'s"
            value = 1 / case.ratio(DYNAMIC)
            verdicts.append(Verdict(f"packed-{case.what}-{length}", claim, value, None, at_most=True, noise=case.noise))
            cases.append(case)
    return verdicts, cases


GATES: dict[str, Gate] = {
    "snapkv-bfloat16": partial(_snapkv, torch.bfloat16, 3.0),
    "snapkv-float32": partial(_snapkv, torch.float32, 2.5),
    "rkv": _rkv,
    "compaction": _compaction,
    "decode": _decode,
    "attach": _attach,
    "age": _age,
    "packed": _packed,
}


def judge(names: tuple[str, ...], scale: Scale, clock: Clock) -> Iterator[tuple[str, Judged]]:
    """The gates of these names, one after the other."""
    for name in names:
        yield name, GATES[name](scale, clock)


def _compressed(name: str, length: int, dtype: torch.dtype, scale: Scale, clock: Clock) -> Case:
    policy = load(f"kvpolicy:{name}", budget=scale.budget)
    setup = CompressSetup((policy,), scale.attention, (length,), _CPU, dtype, protocol=Repetitions(scale.rounds))
    case = measure_one(setup, policy, length, clock, Deadline(), _fail)
    if NAIVE not in case.samples:
        raise InputError(f"the gate {name} needs the naive form, which was left out")
    return case


def _model(shape: ModelShape, length: int) -> LlamaForCausalLM:
    return random_model(shape, length, _CPU, torch.float32)


def _fail(what: str, why: str) -> None:
    raise InputError(f"{what}: {why}")
