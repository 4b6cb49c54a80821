"""What a merger is shown of a layer in which something is NaN or infinite: the rest, and nothing of that.

A row's fault stays that row's, and an entry's that entry's: what is not finite is merged into nothing, and a kept entry
that was finite stays finite.
"""

import warnings
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.stages import Entries, Merger, State, View
from kvpolicy.stages.slots import gather, take


def is_finite(vectors: Tensor) -> Tensor:
    """Whether all numbers of each vector are finite: [..., D] to bool [...], without a copy of them.

    By the largest and the smallest number, which are NaN where one is. On a CPU the norm of order infinity takes ten
    times as long.
    """
    if not vectors.shape[-1]:
        return torch.ones(vectors.shape[:-1], dtype=torch.bool, device=vectors.device)
    return (vectors.amax(-1) < torch.inf) & (vectors.amin(-1) > -torch.inf)


def faults_of(view: View, *, queries: bool) -> Tensor:
    """How many slots of each row of a view, and with `queries` how many queries, are not finite: int64 [B].

    Slots that hold nothing count too: a merger may multiply them by 0.
    """
    wrong = (~_sound_slots(view)).sum((1, 2))
    return wrong + (~_sound_queries(view)).sum(1) if queries and view.queries is not None else wrong


def _sound_slots(view: View) -> Tensor:
    """Bool [B, K, T]: slots in which all is finite, or was when they were empty."""
    sound = is_finite(view.keys) & is_finite(view.values)
    if view.log_votes is not None:
        sound = sound & view.log_votes.isfinite()
    return sound


def _sound_queries(view: View) -> Tensor:
    """Bool [B, W]: queries that are finite in all heads."""
    return is_finite(view.window).all(1)


@attrs.frozen(eq=False)
class Sound:
    """The finite part of a view, in tensors of the same shapes, so that rows without a fault are computed alike."""

    view: View
    kept: Tensor  # int64 [B, K, N], the kept slots that are finite, as slots of `view`; -1 behind a head's last one
    places: Tensor  # int64 [B, K, N], where each slot that is kept of the whole view stands in `kept`; -1 = nowhere

    @classmethod
    def of(cls, merger: Merger, view: View, kept: Tensor) -> "Sound":
        """Leave out what is not finite; `view` shows the merger's own state, and `kept` are slots of it."""
        sound = _sound_slots(view) & view.valid
        order = (~sound).to(torch.uint8).sort(dim=-1, stable=True).indices
        behind = ~sound.gather(-1, order)
        rank = sound.cumsum(-1) - 1
        there = (kept >= 0) & sound.gather(-1, kept.clamp(min=0))
        places = (there.cumsum(-1) - 1).masked_fill(~there, -1)
        slots = kept.new_full((*kept.shape[:2], kept.shape[-1] + 1), -1)  # the last one takes what is nowhere
        slots.scatter_(-1, places.where(there, kept.shape[-1]), rank.gather(-1, kept.clamp(min=0)))
        return cls(_shown(merger, view, order, behind), slots[..., : kept.shape[-1]], places)

    def whole(self, entries: Entries, view: View, kept: Tensor) -> Entries:
        """The entries of all kept slots: those of a merger, and as they are those that it was not shown."""

        def put(merged: Tensor, before: Tensor) -> Tensor:
            there = (self.places >= 0).reshape(*kept.shape, *[1] * (merged.ndim - 3))
            return torch.where(there, take(merged, self.places.clamp(min=0)), gather(before, kept))

        votes, changed, old = entries.log_votes, entries.changed, _votes(view)
        if not kept.shape[-1]:
            return entries
        return attrs.evolve(
            entries,
            keys=put(entries.keys, view.keys),
            values=put(entries.values, view.values),
            log_votes=None if votes is None else put(votes, old.nan_to_num(0.0, 0.0, 0.0)),
            changed=None if changed is None else put(changed, torch.zeros_like(view.valid)),
            slot_state={name: put(state, view.slot_state[name]) for name, state in entries.slot_state.items()},
        )


