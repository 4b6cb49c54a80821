"""Attention from the last queries to held entries, as several methods use it: what each query sees, and the softmax."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import View


@attrs.frozen(eq=False)
class WindowAttention:
    """The last W queries of a view, and which of its entries they see."""

    queries: int  # W
    exists: Tensor  # [1, B·K, 1, W, 1] bool: queries that a row has had
    _hidden: Tensor  # [B·K, 1, W, S] bool, slots that a query does not see
    _slots: slice  # the slots that `_hidden` is about; all queries see the others

    @classmethod
    def of(cls, view: View, queries: int, *, candidates_only: bool = False, causal: bool = True) -> "WindowAttention":
        """`causal` hides later entries from each query; `candidates_only` hides protected ones."""
        voters = view.window_positions[:, -queries:]
        region = view.candidates if candidates_only else view.valid
        exists = (voters >= 0).repeat_interleave(view.keys.shape[1], 0)[None, :, None, :, None]
        return cls(queries, exists, *_hidden(view.positions, region, voters, causal=causal))

    @property
    def count(self) -> Tensor:
        """[1, B·K, 1, 1] int64: queries of each row, at least 1."""
        return self.exists.sum(-2).clamp(min=1)

    def softmax(self, logits: Tensor, heads: slice) -> Tensor:
        """Probabilities [1, S, ..., W, T] of logits that are overwritten; zeros for a query that sees no entry."""
        hidden = self._hidden[heads]
        logits[..., self._slots].masked_fill_(hidden, -torch.inf)
        probabilities = logits.softmax(-1)
        if hidden.shape[-1] < logits.shape[-1]:  # every query sees a slot
            return probabilities
        return probabilities.masked_fill_(hidden, 0.0)

    def probabilities(self, view: View) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the B·K heads of all rows, and their probabilities [1, S, G, W, T] float32."""
        for heads, logits in view.logits_by_head(self.queries):
            yield heads, self.softmax(logits, heads)

    def variance(self, probabilities: Tensor, heads: slice) -> Tensor:
        """Unbiased variance over the queries, [1, S, ..., T], of [1, S, ..., W, T]; 0 where there is one query."""
        exists, count = self.exists[:, heads], self.count[:, heads]
        mean = probabilities.sum(-2) / count
        spread = (probabilities - mean.unsqueeze(-2)).masked_fill(~exists, 0.0)
        return spread.square().sum(-2) / (count - 1).clamp(min=1)


def _hidden(positions: Tensor, region: Tensor, voters: Tensor, *, causal: bool) -> tuple[Tensor, slice]:
    """Which queries do not see which slots, bool [B·K, 1, W, S], and these slots.

    All queries see entries older than the window, so on a CPU the mask covers the slots from the first other one on,
    to the last.
    """
    slots = slice(0, positions.shape[-1])
    if positions.device.type == "cpu":
        oldest = voters.amin()
        seen = region & (positions <= oldest) if causal else region & (oldest >= 0)
        others = (~seen).any(0).any(0).nonzero()[:, 0]
        slots = slice(int(others[0]), int(others[-1]) + 1) if len(others) else slice(0, 0)
        region, positions = region[..., slots], positions[..., slots]
    query_positions = voters[:, None, :, None]
    visible = region[:, :, None] & (query_positions >= 0)
    if causal:
        visible = visible & (positions[:, :, None] <= query_positions)
    return ~visible.flatten(0, 1)[:, None], slots
