"""The groups that a few evicted entries join, as a small view: entries to which nothing comes are only moved."""

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, View
from kvpolicy.stages.slots import gather, indices_of, take
from kvpolicy_plugins.mergers.shared.merge_groups import Groups
from kvpolicy_plugins.mergers.shared.merged_entries import log_votes_of

_SHARE = 4  # where more than one in so many kept entries may change, all are computed


@attrs.frozen(eq=False)
class FewGroups:
    """Each evicted entry that joins a group, and the kept entry of that group: 2E slots of a view."""

    view: View  # E kept entries, then E evicted ones; what a merger does not look at is left out
    kept: Tensor  # int64 [B, K, E], the kept entries as slots of `view`
    groups: Groups  # of them; one that several evicted entries join is that of the first, and nothing joins the others
    places: Tensor  # int64 [B, K, E], where each merged entry stands in the keep indices; behind the last one = nowhere

    @classmethod
    def of(cls, view: View, kept: Tensor, joins: Tensor, index: Tensor) -> "FewGroups | None":
        """From `kept` [B, K, N], and the entries that join them: `joins` bool, `index` in `kept`, [B, K, T].

        None where the host does not know that they are few.
        """
        most, count = view.most_evicted, kept.shape[-1]
        if not most or most * _SHARE > count:
            return None
        evicted = indices_of(joins, most)
        there, slots = evicted >= 0, evicted.clamp(min=0)
        joined = index.gather(-1, slots)
        order = torch.arange(most, device=kept.device).expand_as(slots)
        # The first of the evicted entries that join the same kept one; -1 is joined by those that are not there.
        own = joined.where(there, -1)
        first = (own[..., None] == own[..., None, :]).to(torch.uint8).argmax(-1)
        merged = there & (first == order)
        shown = torch.cat([kept.gather(-1, joined).clamp(min=0), slots], -1)
        groups = Groups(torch.cat([order, first], -1), torch.cat([merged, there], -1), merged)
        return cls(_part(view, shown), order, groups, joined.where(merged, count))

    def whole(self, entries: Entries, view: View, kept: Tensor) -> Entries:
        """All kept entries: those of these groups as a merger gave them, the others as they are."""
        wider = torch.cat([kept, kept[..., :1]], -1)  # the last column takes what stands nowhere

        def put(merged: Tensor, unmerged: Tensor) -> Tensor:
            index = self.places.reshape(*self.places.shape, *[1] * (merged.ndim - 3)).expand_as(merged)
            return unmerged.scatter_(2, index, merged)[:, :, : kept.shape[-1]]

        log_votes, changed, held = entries.log_votes, entries.changed, view.slot_state
        return Entries(
            put(entries.keys, gather(view.keys, wider)),
            put(entries.values, gather(view.values, wider)),
            log_votes=None if log_votes is None else put(log_votes, gather(log_votes_of(view), wider)),
            changed=None if changed is None else put(changed, torch.zeros_like(wider, dtype=torch.bool)),
            slot_state={name: put(state, gather(held[name], wider)) for name, state in entries.slot_state.items()},
        )


def _part(view: View, slots: Tensor) -> View:
    """Some slots of a view, [B, K, n]: their entries, votes and state."""
    return attrs.evolve(
        view,
        keys=take(view.keys, slots),
        values=take(view.values, slots),
        positions=take(view.positions, slots),
        pinned=None,
        regions=None,
        attention=None,
        log_votes=None if view.log_votes is None else take(view.log_votes, slots),
        slot_state={name: take(state, slots) for name, state in view.slot_state.items()},
    )
