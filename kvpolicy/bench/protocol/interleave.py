"""Variants timed in turns, in an order drawn anew for each round, so that none profits from when it runs."""

import random
from collections.abc import Callable, Sequence

import attrs

from kvpolicy.bench.protocol.clock import Call, Clock

LEAST_ROUNDS = 3
Samples = dict[str, tuple[float, ...]]


@attrs.frozen
class Variant:
    """One way to do the work. `fresh` makes, untimed, a call that does it once."""

    name: str
    fresh: Callable[[], Call]

    @classmethod
    def repeated(cls, name: str, call: Call) -> "Variant":
        """Of a call that may be made again and again."""
        return cls(name, lambda: call)


@attrs.frozen
class Repetitions:
    """Rounds, warm-up rounds, and the seed of the order."""

    rounds: int = 5
    warm_up: int = 1
    seed: int = 0


def interleave(
    variants: Sequence[Variant],
    clock: Clock,
    protocol: Repetitions,
    *,
    expired: Callable[[], bool] = lambda: False,
) -> Samples:
    """Seconds of every variant in every round, warm-up left out.

    Once `expired` says so no further round begins, but there are three at least.
    """
    order = random.Random(protocol.seed)  # noqa: S311 - an order, not a secret
    samples: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for turn in range(-protocol.warm_up, protocol.rounds):
        if turn >= LEAST_ROUNDS and expired():
            break
        for variant in order.sample(variants, len(variants)):
            seconds = clock.time(variant.fresh())
            if turn >= 0:
                samples[variant.name].append(seconds)
    return {name: tuple(seconds) for name, seconds in samples.items()}
