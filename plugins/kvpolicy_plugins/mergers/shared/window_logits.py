"""The observation window as mergers see it: queries, and their logits over what is held."""

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import View
from kvpolicy_plugins.mergers.shared.merge_groups import to_float


@attrs.frozen(eq=False)
class WindowLogits:
    """Queries and logits of the observation window."""

    queries: Tensor  # [B, K, G, W, D], scaled; zeros for queries that a row has not had
    logits: Tensor  # [B, K, G, W, T], votes included, -inf where a query does not see an entry
    query_positions: Tensor  # int [B, W]; -1 = the row has not had this query

    def probabilities(self) -> Tensor:
        """[B, K, G, W, T]; zeros for a query that sees no entry."""
        return (self.logits - self.log_total).exp_()

    @property
    def log_total(self) -> Tensor:
        """Log-sum-exp [B, K, G, W, 1] over the entries; 0 for a query that sees no entry."""
        total = self.logits.logsumexp(-1, keepdim=True)
        return total.masked_fill(total == -torch.inf, 0.0)

    @property
    def mean_attention(self) -> Tensor:
        """[B, K, T]: mean over the queries that see an entry."""
        seen = (self.logits[:, :, 0] > -torch.inf).sum(2).clamp(min=1) * self.logits.shape[2]
        return self.probabilities().sum((2, 3)) / seen


def window_of(view: View, count: int = 0) -> WindowLogits:
    """The last `count` queries of a view, or all of them for 0."""
    precise, query_positions = to_float(view.keys).dtype, view.window_positions[:, -count:]
    query_exists = (query_positions >= 0)[:, None, None, :, None]
    visible = query_exists & (view.positions[:, :, None, None] <= query_positions[:, None, None, :, None])
    queries = view.window[:, :, -count:].to(precise).unflatten(1, (view.keys.shape[1], -1)) * view.scaling
    logits = view.logits[..., -count:, :].to(precise).masked_fill(~visible, -torch.inf)
    return WindowLogits(queries.masked_fill(~query_exists, 0.0), logits, query_positions)


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; zeros for a query that sees no entry."""
    return logits.softmax(-1).masked_fill(logits == -torch.inf, 0.0)


def newest_queries(view: View) -> Tensor:
    """The newest query of each query head, [B, K, G, D]; zeros in rows without queries."""
    newest: Tensor = to_float(view.window[:, :, -1]).unflatten(1, (view.keys.shape[1], -1))
    return newest.masked_fill((view.window_positions[:, -1] < 0)[:, None, None, None], 0.0)
