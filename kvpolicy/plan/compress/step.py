"""The compression step: score, allocate, select, merge. Every compression is this one, whoever runs it.

It knows views and nothing of storage. `compress` is for storage that the host follows; `choose_on_device` leaves
everything to the device, for decode steps of fixed shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.plan.compress.allocate import allocate
from kvpolicy.plan.compress.blocks import Block
from kvpolicy.plan.compress.finite import warn_of_undone
from kvpolicy.plan.compress.fusion import Fusion
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.compress.merge import merge
from kvpolicy.plan.compress.nan import warn_of_nan
from kvpolicy.plan.compress.scored import ScoredLayers, Selection
from kvpolicy.plan.forward_observers import MERGE_STATE
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Entries, View

Shown = Callable[[], View]  # a layer that is due, as plugins see it; asked for when it is needed


@attrs.frozen(eq=False)
class Compressed:
    """What remains of a layer. N is the largest number of entries that a head keeps."""

    kept: Tensor  # [B, K, N] int64, slots of the view, ascending, -1 behind a head's last one
    lengths: tuple[tuple[int, ...], ...]  # [B][K], how many a head keeps
    observed: dict[str, Tensor]  # [B, K, T] float32, new slot state of all entries, named as in the store
    entries: Entries | None = None  # [B, K, N, D] and [B, K, N, Dv]; None = those of the kept slots, as they are
    finite: bool = False  # whether all keys and values of the layer are known to be finite
    evicted: int | None = None  # no head loses more entries; None = nobody has counted
    slot_state: dict[str, Tensor] = attrs.field(factory=dict)  # [B, K, N] float32, the merger's; new values only
    row_state: dict[str, Tensor] = attrs.field(factory=dict)  # [B] float32, the merger's


@attrs.frozen(eq=False)
class Chosen:
    """Which entries of a layer stay, and what scorers have noted about all of them."""

    kept: Tensor  # as in `Compressed`
    lengths: tuple[tuple[int, ...], ...]  # likewise
    observed: dict[str, Tensor]  # likewise
    faults: int  # how many slots and queries are not finite; 0 where nobody needs to know
    evicted: int  # the most entries that a head loses
    block: Block  # as which plugins have been shown the layer, maybe with others


def compress(
    spec: PolicySpec,
    fusion: Fusion | None,
    groups: Sequence[Sequence[Shown]],
    budgets: Tensor,
    tokens: Tensor,
    *,
    packs: bool = False,
    undone: Tensor | None = None,
) -> Iterator[list[Compressed]]:
    """Reduce layers of the same rows to `budgets` [L, B] entries per KV head on average, protected ones included.

    `tokens` [B] are those that each row has had; both are int64. Layers of a group are scored and selected from
    together, in kernels where `fusion` says so: their views all exist at one time, those of another group do not. The
    host waits for the device once for all groups, and once more where scores are NaN.

    `packs` says that what stays is packed, for which the host must know whether it is finite. `undone`, int64 [1],
    counts on a device that is no CPU the merged entries that would not have been finite; the host is told with what it
    reads next.

    Yields the results of some layers, in order, until all have been given: those of a group if its entries are only
    moved, or if they are so few that its layers are shown as rows of one view; else those of one layer, to be written
    back first. So no more than one layer's merged entries exist, unless these are few.

    A row that holds no more than its budget keeps everything. Rows never influence each other, and layers only where
    the policy has a joint allocator.
    """
    batch = list(zip(groups, budgets.split([len(group) for group in groups]), strict=True))
    forgets = len(batch) > 1
    chosen = _choose_anyhow(spec, fusion, batch, tokens, forgets=forgets, packs=packs, undone=undone)
    for (group, _), (views, results) in zip(batch, chosen, strict=True):
        if spec.merge.moves_only:
            yield [_moved(one, finite=packs and not one.faults) for one in results]
            continue
        if not forgets and _merge_alike(results):
            rest = iter(results)
            while own := list(islice(rest, 1)):
                own += islice(rest, own[0].block.layers - 1)
                together = merged_together(spec, own[0].block, own, undone)
                yield [attrs.evolve(reduced, finite=packs) for reduced in together]
            continue
        for again, view, result in zip(group, views, results, strict=True):
            reduced = merged(spec, again() if forgets else view, result, undone)
            yield [attrs.evolve(reduced, finite=packs and not result.faults)]


def _moved(one: Chosen, *, finite: bool) -> Compressed:
    """What remains of a layer whose kept entries are as they were."""
    return Compressed(one.kept, one.lengths, one.observed, finite=finite, evicted=one.evicted)


def compress_one(spec: PolicySpec, view: View, budget: Sequence[int]) -> Compressed:
    """`compress` of one layer by itself, without kernels: each row to `budget[b]` entries per KV head."""
    numbers = torch.tensor([list(budget)], dtype=torch.int64, device=view.positions.device)
    ((result,),) = compress(spec, None, [[lambda: view]], numbers, tokens_of(view))
    return result


def choose(spec: PolicySpec, fusion: Fusion | None, views: Sequence[View], budgets: Tensor) -> list[Chosen]:
    """Score, allocate and select of layers that hold the newest tokens; `budgets` as in `compress`.

    Raises UnsupportedInputError where kernels cannot.
    """
    batch = [([partial(_itself, view) for view in views], budgets)]
    ((_, chosen),) = _choose(spec, fusion, batch, tokens_of(views[0]), forgets=False)
    return chosen


def _itself(view: View) -> View:
    return view


def tokens_of(view: View) -> Tensor:
    """Tokens that each row of a view has had if it still holds the newest, int64 [B]."""
    return view.positions.amax((1, 2)).long() + 1


def merged(spec: PolicySpec, view: View, chosen: Chosen, undone: Tensor | None = None) -> Compressed:
    """What remains of a layer of which the `chosen` entries stay, and the others are merged into them."""
    shown = attrs.evolve(view, most_evicted=chosen.evicted)
    entries = merge(spec, shown, chosen.kept, faults=chosen.faults, undone=undone)
    state = {MERGE_STATE + name: values for name, values in entries.slot_state.items()}
    rows = dict(entries.row_state)
    return Compressed(chosen.kept, chosen.lengths, chosen.observed, entries, slot_state=state, row_state=rows)


def _merge_alike(results: Sequence[Chosen]) -> bool:
    """Whether layers are rows of one view, and what they keep of one tensor, of which nothing has to be left out."""
    rows = any(one.block.layers > 1 for one in results)
    return rows and not any(one.faults for one in results) and len({one.kept.shape for one in results}) == 1


def merged_together(
    spec: PolicySpec, block: Block, chosen: Sequence[Chosen], undone: Tensor | None = None
) -> list[Compressed]:
    """`merged` of all layers of a block, each of which keeps as many slots and has no faults."""
    shown = attrs.evolve(block.view, most_evicted=max(one.evicted for one in chosen))
    entries = merge(spec, shown, torch.cat([one.kept for one in chosen]), faults=0, undone=undone)
    columns = {name: _split(block, getattr(entries, name)) for name in ("keys", "values", "log_votes", "changed")}
    slots = {MERGE_STATE + name: block.split(values) for name, values in entries.slot_state.items()}
    rows = {name: block.split(values) for name, values in entries.row_state.items()}
    return [
        Compressed(
            one.kept,
            one.lengths,
            one.observed,
            Entries(**{name: parts[layer] for name, parts in columns.items()}),
            slot_state={name: parts[layer] for name, parts in slots.items()},
            row_state={name: parts[layer] for name, parts in rows.items()},
        )
        for layer, one in enumerate(chosen)
    ]


def _split(block: Block, tensor: Tensor | None) -> Sequence[Any]:
    return (None,) * block.layers if tensor is None else block.split(tensor)


_Part = tuple[Sequence[Shown], Tensor]  # a group and its budgets [L, B]
_Result = tuple[Sequence[View], list[Chosen]]


def _choose_anyhow(
    spec: PolicySpec,
    fusion: Fusion | None,
    batch: Sequence[_Part],
    tokens: Tensor,
    *,
    forgets: bool,
    packs: bool,
    undone: Tensor | None,
) -> list[_Result]:
    """In kernels if they can, else by references."""
    if fusion is not None and not fusion.off:
        try:
            return _choose(spec, fusion, batch, tokens, forgets=forgets, packs=packs, undone=undone)
        except kernel_errors() as error:
            note_once(f"policy {spec.name}: a compression runs without kernels: {error}")
    return _choose(spec, None, batch, tokens, forgets=forgets, packs=packs, undone=undone)


def _choose(
    spec: PolicySpec,
    fusion: Fusion | None,
    batch: Sequence[_Part],
    tokens: Tensor,
    *,
    forgets: bool,
    packs: bool = False,
    undone: Tensor | None = None,
) -> list[_Result]:
    """The views of each group, and what stays of them; entries that compete are all in one batch."""
    groups = []
    for shown, _ in batch:
        group = score_layers(spec, fusion, [view() for view in shown])
        if packs or not spec.merge.moves_only:
            group.look_for_faults()
        if forgets:
            group.forget_entries()
        groups.append(group)
    counts = allocate(spec, groups, [budgets for _, budgets in batch], tokens)
    selections = [group.select(count) for group, count in zip(groups, counts, strict=True)]
    read = _Read.of(groups, selections, undone)  # the host waits
    if read.nan:
        warn_of_nan(read.nan, sum(int(group.room.sum()) for group in groups))
        for group, (shown, _) in zip(groups, batch, strict=True):
            group.rank_faulty_last([view() for view in shown] if forgets else group.views)
        selections = [group.select(count) for group, count in zip(groups, counts, strict=True)]
        read = _Read.of(groups, selections)
    results: list[_Result] = []
    lengths, faults, evicted = iter(read.lengths), iter(read.faults), iter(read.evicted)
    for group, selection in zip(groups, selections, strict=True):
        count = len(group.views)
        own = list(islice(lengths, count))
        kept = selection.indices([max(map(max, rows), default=0) for rows in own])
        blocks = (block for block in group.blocks for _ in range(block.layers))
        chosen = zip(kept, own, group.observed, islice(faults, count), islice(evicted, count), blocks, strict=True)
        results.append((group.views, [Chosen(*parts) for parts in chosen]))
    return results


def score_layers(spec: PolicySpec, fusion: Fusion | None, views: Sequence[View]) -> ScoredLayers:
    """Layers whose views have the same rows, scored. Raises UnsupportedInputError where kernels cannot address them."""
    if fusion is None or fusion.off:
        return ScoredLayers(spec, views)
    from kvpolicy.plan.compress.kernels import FusedLayers

    return FusedLayers(spec, fusion, views)


@attrs.frozen
class _Read:
    """What the device must tell the host, in one transfer."""

    lengths: list[tuple[tuple[int, ...], ...]]  # of each layer [B][K], entries that each head keeps
    nan: int  # scores that are NaN
    faults: list[int]  # of each layer
    evicted: list[int]  # of each layer, the most that a head loses

    @classmethod
    def of(
        cls, groups: Sequence[ScoredLayers], selections: Sequence[Selection], undone: Tensor | None = None
    ) -> "_Read":
        lengths = torch.cat([selection.lengths for selection in selections])
        held = torch.cat([group.room + group.protected for group in groups])
        nan, faults = torch.cat([group.nan for group in groups]), torch.cat([group.faults for group in groups])
        layers, rows, heads = lengths.shape
        evicted = (held - lengths).flatten(1).amax(1) if held[0].numel() else torch.zeros_like(faults)
        beside = nan.sum()[None] if undone is None else torch.cat([nan.sum()[None], undone])
        told: Iterator[int] = iter(torch.cat([lengths.flatten(), faults, evicted, beside]).tolist())
        table = [tuple(tuple(islice(told, heads)) for _ in range(rows)) for _ in range(layers)]
        of_layers = list(islice(told, layers)), list(islice(told, layers))
        read = cls(table, next(told), *of_layers)
        if undone is not None and next(told):
            warn_of_undone()
            undone.zero_()
        return read


def choose_on_device(
    spec: PolicySpec, fusion: Fusion | None, views: Sequence[View], due: Tensor, budgets: Tensor, tokens: Tensor
) -> tuple[list[Tensor], ScoredLayers]:
    """Keep indices [B, K, T] of each layer, -1 behind; rows that are not `due` (bool [L, B]) keep everything.

    Without a decision of the host, so that a graph can be captured of it. Raises what kernels raise.
    """
    group = score_layers(spec, fusion, views)
    (counts,) = allocate(spec, [group], [budgets], tokens)
    selection = group.select(counts.where(due[..., None], group.room))
    return selection.indices([view.positions.shape[2] for view in views]), group
