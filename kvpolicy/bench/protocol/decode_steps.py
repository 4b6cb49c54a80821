"""Time of decode steps: single ones of several sequences in turns, and all steps from one compression to the next."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from kvpolicy.bench.caches.decoding import Decoding
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.interleave import Repetitions, Samples, Variant, interleave

MOST_ROUND = 512  # steps from one compression to the next, up to which a whole round is timed


def time_steps(
    decodings: Mapping[str, Decoding],
    clock: Clock,
    protocol: Repetitions,
    expired: Callable[[], bool] = lambda: False,
    beside: Sequence[Variant] = (),
) -> Samples:
    """Seconds of a step of every sequence, and of what is timed beside, in every round; each call is the next step."""
    variants = [Variant.repeated(name, decoding.step) for name, decoding in decodings.items()]
    return interleave([*variants, *beside], clock, protocol, expired=expired)


def time_round(decoding: Decoding, clock: Clock) -> dict[str, float]:
    """Every step from one compression to the next: their mean, and the share of the time that compressing takes.

    That share is what the steps that compress take longer than the median of the others. Empty for a cache that does
    not compress while it decodes, or too rarely.
    """
    if not 1 < decoding.slack <= MOST_ROUND:
        return {}
    plain: list[float] = []
    compressing: list[float] = []
    for _ in range(decoding.slack):
        before = decoding.compressions
        seconds = clock.time(decoding.step)
        (plain if decoding.compressions == before else compressing).append(seconds)
    if not plain:
        return {}
    total = sum(plain) + sum(compressing)
    extra = sum(compressing) - len(compressing) * median(plain)
    return {
        "mean_step_seconds": total / (len(plain) + len(compressing)),
        "compressing_steps": len(compressing),
        "compression_share": max(0.0, extra) / total,
    }