def _shown(merger: Merger, view: View, order: Tensor, behind: Tensor) -> View:
    """The slots of a view in another order, those `behind` the sound ones empty; only queries that are sound."""

    def vectors(column: Tensor) -> Tensor:
        return take(column, order).masked_fill(behind[..., None], 0)

    attention = view.attention
    if attention is not None:
        attention = attention.nan_to_num(0.0, 0.0, 0.0).gather(-1, order[:, :, None].expand(attention.shape))
    queries, asked = view.queries, view.query_positions
    if queries is not None:
        queries, asked = _sound_window(view)
    return attrs.evolve(
        view,
        keys=vectors(view.keys),
        values=vectors(view.values),
        positions=view.positions.gather(-1, order).masked_fill(behind, -1),
        queries=queries,
        query_positions=asked,
        attention=attention,
        log_votes=None if view.log_votes is None else take(view.log_votes, order).masked_fill(behind, 0.0),
        pinned=None if view.pinned is None else take(view.pinned, order),
        regions=None if view.regions is None else take(view.regions, order),
        slot_state=_without_nan({n: take(t, order) for n, t in view.slot_state.items()}, merger.slot_state()),
        row_state=_without_nan(view.row_state, merger.row_state()),
    )


def _sound_window(view: View) -> tuple[Tensor, Tensor]:
    """Queries [B, H, W, D] and positions [B, W], those that are not finite as if a row had never had them: in front."""
    asked = view.window_positions.masked_fill(~_sound_queries(view), -1)
    order = (asked >= 0).to(torch.uint8).sort(dim=1, stable=True).indices
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    asked = asked[rows, order]
    queries = view.window[rows, :, order].transpose(1, 2)
    return queries.masked_fill((asked < 0)[:, None, :, None], 0), asked


def _without_nan(state: Mapping[str, Tensor], declared: Sequence[State]) -> dict[str, Tensor]:
    fills = {state.name: state.fill for state in declared}
    return {name: values.masked_fill(values.isnan(), fills.get(name, 0.0)) for name, values in state.items()}


def _votes(view: View) -> Tensor:
    if view.log_votes is not None:
        return view.log_votes
    return torch.zeros(view.positions.shape, dtype=torch.float32, device=view.keys.device)


def kept_finite(entries: Entries, view: View, kept: Tensor, undone: Tensor | None) -> Entries:
    """The entries of a merger; those that did not stay finite are as they were, and so is the state of their slots.

    On a CPU it warns of them; elsewhere it adds their number to `undone`, int64 [1], if there is one, and nobody waits.
    A row whose new state is NaN keeps its old one.
    """
    rows = {name: torch.where(new.isnan(), view.row_state[name], new) for name, new in entries.row_state.items()}
    entries = attrs.evolve(entries, row_state=rows)
    fine = is_finite(entries.keys) & is_finite(entries.values)
    if entries.log_votes is not None:
        fine = fine & entries.log_votes.isfinite()
    for state in entries.slot_state.values():
        fine = fine & ~state.isnan()
    wrong = ~fine & (kept >= 0)
    if wrong.device.type == "cpu":
        if not bool(wrong.any()):
            return entries
        warn_of_undone()
    elif undone is not None:
        undone += wrong.sum()

    def restored(merged: Tensor, before: Tensor) -> Tensor:
        return torch.where(wrong.reshape(*kept.shape, *[1] * (merged.ndim - 3)), gather(before, kept), merged)

    votes, changed = entries.log_votes, entries.changed
    return attrs.evolve(
        entries,
        keys=restored(entries.keys, view.keys),
        values=restored(entries.values, view.values),
        log_votes=None if votes is None else restored(votes, _votes(view).nan_to_num(0.0, 0.0, 0.0)),
        changed=None if changed is None else changed & ~wrong,
        slot_state={name: restored(state, view.slot_state[name]) for name, state in entries.slot_state.items()},
    )


def warn_of_undone() -> None:
    """Say that some entries were not merged."""
    _warn("merged entries would not be finite: these stay as they were")


def warn_of_faults(view: View) -> None:
    """Say that something in the slots or queries of a view is not finite, unless these hold nothing."""
    wrong = (view.valid & ~_sound_slots(view)).any()
    if view.queries is not None:
        wrong = wrong | ((view.window_positions >= 0) & ~_sound_queries(view)).any()
    if bool(wrong):
        _warn("entries or queries that are NaN or infinite are left out of merging")


def _warn(message: str) -> None:
    """Said once where warnings are shown once: the text is the same every time."""
    warnings.warn(message, NonFiniteScoreWarning, stacklevel=2)
