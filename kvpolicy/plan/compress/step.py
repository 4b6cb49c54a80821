"""The compression step: score, allocate, select, merge. Every compression is this one, whoever runs it.

It knows views and nothing of storage. `compress` is for storage that the host follows; `choose_on_device` leaves
everything to the device, for decode steps of fixed shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor

from kvpolicy.plan.compress.allocate import allocate
from kvpolicy.plan.compress.fusion import Fusion
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.compress.merge import merge
from kvpolicy.plan.compress.nan import warn_of_nan
from kvpolicy.plan.compress.scored import ScoredLayers, Selection
from kvpolicy.plan.forward_observers import MERGE_STATE
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Entries, JointAllocator, View

Shown = Callable[[], View]  # a layer that is due, as plugins see it; asked for when it is needed


@attrs.frozen(eq=False)
class Compressed:
    """What remains of a layer. N is the largest number of entries that a head keeps."""

    kept: Tensor  # [B, K, N] int64, slots of the view, ascending, -1 behind a head's last one
    lengths: tuple[tuple[int, ...], ...]  # [B][K], how many a head keeps
    observed: dict[str, Tensor]  # [B, K, T] float32, new slot state of all entries, named as in the store
    entries: Entries | None = None  # [B, K, N, D] and [B, K, N, Dv]; None = those of the kept slots, as they are
    slot_state: dict[str, Tensor] = attrs.field(factory=dict)  # [B, K, N] float32, the merger's; new values only
    row_state: dict[str, Tensor] = attrs.field(factory=dict)  # [B] float32, the merger's


@attrs.frozen(eq=False)
class Chosen:
    """Which entries of a layer stay, and what scorers have noted about all of them."""

    kept: Tensor  # as in `Compressed`
    lengths: tuple[tuple[int, ...], ...]  # likewise
    observed: dict[str, Tensor]  # likewise
    faults: int  # how many slots and queries must not be shown to the merger: something in them is not finite


def compress(
    spec: PolicySpec, fusion: Fusion | None, groups: Sequence[Sequence[Shown]], budgets: Tensor, tokens: Tensor
) -> Iterator[list[Compressed]]:
    """Reduce layers of the same rows to `budgets` [L, B] entries per KV head on average, protected ones included.

    `tokens` [B] are those that each row has had; both are int64. Layers of a group are scored and selected from
    together, in kernels where `fusion` says so: their views all exist at one time. The host waits for the device once
    for all groups whose entries compete, and once more where scores are NaN. What becomes of a group is computed when
    the iterator gets there, so that it can be written back first: no more than one group then exists twice.

    A row that holds no more than its budget keeps everything. Rows never influence each other, and layers only where
    the policy has a joint allocator.
    """
    parts = list(zip(groups, budgets.split([len(group) for group in groups]), strict=True))
    jointly = isinstance(spec.allocate.divider, JointAllocator)
    for batch in [parts] if jointly else [[part] for part in parts]:
        forgets = len(batch) > 1
        chosen = _choose_anyhow(spec, fusion, batch, tokens, forgets=forgets)
        for (group, _), (views, results) in zip(batch, chosen, strict=True):
            shown = [again() for again in group] if forgets and not spec.merge.moves_only else views
            yield [reduced(spec, view, chosen_of_view) for view, chosen_of_view in zip(shown, results, strict=True)]


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


def reduced(spec: PolicySpec, view: View, chosen: Chosen) -> Compressed:
    """What remains of a layer of which the `chosen` entries stay."""
    if spec.merge.moves_only:
        return Compressed(chosen.kept, chosen.lengths, chosen.observed)
    entries = merge(spec, view, chosen.kept, faults=chosen.faults)
    state = {MERGE_STATE + name: values for name, values in entries.slot_state.items()}
    return Compressed(chosen.kept, chosen.lengths, chosen.observed, entries, state, dict(entries.row_state))


_Part = tuple[Sequence[Shown], Tensor]  # a group and its budgets [L, B]
_Result = tuple[Sequence[View], list[Chosen]]


def _choose_anyhow(
    spec: PolicySpec, fusion: Fusion | None, batch: Sequence[_Part], tokens: Tensor, *, forgets: bool
) -> list[_Result]:
    """In kernels if they can, else by references."""
    if fusion is not None and not fusion.off:
        try:
            return _choose(spec, fusion, batch, tokens, forgets=forgets)
        except kernel_errors() as error:
            note_once(f"policy {spec.name}: a compression runs without kernels: {error}")
    return _choose(spec, None, batch, tokens, forgets=forgets)


def _choose(
    spec: PolicySpec, fusion: Fusion | None, batch: Sequence[_Part], tokens: Tensor, *, forgets: bool
) -> list[_Result]:
    """The views of each group, and what stays of them; entries that compete are all in one batch."""
    groups = []
    for shown, _ in batch:
        group = score_layers(spec, fusion, [view() for view in shown])
        if forgets:
            group.forget_entries()
        groups.append(group)
    counts = allocate(spec, groups, [budgets for _, budgets in batch], tokens)
    selections = [group.select(count) for group, count in zip(groups, counts, strict=True)]
    lengths, nan, faults = _read(groups, selections)  # the host waits
    if nan:
        warn_of_nan(nan, sum(int(group.room.sum()) for group in groups))
        for group, (shown, _) in zip(groups, batch, strict=True):
            group.rank_faulty_last([view() for view in shown] if forgets else group.views)
        selections = [group.select(count) for group, count in zip(groups, counts, strict=True)]
        lengths, _, faults = _read(groups, selections)
    results: list[_Result] = []
    for group, selection in zip(groups, selections, strict=True):
        own = [lengths.pop(0) for _ in group.views]
        kept = selection.indices([max(map(max, rows), default=0) for rows in own])
        wrong = [faults.pop(0) for _ in group.views]
        results.append((group.views, [Chosen(*parts) for parts in zip(kept, own, group.observed, wrong, strict=True)]))
    return results


def score_layers(spec: PolicySpec, fusion: Fusion | None, views: Sequence[View]) -> ScoredLayers:
    """Layers whose views have the same rows, scored. Raises UnsupportedInputError where kernels cannot address them."""
    if fusion is None or fusion.off:
        return ScoredLayers(spec, views)
    from kvpolicy.plan.compress.kernels import FusedLayers

    return FusedLayers(spec, fusion, views)


_Table = tuple[tuple[int, ...], ...]


def _read(groups: Sequence[ScoredLayers], selections: Sequence[Selection]) -> tuple[list[_Table], int, list[int]]:
    """What the device must tell the host, in one transfer.

    How many entries each head of each layer keeps, how many scores are NaN, and the faults of each layer.
    """
    lengths = torch.cat([selection.lengths for selection in selections])
    nan, faults = torch.cat([group.nan for group in groups]), torch.cat([group.faults for group in groups])
    layers, rows, heads = lengths.shape
    numbers: list[int] = torch.cat([lengths.flatten(), nan.sum()[None], faults]).tolist()
    counts, wrong, wanting = numbers[: lengths.numel()], numbers[lengths.numel()], numbers[lengths.numel() + 1 :]
    table = [
        tuple(tuple(counts[start : start + heads]) for start in range(first, first + rows * heads, heads or 1))
        for first in range(0, layers * rows * heads, rows * heads or 1)
    ]
    return table or [()] * layers, wrong, wanting


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
