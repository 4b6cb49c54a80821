"""Steps at some lengths of a generation that would take too long."""

import torch

from kvpolicy.bench.baselines.contenders import Contender, PolicyContender
from kvpolicy.bench.cases.compress import LeftOut
from kvpolicy.bench.cases.decode import whole_round
from kvpolicy.bench.generation.batch_size import at_length
from kvpolicy.bench.generation.memory import tidy
from kvpolicy.bench.generation.setup import ROOM, Batch, GenerateSetup, Throughput
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.errors import KVPolicyError

_WARM_UP = 2


def sampled(
    setup: GenerateSetup,
    contenders: list[Contender],
    batches: dict[str, Batch],
    clock: Clock,
    deadline: Deadline,
    left_out: LeftOut,
) -> dict[str, Throughput]:
    """Steps at some lengths, joined by straight lines; and whole rounds of policies, whose steps stay the same."""
    found = {}
    for one in contenders:
        if deadline.expired():
            left_out(f"speed of {one.name}", "no time was left")
            continue
        try:
            found[one.name] = _sample(setup, one, batches[one.name], clock)
        except (KVPolicyError, torch.OutOfMemoryError) as error:
            left_out(f"speed of {one.name}", str(error).splitlines()[0])
        tidy(setup.device)
    return found


def _sample(setup: GenerateSetup, contender: Contender, batch: Batch, clock: Clock) -> Throughput:
    if isinstance(contender, PolicyContender):
        seconds, facts = _of_policy(setup, contender, batch.rows, clock)
    else:
        seconds, facts = _of_full(setup, contender, batch.rows, clock), {}
    return Throughput(batch, tuple(one / batch.rows for one in seconds), facts)


def _of_policy(
    setup: GenerateSetup, contender: Contender, rows: int, clock: Clock
) -> tuple[list[float], dict[str, float]]:
    """Its steps stay the same: whole rounds from one compression to the next, or single steps if it has no rounds."""
    running = at_length(setup, contender, rows, setup.length - ROOM)
    for _ in range(_WARM_UP):
        running.step()
    rounds = [whole_round(running, clock) for _ in range(setup.rounds)]
    if all(rounds):
        return [one["mean_step_seconds"] for one in rounds], rounds[-1]
    return [clock.time(running.step) for _ in range(setup.rounds)], {}


def _of_full(setup: GenerateSetup, contender: Contender, rows: int, clock: Clock) -> list[float]:
    """Mean over the generation of the step time at its points, the longest first; one number a round."""
    apart = (setup.new - ROOM) / (max(2, setup.points) - 1)
    steps = []
    for place in reversed(range(max(2, setup.points))):
        running = at_length(setup, contender, rows, setup.prompt + round(place * apart))
        for _ in range(_WARM_UP):
            running.step()
        steps.append([clock.time(running.step) for _ in range(setup.rounds)])
        del running
        tidy(setup.device)
    return [_trapezoid([one[turn] for one in steps]) for turn in range(setup.rounds)]


def _trapezoid(values: list[float]) -> float:
    """Mean of a function that is given at equal distances, straight in between."""
    return (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)
