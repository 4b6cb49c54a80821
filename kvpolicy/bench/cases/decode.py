"""Time of a decode step at a context length: policies and full caches, all in turns."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import attrs
import torch
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import (
    DYNAMIC,
    FULL,
    PREALLOCATED,
    STATIC,
    Contender,
    PolicyContender,
    decoding_at,
    full_caches,
)
from kvpolicy.bench.caches.decoding import Decoding
from kvpolicy.bench.caches.meter import held_bytes
from kvpolicy.bench.cases.step_floors import StepFloors
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case, again
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.decode_steps import MOST_ROUND, time_round, time_steps
from kvpolicy.bench.protocol.interleave import Repetitions, Samples
from kvpolicy.bench.protocol.left_out import NO_TIME, LeftOut, leaving_out
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.errors import InputError
from kvpolicy.policy import Policy


@attrs.frozen
class DecodeSetup:
    """Which policies decode, after how many tokens, on which model."""

    policies: tuple[Policy, ...]
    shape: ModelShape
    lengths: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    rows: int = 1
    full: tuple[str, ...] = (DYNAMIC, PREALLOCATED, STATIC)
    graph: bool = False
    floors: bool = False  # of steps over what is held
    whole_round: bool = True  # also every step from one compression to the next
    protocol: Repetitions = Repetitions(rounds=11, warm_up=3)

    def __attrs_post_init__(self) -> None:
        if not self.policies or not self.lengths or min(self.lengths) < 1 or self.rows < 1:
            raise InputError("decode needs at least one policy, lengths of at least 1 and --rows of at least 1")
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names) or set(names) & set(FULL):
            raise InputError(f"policies must have different names: {', '.join(names)}")

    @property
    def steps(self) -> int:
        """Tokens that may come after the context."""
        return self.protocol.rounds + self.protocol.warm_up + 2 * MOST_ROUND


def measure(
    setup: DecodeSetup, model: LlamaForCausalLM, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Iterator[tuple[str, list[Case]]]:
    """All policies at every length, the short ones first."""
    for length in sorted(setup.lengths):
        cases = []
        if deadline.expired():
            left_out(f"{length} tokens", NO_TIME)
        else:
            cases = measure_one(setup, model, length, clock, deadline, left_out)
        yield f"{length} tokens", cases


def measure_one(
    setup: DecodeSetup, model: LlamaForCausalLM, length: int, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> list[Case]:
    """One case per policy; the full caches are timed once, in the same rounds."""
    with ExitStack() as stack:
        decodings: dict[str, Decoding] = {}
        for contender in full_caches(setup.full, model, deadline, left_out):
            decodings |= _begun(setup, length, {contender.name: contender}, stack, left_out)
        for policy in setup.policies:  # under two names: what they differ by is noise
            names = (policy.name, again(policy.name))
            contenders = {name: PolicyContender.of(policy, model, graph=setup.graph) for name in names}
            decodings |= _begun(setup, length, contenders, stack, left_out)
        fewest = min(length, *(policy.spec.budget.tokens or length for policy in setup.policies))
        floors = StepFloors.of(model, setup.shape, setup.rows, fewest, setup.steps) if setup.floors else None
        beside = floors.variants() if floors else ()
        samples = time_steps(decodings, clock, setup.protocol, deadline.expired, beside)
        timed = [policy for policy in setup.policies if policy.name in samples]
        rounds = {
            policy.name: time_round(decodings[policy.name], clock)
            for policy in timed
            if setup.whole_round and not deadline.expired()
        }
        cache_bytes = {name: held_bytes(decoding.cache) for name, decoding in decodings.items()}
    cases = [_case(setup, policy, length, samples, rounds.get(policy.name, {}), cache_bytes) for policy in timed]
    if floors is None:
        return cases
    return [attrs.evolve(one, floors=floors.seconds(samples, cache_bytes[one.what])) for one in cases]


def _begun(
    setup: DecodeSetup, length: int, contenders: Mapping[str, Contender], stack: ExitStack, left_out: LeftOut
) -> dict[str, Decoding]:
    """All of them after their first step, or none."""
    decodings = {}
    with leaving_out(f"decode at {length} tokens", left_out):
        for name, contender in contenders.items():
            stack.enter_context(contender.open())
            decodings[name] = decoding_at(contender, setup.rows, length, setup.steps)
            decodings[name].step()
        return decodings
    return {}


def _case(
    setup: DecodeSetup,
    policy: Policy,
    length: int,
    samples: Samples,
    whole_round: Mapping[str, float],
    cache_bytes: Mapping[str, int],
) -> Case:
    names = {OURS: policy.name, AGAIN: again(policy.name)} | {name: name for name in setup.full if name in samples}
    shape = {"rows": setup.rows, "dtype": str(setup.dtype).removeprefix("torch."), "graph": setup.graph}
    held = {variant: cache_bytes[name] for variant, name in names.items()}
    return Case(
        policy.name,
        length,
        samples={variant: samples[name] for variant, name in names.items()},
        shape={**attrs.asdict(setup.shape), **shape},
        facts={"digest": policy.digest, "held_bytes": held, **whole_round},
    )
