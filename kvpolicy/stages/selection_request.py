"""What a selector is asked."""

import attrs
from torch import Tensor

from kvpolicy.stages.view import View


@attrs.frozen(eq=False)
class SelectionRequest:
    """The entries of one layer, of which some candidates stay.

    Along T, the entries of a head stand in ascending order of position; empty slots come last and have position -1.
    """

    scores: Tensor  # [B, K, T] float32; any number outside the candidates
    candidates: Tensor  # [B, K, T] bool, entries that may be evicted
    counts: Tensor  # [B, K] int64, how many candidates of each head stay
    positions: Tensor  # [B, K, T] int
    regions: Tensor | None = None  # [B, K, T] int8, numbers of the request's regions, 0 = in none
    layer: int = 0  # ordinal among the managed layers
    second_scores: Tensor | None = None  # [B, K, T] or [B, K, n, T] float32, what `Selector.second_scores` gave

    @classmethod
    def of(cls, view: View, scores: Tensor, counts: Tensor, second_scores: Tensor | None = None) -> "SelectionRequest":
        """What is asked about the entries of a view, whose slots `scores` and `second_scores` follow."""
        return cls(
            view.in_sequence(scores),
            view.in_sequence(view.candidates),
            counts,
            view.in_sequence(view.positions),
            None if view.regions is None else view.in_sequence(view.regions),
            view.layer,
            None if second_scores is None else view.in_sequence(second_scores),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a selector is shown, by name."""
        named = attrs.asdict(self, recurse=False, filter=lambda _, shown: isinstance(shown, Tensor))
        return dict(named)
