"""Gates of what a policy adds to a step whose arithmetic is next to nothing: the time of the host."""

import attrs
import torch

from kvpolicy.bench.baselines.contenders import DYNAMIC
from kvpolicy.bench.cases.decode import DecodeSetup, measure_one
from kvpolicy.bench.cases.host_time import HostTime
from kvpolicy.bench.gates.gate import CPU, Judged, as_multiple, model_of, must_be_measured
from kvpolicy.bench.gates.scale import Scale
from kvpolicy.bench.protocol.case import OURS
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.policy import Policy, load

_WHOLE = ("full", "kivi4")  # policies that hold all entries
_AIMS = {"full": 1.1, "snapkv": 1.2, "rkv": 1.2, "adakv": 1.3, "kivi4": 1.6, "h2o": 2.0, "keepkv": 3.0}
_MICROSECONDS = 30.0


def thin(scale: Scale, clock: Clock) -> Judged:
    """A step of a deep and thin model under policies as they are shipped; h2o and keepkv evict at every token."""
    shape, length = scale.thin, scale.thin_context
    policies, protocol = _policies(tuple(_AIMS), scale.thin_budget), Repetitions(6 * scale.rounds, warm_up=3)
    setup = DecodeSetup(
        policies,
        shape,
        (length,),
        CPU,
        torch.float32,
        full=(DYNAMIC,),
        floors=True,
        whole_round=False,
        protocol=protocol,
    )
    model, verdicts, cases = model_of(shape, length), [], []
    for rows in scale.thin_rows:
        of_rows = attrs.evolve(setup, rows=rows)
        for case in measure_one(of_rows, model, length, clock, Deadline(), must_be_measured):
            what = f"step of {shape.layers} thin layers under {case.what}, batch {rows}"
            gate, floor = f"thin-{case.what}-{rows}", case.of_floor(DYNAMIC)
            verdicts.append(as_multiple(case, gate, what, _AIMS[case.what], floor))
            cases.append(case)
    return verdicts, cases


def wide(scale: Scale, clock: Clock) -> Judged:
    """What the layers of many rows and heads take for one token, without the model and its attention."""
    rows, length = scale.wide_rows, scale.wide_context
    policies = _policies(("full", "snapkv"), 64 * length)
    measured = HostTime(policies, scale.wide, rows, length, Repetitions(6 * scale.rounds, warm_up=3))
    cases = measured.measure(model_of(scale.wide, length), clock)
    heads = scale.wide.kv_heads
    verdicts = []
    for case in cases:
        claim = f"{case.what}, {rows} rows, {heads} KV heads, nothing evicted: µs a layer and token beside attention"
        value, floor = 1e6 * case.seconds(OURS), 1e6 * case.floor / case.parts
        verdicts.append(
            Verdict(
                f"wide-{case.what}",
                claim,
                value,
                _MICROSECONDS,
                at_most=True,
                noise=case.noise,
                claimed=False,
                floor=floor,
            )
        )
    return verdicts, cases


def _policies(names: tuple[str, ...], budget: int) -> tuple[Policy, ...]:
    return tuple(load(f"kvpolicy:{name}", **({} if name in _WHOLE else {"budget": budget})) for name in names)
