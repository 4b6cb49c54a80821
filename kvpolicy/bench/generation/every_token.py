"""Times whole generations: every token of the batch is generated."""

import random

import attrs
import torch

from kvpolicy.bench.baselines.contenders import Contender
from kvpolicy.bench.caches.decoding import Decoding
from kvpolicy.bench.caches.meter import Meter
from kvpolicy.bench.generation.memory import Memory, tidy
from kvpolicy.bench.generation.setup import GenerateSetup, LargestBatch, Throughput
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.left_out import NO_TIME, LeftOut


@attrs.frozen
class Generation:
    """Time and memory of one generation of a batch."""

    seconds: float  # per token
    prompt_seconds: float
    peak: int
    process_memory: dict[str, int]


def generated(
    setup: GenerateSetup,
    contenders: list[Contender],
    batches: dict[str, LargestBatch],
    deadline: Deadline,
    left_out: LeftOut,
) -> dict[str, Throughput]:
    """Generate with all contenders in turns, in an order drawn anew for each round."""
    order = random.Random(setup.seed)  # noqa: S311 - an order, not a secret
    generations: dict[str, list[Generation]] = {contender.name: [] for contender in contenders}
    for turn in range(setup.rounds):
        if turn and deadline.expired():
            left_out(f"round {turn + 1} of {setup.rounds}", NO_TIME)
            break
        for contender in order.sample(contenders, len(contenders)):
            generations[contender.name].append(_generate(setup, contender, batches[contender.name].rows))
            tidy(setup.device)
    return {name: _throughput(batches[name], of_one) for name, of_one in generations.items() if of_one}


@torch.no_grad()
def _generate(setup: GenerateSetup, contender: Contender, rows: int) -> Generation:
    random = torch.Generator().manual_seed(setup.seed)
    prompt = torch.randint(1, setup.shape.vocabulary, (rows, setup.prompt), generator=random).to(setup.device)
    decoding = Decoding(contender.forward, contender.cache(setup.length), prompt)
    with Memory(setup.device) as memory, Meter(contender.model, decoding.cache) as meter:
        for _ in range(setup.new):
            decoding.step()
        memory.note(meter.peak_bytes)
    per_token = meter.decode_seconds / (setup.new - 1) / rows
    return Generation(per_token, meter.prompt_seconds, memory.peak, memory.of_process())


def _throughput(batch: LargestBatch, generations: list[Generation]) -> Throughput:
    prompts = [generation.prompt_seconds for generation in generations]
    facts = {"prompt_seconds": prompts, **generations[-1].process_memory}
    measured = attrs.evolve(batch, peak_bytes=max(generation.peak for generation in generations))
    return Throughput(measured, tuple(generation.seconds for generation in generations), facts)
