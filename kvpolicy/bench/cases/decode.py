"""Time of a decode step at a context length: policies and full caches, all in turns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from kvpolicy.bench.baselines.contenders import (
    COMPILED,
    COMPILING,
    DYNAMIC,
    FULL,
    PREALLOCATED,
    STATIC,
    Contender,
    FullCache,
    PolicyContender,
)
from kvpolicy.bench.baselines.full_caches import fill
from kvpolicy.bench.cases.compress import LeftOut
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Call, Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Protocol, Variant, interleave
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.errors import InputError, KVPolicyError
from kvpolicy.evaluate.meter import held_bytes
from kvpolicy.policy import Policy
from kvpolicy.runtime.cache import PolicyCache

MOST_ROUND = 512  # steps from one compression to the next, up to which a whole round is timed


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
    rounds: bool = True  # whether whole rounds of compression are timed as well
    protocol: Protocol = Protocol(rounds=11, warm_up=3)

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


@attrs.define(eq=False)
class Running:
    """A contender in the middle of a sequence."""

    contender: Contender
    cache: Cache
    token: Tensor  # [B, 1], the newest

    @classmethod
    def filled(cls, contender: Contender, rows: int, length: int, room: int) -> "Running":
        """After `length` random entries, with room for more."""
        cache, model = contender.cache(length + room), contender.model
        with torch.no_grad():
            fill(cache, model.config, rows, length, model.dtype, model.device)
        return cls(contender, cache, torch.ones((rows, 1), dtype=torch.long, device=model.device))

    def step(self) -> None:
        """One more token for every row."""
        self.token = self.contender.forward(self.token, self.cache).clone()

    def fresh(self) -> Call:
        """For the protocol: every call is the next step."""
        return self.step


def measure(
    setup: DecodeSetup, model: LlamaForCausalLM, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Iterator[tuple[str, list[Case]]]:
    """All policies at every length, the short ones first."""
    for length in sorted(setup.lengths):
        what = f"{length} tokens"
        if deadline.expired():
            left_out(what, "no time was left")
            yield what, []
            continue
        yield what, measure_one(setup, model, length, clock, deadline, left_out)


def measure_one(
    setup: DecodeSetup, model: LlamaForCausalLM, length: int, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> list[Case]:
    """One case per policy; the full caches are timed once, in the same rounds."""
    with ExitStack() as stack:
        start = partial(_started, setup, length, stack, left_out)
        names = in_time(setup.full, deadline, left_out)
        full = [one for name in names if (one := start(partial(FullCache, name, model)))]
        ours = [one for policy in setup.policies for one in _twice(policy, model, setup, start)]
        variants = [Variant(_label(one), one.fresh) for one in (*full, *ours)]
        samples = interleave(variants, clock, setup.protocol, expired=deadline.expired)
        rounds = {_label(one): whole_round(one, clock) for one in ours if setup.rounds and not deadline.expired()}
        held = {_label(one): held_bytes(one.cache) for one in (*full, *ours)}
    return [_case(setup, policy, length, samples, rounds, held) for policy in setup.policies if policy.name in samples]


def whole_round(running: Running, clock: Clock) -> dict[str, float]:
    """Every step from one compression to the next: their mean, and the share of the time that compressing takes.

    That share is what the steps that compress take longer than the median of the others. Empty for a policy that does
    not compress while it decodes, or too rarely.
    """
    cache = running.cache
    if not isinstance(cache, PolicyCache) or not 1 < cache.plan.budgets.slack <= MOST_ROUND:
        return {}
    plain: list[float] = []
    compressing: list[float] = []
    for _ in range(cache.plan.budgets.slack):
        before = _compressions(cache)
        seconds = clock.time(running.step)
        (plain if _compressions(cache) == before else compressing).append(seconds)
    if not plain:
        return {}
    total = sum(plain) + sum(compressing)
    extra = sum(compressing) - len(compressing) * median(plain)
    return {
        "mean_step_seconds": total / (len(plain) + len(compressing)),
        "compressing_steps": len(compressing),
        "compression_share": max(0.0, extra) / total,
    }


def _started(
    setup: DecodeSetup, length: int, stack: ExitStack, left_out: LeftOut, make: Callable[[], Contender]
) -> Running | None:
    try:
        contender = make()
        stack.enter_context(contender.open())
        running = Running.filled(contender, setup.rows, length, setup.steps)
        running.step()
    except (KVPolicyError, torch.OutOfMemoryError) as error:
        left_out(f"decode at {length} tokens", str(error).splitlines()[0])
        return None
    return running


def _twice(
    policy: Policy, model: LlamaForCausalLM, setup: DecodeSetup, start: Callable[..., Running | None]
) -> list[Running]:
    """The same policy under two names: what they differ by is noise."""
    found = [start(partial(PolicyContender.of, policy, model, graph=setup.graph)) for _ in range(2)]
    running = [one for one in found if one is not None]
    for one in running[1:]:
        one.contender.name = _again(policy.name)
    return running if len(running) == len(found) else []


def in_time(names: Sequence[str], deadline: Deadline, left_out: LeftOut) -> Sequence[str]:
    """The full caches for which there is time: compiling cannot be broken off."""
    if COMPILED not in names or deadline.left >= COMPILING:
        return names
    left_out(COMPILED, f"{deadline.left:.0f} s were left, and compiling may take {COMPILING:.0f}")
    return [name for name in names if name != COMPILED]


def _label(running: Running) -> str:
    return running.contender.name


def _again(name: str) -> str:
    return f"{name} again"


def _case(
    setup: DecodeSetup,
    policy: Policy,
    length: int,
    samples: dict[str, tuple[float, ...]],
    rounds: dict[str, dict[str, float]],
    held: dict[str, int],
) -> Case:
    own = {OURS: policy.name, AGAIN: _again(policy.name)}
    named = {**own, **{name: name for name in setup.full if name in samples}}
    shape = {"rows": setup.rows, "dtype": str(setup.dtype).removeprefix("torch."), "graph": setup.graph}
    facts: dict[str, Any] = {"digest": policy.digest, "held_bytes": {one: held[name] for one, name in named.items()}}
    return Case(
        policy.name,
        length,
        samples={one: samples[name] for one, name in named.items()},
        shape={**attrs.asdict(setup.shape), **shape},
        facts={**facts, **rounds.get(policy.name, {})},
    )


def _compressions(cache: PolicyCache) -> int:
    return sum(stats.compressions for stats in cache.stats)
