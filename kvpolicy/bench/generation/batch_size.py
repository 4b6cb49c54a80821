"""The largest batch of a contender."""

import torch

from kvpolicy.bench.baselines.contenders import COMPILED, STATIC, Contender, FullCache, PolicyContender
from kvpolicy.bench.baselines.full_caches import ripen
from kvpolicy.bench.cases.compress import LeftOut
from kvpolicy.bench.cases.decode import Running
from kvpolicy.bench.generation.memory import Memory, tidy
from kvpolicy.bench.generation.search import largest
from kvpolicy.bench.generation.setup import Batch, GenerateSetup
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.errors import KVPolicyError
from kvpolicy.evaluate.meter import held_bytes


def largest_batch(setup: GenerateSetup, contender: Contender, deadline: Deadline, left_out: LeftOut) -> Batch:
    """Rows that fit at full length, the step that compresses included; none when not even one does."""
    peaks: dict[int, int] = {}
    if contender.name == COMPILED:  # the same cache; a step compiled anew for every batch would take minutes
        contender = FullCache(STATIC, contender.model)

    def fits(rows: int) -> bool:
        try:
            peaks[rows] = peak_at(setup, contender, rows)
        except torch.OutOfMemoryError:
            return False
        finally:
            tidy(setup.device)
        return peaks[rows] <= setup.memory

    try:
        found = largest(fits, setup.most, deadline.expired)
    except KVPolicyError as error:
        left_out(contender.name, str(error).splitlines()[0])
        return Batch()
    if not found:
        left_out(contender.name, f"one row of {setup.length} tokens does not fit {setup.memory} bytes")
        return Batch()
    return Batch(found, peaks[found])


def peak_at(setup: GenerateSetup, contender: Contender, rows: int) -> int:
    """Bytes of a batch in its last steps."""
    running = at_length(setup, contender, rows, setup.length - 2)
    ripen(running.cache, contender.model.config, rows, setup.dtype, setup.device)
    with Memory(setup.device) as memory:
        for _ in range(2):
            running.step()
            memory.note(held_bytes(running.cache))
    return memory.peak


def at_length(setup: GenerateSetup, contender: Contender, rows: int, length: int) -> Running:
    """A batch after `length` tokens; one under a policy with a budget in tokens needs no more than fill it."""
    filled = length
    if isinstance(contender, PolicyContender) and contender.policy.spec.budget.tokens is not None:
        filled = min(length, 2 * contender.policy.spec.budget.tokens)
    return Running.filled(contender, rows, filled, setup.length - length)
