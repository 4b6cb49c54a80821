"""The largest batch of a contender."""

import torch

from kvpolicy.bench.baselines.contenders import (
    COMPILED,
    STATIC,
    Contender,
    FullCache,
    PolicyContender,
    decoding_at,
)
from kvpolicy.bench.caches.decoding import Decoding, fill_until_due
from kvpolicy.bench.caches.meter import held_bytes
from kvpolicy.bench.generation.memory import Memory, tidy
from kvpolicy.bench.generation.search import largest
from kvpolicy.bench.generation.setup import GenerateSetup, LargestBatch
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.left_out import NO_TIME, LeftOut, leaving_out

_MOST_ROWS = 1024


def largest_batch(setup: GenerateSetup, contender: Contender, deadline: Deadline, left_out: LeftOut) -> LargestBatch:
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

    with leaving_out(contender.name, left_out):
        rows = largest(fits, _MOST_ROWS, deadline.expired)
        if rows:
            searched = not deadline.expired()
            if not searched:
                left_out(f"larger batches of {contender.name}", NO_TIME)
            return LargestBatch(rows, peaks[rows], searched)
        left_out(contender.name, f"one row of {setup.length} tokens does not fit {setup.memory} bytes")
    return LargestBatch()


def peak_at(setup: GenerateSetup, contender: Contender, rows: int) -> int:
    """Bytes of a batch in its last steps."""
    decoding = at_length(setup, contender, rows, setup.length - 2)
    fill_until_due(decoding.cache, contender.model, rows)
    with Memory(setup.device) as memory:
        for _ in range(2):
            decoding.step()
            memory.note(held_bytes(decoding.cache))
    return memory.peak


def at_length(setup: GenerateSetup, contender: Contender, rows: int, length: int) -> Decoding:
    """A batch after `length` tokens; one under a policy with a budget in tokens needs no more than fill it."""
    filled = length
    if isinstance(contender, PolicyContender) and contender.policy.spec.budget.tokens is not None:
        filled = min(length, 2 * contender.policy.spec.budget.tokens)
    return decoding_at(contender, rows, filled, setup.length - length)
