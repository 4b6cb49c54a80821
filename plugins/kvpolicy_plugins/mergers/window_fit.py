"""Merger `window_fit`: merges evicted entries so that the output for the observation window is preserved."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Entries, Merger, Needs, Number, View, parameter
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.fitted_groups import fit, solved_values
from kvpolicy_plugins.mergers.shared.merge_groups import Groups, evicted_of, groups_of, nearest, reaches
from kvpolicy_plugins.mergers.shared.merged_entries import changed_entries, kept_with_votes, log_votes_of
from kvpolicy_plugins.mergers.shared.window_logits import WindowLogits, window_of
from kvpolicy_plugins.mergers.window_fit_ward import nearest_by_ward
from kvpolicy_plugins.shared.limits import QUERIES_OR_ALL

_SLACK = 1e-4  # tolerance, so that rounding does not separate equal attention


@attrs.frozen
class WindowFit(Merger):
    """Merges evicted entries into kept ones by a fit to the whole observation window; not published.

    With a = scaling·q·k and log-votes b, p = softmax(a + b) of each query over the entries, and P the sum of
    p over a group:

    1. others are merged into a kept entry if it gets at least `attended` times the attention of the average evicted
       entry: one that was kept for other reasons would be dominated by them;
    2. `assign: cosine`: an evicted entry goes to the kept entry with the most similar key, or is dropped below
       `threshold`; `ward`: to the one where that adds the least to the spread of logits and values within groups,
       weighted by attention (Ward's criterion);
    3. weights = Σ p of an entry / Σ P, over the queries and the G heads; k_r, v_r = weighted means;
    4. b_r = Σ P·(logsumexp of a + b in the group - scaling·q·k_r) / Σ P, the log-vote.

    5. `values: solve`: with the keys and log-votes of 3 and 4, x = softmax over what is kept, and y = p times the
       values, the values V of groups of several entries that minimise |x V - y|² + ridge · |x|² · |V - v_r|².

    A query counts for a group if it sees all of it. A group without attention is averaged by votes. KeepKV is exact
    for one query and, as log-sum-exp is convex, too small for all others; this fit is exact on average.
    """

    name: ClassVar[str] = "window_fit"
    votes: ClassVar[bool] = True
    reads_window: ClassVar[bool] = True

    assign: str = parameter(Choice(("cosine", "ward")), "cosine", help="how the kept entry of an evicted one is chosen")
    threshold: float = parameter(
        Number(minimum=-1, maximum=1), -1.0, help="least cosine similarity of keys for a merge; -1 = all merge"
    )
    attended: float = parameter(
        Number(minimum=0, maximum=1e6),
        1.0,
        help="least attention of a kept entry into which others are merged, relative to the mean of evicted ones",
    )
    queries: int = parameter(QUERIES_OR_ALL, 0, help="how many of the last queries are fitted; 0 = all observed")
    values: str = parameter(
        Choice(("mean", "solve")), "mean", help="values of a group: weighted means, or solved for the window's outputs"
    )
    ridge: float = parameter(Number(minimum=0, maximum=1e6), 0.01, help="how strongly solved values are held to means")

    def __attrs_post_init__(self) -> None:
        if self.assign == "ward" and self.threshold != -1:
            raise ParameterError(f"threshold: must be -1 unless entries are assigned by cosine: {self.threshold:g}")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def merge(self, view: View, kept: Tensor) -> Entries:
        if not kept.shape[-1]:
            return kept_with_votes(view, kept)
        window = window_of(view, self.queries)
        groups = self._groups(view, kept, window)
        complete = _complete(view, kept, groups, window)
        merged = fit(view.keys, view.values, log_votes_of(view), groups, complete, window)
        if self.values == "solve":
            solved = solved_values(view.values, merged, groups, complete, window, self.ridge)
            merged = merged[0], solved, merged[2]
        return changed_entries(view, kept, groups.merged, merged)

    def _groups(self, view: View, kept: Tensor, window: WindowLogits) -> Groups:
        evicted, attention = evicted_of(view, kept), window.mean_attention
        evicted_count = evicted.sum(-1, keepdim=True).clamp(min=1)
        mean_evicted = attention.masked_fill(~evicted, 0.0).sum(-1, keepdim=True) / evicted_count
        is_attended = gather(attention, kept) >= self.attended * (1 - _SLACK) * mean_evicted
        receivers = kept.masked_fill(~is_attended, -1)
        if self.assign == "ward":
            similarity, index = nearest_by_ward(view, receivers, evicted, window, attention)
        else:
            similarity, index = nearest(view.keys, receivers, evicted, most=view.most_evicted)
        return groups_of(kept, evicted & reaches(similarity, self.threshold), index)


def _complete(view: View, kept: Tensor, groups: Groups, window: WindowLogits) -> Tensor:
    """Queries that see all of a group, bool [B, K, W, N]; none sees the padding of `kept`."""
    positions = view.positions.masked_fill(~groups.member, -1)
    newest = positions.new_full(groups.merged.shape, -1).scatter_reduce_(-1, groups.target, positions, "amax")
    query_positions = window.query_positions[:, None, :, None]
    return (query_positions >= 0) & (newest[:, :, None] <= query_positions) & (kept >= 0)[:, :, None]
