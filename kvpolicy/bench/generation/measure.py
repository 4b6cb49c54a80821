"""The generation benchmark: finds the largest batches, then measures the speed at them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import attrs
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import Contender, PolicyContender, full_caches
from kvpolicy.bench.generation.batch_size import largest_batch
from kvpolicy.bench.generation.every_token import generated
from kvpolicy.bench.generation.sampled_steps import sampled
from kvpolicy.bench.generation.setup import GenerateSetup, Throughput
from kvpolicy.bench.protocol.case import OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.left_out import LeftOut, leaving_out
from kvpolicy.policy import Policy


def measure(
    setup: GenerateSetup, model: LlamaForCausalLM, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Iterator[tuple[str, list[Case]]]:
    """First the batches, then the speed of all contenders; the cases come last."""
    with ExitStack() as stack:
        contenders = _contenders(setup, model, stack, deadline, left_out)
        batches = {}
        for done, contender in enumerate(contenders):
            share = deadline.share(0.5 / (len(contenders) - done))
            batches[contender.name] = largest_batch(setup, contender, share, left_out)
            yield f"batch of {contender.name}: {batches[contender.name].rows}", []
        fitting = [contender for contender in contenders if batches[contender.name].rows]
        if setup.points:
            throughputs = sampled(setup, fitting, batches, clock, deadline, left_out)
        else:
            throughputs = generated(setup, fitting, batches, deadline, left_out)
    yield "speed", [_case(setup, policy, throughputs) for policy in setup.policies if policy.name in throughputs]


def _contenders(
    setup: GenerateSetup, model: LlamaForCausalLM, stack: ExitStack, deadline: Deadline, left_out: LeftOut
) -> list[Contender]:
    contenders = full_caches(setup.full, model, deadline, left_out)
    for policy in setup.policies:
        with leaving_out(policy.name, left_out):
            contender = PolicyContender.of(policy, model, graph=setup.graph)
            stack.enter_context(contender.open())
            contenders.append(contender)
    return contenders


def _case(setup: GenerateSetup, policy: Policy, throughputs: Mapping[str, Throughput]) -> Case:
    own = {OURS: throughputs[policy.name], **{name: throughputs[name] for name in setup.full if name in throughputs}}
    rounds = min(len(throughput.seconds) for throughput in own.values())
    seconds = {name: throughput.seconds[:rounds] for name, throughput in own.items()}
    shape = {"prompt": setup.prompt, "new": setup.new, "memory": setup.memory, "graph": setup.graph}
    return Case(
        policy.name,
        setup.length,
        samples=seconds,
        shape={**attrs.asdict(setup.shape), **shape, "dtype": str(setup.dtype).removeprefix("torch.")},
        facts={
            "digest": policy.digest,
            "how": f"steps at {setup.points} lengths" if setup.points else "every token generated",
            "rows": {name: throughput.batch.rows for name, throughput in own.items()},
            "largest": {name: throughput.batch.searched for name, throughput in own.items()},
            "peak_bytes": {name: throughput.batch.peak_bytes for name, throughput in own.items()},
            "tokens_per_second": {name: rounds / sum(of_name) for name, of_name in seconds.items()},
            "more": {name: throughput.facts for name, throughput in own.items()},
        },
    )
