"""The gate of prompts whose every query counts: policies that follow attention, against the plain model."""

from kvpolicy.bench.cases.forwards import Forwards
from kvpolicy.bench.gates.gate import Judged, as_multiple, model_of
from kvpolicy.bench.gates.scale import Scale
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.policy import load


def prompts(scale: Scale, clock: Clock) -> Judged:
    """One forward of a whole prompt."""
    policies = tuple(load(f"kvpolicy:{name}", budget="25%") for name in ("h2o", "d2o", "gkv"))
    forwards = Forwards(policies, scale.real, 0, scale.prompt, Repetitions(3))
    cases = forwards.measure(model_of(scale.real, scale.prompt), clock)
    what = f"prompt of {scale.prompt} tokens under"
    return [as_multiple(case, f"prompt-{case.what}", f"{what} {case.what}", 1.6) for case in cases], cases
