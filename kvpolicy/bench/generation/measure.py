"""The whole measurement: batches first, then speed."""

from collections.abc import Iterator
from contextlib import ExitStack

import attrs
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import Contender, FullCache, PolicyContender
from kvpolicy.bench.cases.compress import LeftOut
from kvpolicy.bench.cases.decode import in_time
from kvpolicy.bench.generation.batch_size import largest_batch
from kvpolicy.bench.generation.every_token import generated
from kvpolicy.bench.generation.sampled_steps import sampled
from kvpolicy.bench.generation.setup import GenerateSetup, Throughput
from kvpolicy.bench.protocol.case import OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.errors import KVPolicyError
from kvpolicy.policy import Policy


def measure(
    setup: GenerateSetup, model: LlamaForCausalLM, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Iterator[tuple[str, list[Case]]]:
    """First the batches, then the speed of all contenders; the cases come last."""
    with ExitStack() as stack:
        contenders = _contenders(setup, model, stack, deadline, left_out)
        batches = {}
        for place, one in enumerate(contenders):
            share = deadline.share(0.5 / (len(contenders) - place))
            batches[one.name] = largest_batch(setup, one, share, left_out)
            yield f"batch of {one.name}: {batches[one.name].rows}", []
        running = [one for one in contenders if batches[one.name].rows]
        if setup.points:
            found = sampled(setup, running, batches, clock, deadline, left_out)
        else:
            found = generated(setup, running, batches, deadline, left_out)
    yield "speed", _cases(setup, found)


def _contenders(
    setup: GenerateSetup, model: LlamaForCausalLM, stack: ExitStack, deadline: Deadline, left_out: LeftOut
) -> list[Contender]:
    found: list[Contender] = [FullCache(name, model) for name in in_time(setup.full, deadline, left_out)]
    for policy in setup.policies:
        try:
            contender = PolicyContender.of(policy, model, graph=setup.graph)
            stack.enter_context(contender.open())
            found.append(contender)
        except KVPolicyError as error:
            left_out(policy.name, str(error).splitlines()[0])
    return found


def _cases(setup: GenerateSetup, found: dict[str, Throughput]) -> list[Case]:
    return [_case(setup, policy, found) for policy in setup.policies if policy.name in found]


def _case(setup: GenerateSetup, policy: Policy, found: dict[str, Throughput]) -> Case:
    own = {OURS: found[policy.name], **{name: found[name] for name in setup.full if name in found}}
    rounds = min(len(one.seconds) for one in own.values())
    shape = {"prompt": setup.prompt, "new": setup.new, "memory": setup.memory, "graph": setup.graph}
    how = f"steps at {setup.points} lengths" if setup.points else "every token generated"
    return Case(
        policy.name,
        setup.length,
        samples={name: one.seconds[:rounds] for name, one in own.items()},
        shape={**attrs.asdict(setup.shape), **shape, "dtype": str(setup.dtype).removeprefix("torch.")},
        facts={
            "digest": policy.digest,
            "how": how,
            "rows": {name: one.batch.rows for name, one in own.items()},
            "peak_bytes": {name: one.batch.peak_bytes for name, one in own.items()},
            "tokens_per_second": {name: rounds / sum(one.seconds[:rounds]) for name, one in own.items()},
            "more": {name: one.facts for name, one in own.items()},
        },
    )
