"""Every token of a generation."""

import random

import attrs
import torch

from kvpolicy.bench.baselines.contenders import Contender
from kvpolicy.bench.cases.compress import LeftOut
from kvpolicy.bench.generation.memory import Memory, tidy
from kvpolicy.bench.generation.setup import Batch, GenerateSetup, Throughput
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.evaluate.meter import Meter


@attrs.frozen
class Run:
    """One generation of a batch."""

    seconds: float  # per token
    prompt_seconds: float
    peak: int
    more: dict[str, int]


def generated(
    setup: GenerateSetup,
    contenders: list[Contender],
    batches: dict[str, Batch],
    deadline: Deadline,
    left_out: LeftOut,
) -> dict[str, Throughput]:
    """Every token of every row, in turns, in an order drawn anew for each round."""
    order = random.Random(setup.seed)  # noqa: S311 - an order, not a secret
    found: dict[str, list[Run]] = {one.name: [] for one in contenders}
    for turn in range(setup.rounds):
        if turn and deadline.expired():
            left_out(f"round {turn + 1} of {setup.rounds}", "no time was left")
            break
        for one in order.sample(contenders, len(contenders)):
            found[one.name].append(_generate(setup, one, batches[one.name].rows))
            tidy(setup.device)
    return {name: _throughput(batches[name], runs) for name, runs in found.items() if runs}


@torch.no_grad()
def _generate(setup: GenerateSetup, contender: Contender, rows: int) -> Run:
    random = torch.Generator().manual_seed(setup.seed)
    prompt = torch.randint(1, setup.shape.vocabulary, (rows, setup.prompt), generator=random).to(setup.device)
    cache = contender.cache(setup.length)
    with Memory(setup.device) as memory, Meter(contender.model, cache) as meter:
        token = contender.forward(prompt, cache)
        for _ in range(setup.new - 1):
            token = contender.forward(token, cache)
        memory.note(meter.peak_bytes)
    per_token = meter.decode_seconds / (setup.new - 1) / rows
    return Run(per_token, meter.prompt_seconds, memory.peak, memory.more())


def _throughput(batch: Batch, runs: list[Run]) -> Throughput:
    facts = {"prompt_seconds": [one.prompt_seconds for one in runs], **runs[-1].more}
    measured = attrs.evolve(batch, peak_bytes=max(one.peak for one in runs))
    return Throughput(measured, tuple(one.seconds for one in runs), facts)
