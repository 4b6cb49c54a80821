"""The smallest budget whose loss stays below a bound, with a guarantee that assumes no distribution.

Conformal risk control (arXiv:2208.02814, Theorem 1): of losses that are at most `most`, never grow with the budget and
are exchangeable, the expected loss of the next one is at most `bound` at the smallest budget for which
(n · mean + most) / (n + 1) <= bound, where the mean is over n pieces that chose nothing else.
"""

from collections.abc import Mapping, Sequence

import attrs

_CLIP = 5  # losses count at most as this many times the bound


@attrs.frozen
class RiskBound:
    """A bound that holds for the clipped loss of a further piece of the same kind of text, on average."""

    share: float  # the smallest one that holds it
    bound: float
    clipped_at: float
    mean: float  # clipped loss at that share
    pieces: int


def smallest_share(losses: Mapping[float, Sequence[float]], bound: float) -> RiskBound | None:
    """The smallest share that holds `bound`, None when none does.

    `losses` are the losses of the same n pieces at each share. Each share counts with the largest loss of a piece at
    this or any larger share, so that losses never grow with the budget, as the theorem asks.
    """
    clip = _CLIP * bound
    best = None
    largest: list[float] | None = None
    for share in sorted(losses, reverse=True):
        clipped = [min(loss, clip) for loss in losses[share]]
        largest = clipped if largest is None else list(map(max, largest, clipped))
        pieces, mean = len(largest), sum(largest) / len(largest)
        if (pieces * mean + clip) / (pieces + 1) > bound:
            break
        best = RiskBound(share, bound, clip, mean, pieces)
    return best


def fewest_pieces() -> int:
    """Pieces without which no bound can hold, however small the losses are."""
    return _CLIP - 1
