"""Gates of a decode step over what a policy has kept, and of attaching one that evicts nothing."""

import torch

from kvpolicy.bench.baselines.contenders import DYNAMIC, PREALLOCATED, STATIC
from kvpolicy.bench.cases.decode import DecodeSetup, measure_one
from kvpolicy.bench.cases.overhead import Age, Overhead
from kvpolicy.bench.gates.gate import CPU, Judged, model_of, must_be_measured
from kvpolicy.bench.gates.scale import Scale
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.protocol.samples import noise
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.policy import load

_EVERY_128 = {"compress": {"prefill": True, "every": 128}}


def decode(scale: Scale, clock: Clock) -> Judged:
    """A long context cut to a budget, against full caches."""
    policy = load("kvpolicy:snapkv", budget=scale.budget, **_EVERY_128)
    protocol = Repetitions(scale.rounds, warm_up=2)
    setup = DecodeSetup((policy,), scale.model, (scale.decode,), CPU, torch.float32, protocol=protocol)
    model = model_of(scale.model, scale.decode)
    (case,) = measure_one(setup, model, scale.decode, clock, Deadline(), must_be_measured)
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


def tenth(scale: Scale, clock: Clock) -> Judged:
    """A context that small models have, cut to a tenth: compressing counts as part of a step."""
    policies = tuple(load(f"kvpolicy:{name}", budget=scale.context // 10, **_EVERY_128) for name in ("snapkv", "rkv"))
    protocol, full = Repetitions(scale.rounds, warm_up=2), (DYNAMIC, PREALLOCATED)
    setup = DecodeSetup(policies, scale.real, (scale.context,), CPU, torch.float32, full=full, protocol=protocol)
    model = model_of(scale.real, scale.context)
    cases = measure_one(setup, model, scale.context, clock, Deadline(), must_be_measured)
    verdicts = []
    for case in cases:
        alone = 1 - case.facts["compression_share"]
        for suffix, baseline, aim in (("", DYNAMIC, 1.6), ("-preallocated", PREALLOCATED, 1.2)):
            claim = f"{case.what}, {scale.context} tokens cut to a tenth: tokens a second as a multiple of {baseline}'s"
            value = case.ratio(baseline) * alone
            gate = f"tenth-{case.what}{suffix}"
            verdicts.append(Verdict(gate, claim, value, aim, noise=case.noise, claimed=False))
    return verdicts, cases


def attach(scale: Scale, clock: Clock) -> Judged:
    """A budget above the length, against the plain model."""
    policy = load("kvpolicy:rkv", budget=scale.short + 100_000)
    protocol = Repetitions(6 * scale.rounds, warm_up=3)
    case = Overhead(policy, scale.short, protocol).measure(model_of(scale.model, scale.short), clock)
    claim = "attached with a budget above the length: decode time as a multiple of the plain model's"
    return [Verdict("attach", claim, 1 / case.ratio(DYNAMIC), 1.03, at_most=True, noise=case.noise)], [case]


def age(scale: Scale, clock: Clock) -> Judged:
    """Steps after many generated tokens against steps after few."""
    policy = load("kvpolicy:rkv", budget=scale.budget, **_EVERY_128)
    of_age = Age(policy, 2 * scale.budget, scale.old)
    case = of_age.measure(model_of(scale.small, scale.old), clock)
    between = noise(case.samples["young"], case.samples["young again"])
    claim = f"step time after {scale.old} tokens as a multiple of that after {of_age.young}; at most 1 and the noise"
    return [Verdict("age", claim, 1 / case.ratio("young"), 1 + between, at_most=True, noise=between)], [case]
