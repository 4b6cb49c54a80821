"""Gates of stores that hold every entry in few bits: a step, and a chunk of tokens, against the plain cache."""

import torch
from transformers.utils.import_utils import is_optimum_quanto_available

from kvpolicy.bench.baselines.contenders import DYNAMIC, QUANTO
from kvpolicy.bench.cases.decode import DecodeSetup, measure_one
from kvpolicy.bench.cases.forwards import Forwards
from kvpolicy.bench.gates.gate import CPU, Judged, as_multiple, model_of, must_be_measured
from kvpolicy.bench.gates.scale import Scale
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.policy import Policy, load

_STORES = ("kivi4", "rotation4", "rotation3")
_LONG = 4096  # tokens from which reading fewer bytes should be faster than reading more


def steps(scale: Scale, clock: Clock) -> Judged:
    """A decode step; where optimum-quanto is installed, also against transformers' cache in 4 bits."""
    full = (DYNAMIC, QUANTO) if is_optimum_quanto_available() else (DYNAMIC,)
    protocol = Repetitions(scale.rounds, warm_up=2)
    setup = DecodeSetup(
        _policies(), scale.real, scale.packed, CPU, torch.float32, full=full, floors=True, protocol=protocol
    )
    model, verdicts, cases = model_of(scale.real, max(scale.packed)), [], []
    for length in scale.packed:
        for case in measure_one(setup, model, length, clock, Deadline(), must_be_measured):
            what, aim = f"step over {length} tokens of {case.what}", 0.8 if length >= _LONG else 1.2
            gate, floor = f"packed-{case.what}-{length}", case.of_floor(DYNAMIC)
            verdicts.append(as_multiple(case, gate, what, aim, floor))
            if QUANTO in full:
                verdicts.append(as_multiple(case, f"{gate}-quanto", what, 0.8, of=QUANTO))
            cases.append(case)
    return verdicts, cases


def chunks(scale: Scale, clock: Clock) -> Judged:
    """A chunk of tokens behind those that are held."""
    length = min(scale.packed)
    forwards = Forwards(_policies(), scale.real, length, scale.chunk, Repetitions(scale.rounds))
    cases = forwards.measure(model_of(scale.real, length + scale.chunk), clock)
    what = f"{scale.chunk} tokens behind {length} of"
    return [as_multiple(case, f"chunk-{case.what}", f"{what} {case.what}", 1.3) for case in cases], cases


def _policies() -> tuple[Policy, ...]:
    return tuple(load(f"kvpolicy:{name}", budget="100%") for name in _STORES)
