"""Estimates the speed of a long generation from decode steps at a few lengths."""

from kvpolicy.bench.baselines.contenders import Contender, PolicyContender
from kvpolicy.bench.caches.decoding import Decoding
from kvpolicy.bench.generation.batch_size import at_length
from kvpolicy.bench.generation.memory import tidy
from kvpolicy.bench.generation.setup import ROOM, GenerateSetup, LargestBatch, Throughput
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.decode_steps import time_round, time_steps
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.protocol.left_out import NO_TIME, LeftOut, leaving_out

_WARM_UP = 2


def sampled(
    setup: GenerateSetup,
    contenders: list[Contender],
    batches: dict[str, LargestBatch],
    clock: Clock,
    deadline: Deadline,
    left_out: LeftOut,
) -> dict[str, Throughput]:
    """Full caches: steps at a few lengths, linear in between. Policies: rounds from one compression to the next."""
    throughputs = {}
    for contender in contenders:
        what, batch = f"speed of {contender.name}", batches[contender.name]
        if deadline.expired():
            left_out(what, NO_TIME)
            continue
        with leaving_out(what, left_out):
            timed = _of_policy if isinstance(contender, PolicyContender) else _of_full
            seconds, facts = timed(setup, contender, batch.rows, clock)
            per_row = tuple(step / batch.rows for step in seconds)
            throughputs[contender.name] = Throughput(batch, per_row, facts)
        tidy(setup.device)
    return throughputs


def _of_policy(
    setup: GenerateSetup, contender: Contender, rows: int, clock: Clock
) -> tuple[list[float], dict[str, float]]:
    """Whole rounds from one compression to the next, at one length; single steps of a policy that has no rounds."""
    decoding = at_length(setup, contender, rows, setup.length - ROOM)
    for _ in range(_WARM_UP):
        decoding.step()
    rounds = [time_round(decoding, clock) for _ in range(setup.rounds)]
    if all(rounds):
        return [whole["mean_step_seconds"] for whole in rounds], rounds[-1]
    return _steps(setup, decoding, clock, warm_up=0), {}


def _of_full(
    setup: GenerateSetup, contender: Contender, rows: int, clock: Clock
) -> tuple[list[float], dict[str, float]]:
    """Mean over the generation of the step time at its points, the longest first; one number a round."""
    points = max(2, setup.points)
    apart = (setup.new - ROOM) / (points - 1)
    steps = []
    for point in reversed(range(points)):
        decoding = at_length(setup, contender, rows, setup.prompt + round(point * apart))
        steps.append(_steps(setup, decoding, clock, _WARM_UP))
        del decoding
        tidy(setup.device)
    return [_trapezoid(of_round) for of_round in zip(*steps, strict=True)], {}


def _steps(setup: GenerateSetup, decoding: Decoding, clock: Clock, warm_up: int) -> list[float]:
    return list(time_steps({"": decoding}, clock, Repetitions(setup.rounds, warm_up))[""])


def _trapezoid(values: tuple[float, ...]) -> float:
    """Mean of a function that is given at equal distances and linear in between."""
    return (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)
