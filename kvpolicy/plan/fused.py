"""Score, allocate and select of several layers at once, in kernels; what has no tile function runs its reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.plan.finite import faults_of
from kvpolicy.plan.followers import state_name
from kvpolicy.plan.fusion import Fusion, Term
from kvpolicy.plan.layers import Layers
from kvpolicy.plan.pipeline import Chosen, allocate, faulty_last, scored, select, warn_of_nan
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import View
from kvpolicy.stages.checks import check_tensor
from kvpolicy.stages.slots import indices_of
from kvpolicy_kernels.tile import ColumnRequest, Tile


def choose_together(
    spec: PolicySpec, fusion: Fusion, views: Sequence[View], budgets: Sequence[Sequence[int]]
) -> list[Chosen]:
    """What `pipeline.choose` gives for each view, with as few passes over the entries as the policy allows.

    The host waits once, for the number of entries that each head keeps. Raises UnsupportedInputError for views that
    kernels cannot address.
    """
    layers = Layers.of(views)
    total, nan, observed = score_together(fusion, layers)
    counts = counts_together(spec, fusion, layers, total, torch.tensor(budgets, device=total.device))
    kept, faults = _kept(spec, fusion, layers, total, counts, nan)
    return [Chosen(*one) for one in zip(kept, observed, faults, strict=True)]


def score_together(fusion: Fusion, layers: Layers) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """`pipeline.score` of all layers, [P, T] float32; how many scores are NaN, [P]; new slot state of each layer."""
    from kvpolicy_kernels.finish import finish

    tiled = [term for term in fusion.terms if term.tile is not None]
    others = [(place, term) for place, term in enumerate(fusion.terms) if term.tile is None]
    terms = layers.empty(len(fusion.terms))
    observed: list[dict[str, Tensor]] = [{} for _ in layers.views]
    _run_tiles([term.tile for term in tiled if term.tile is not None], layers, terms[: len(tiled)])
    for out, (place, term) in zip(terms[len(tiled) :], others, strict=True):
        _run_reference(term, state_name(place, ""), layers, out, observed)
    finishes = [term.finish for term in tiled + [term for _, term in others]]
    total, nan = finish(layers.segments, layers.columns["positions"], terms, finishes, **layers.protect)
    return total, nan, observed


def _run_tiles(tiles: Sequence[Tile], layers: Layers, out: Tensor) -> None:
    from kvpolicy_kernels.score import scores

    if not tiles:
        return
    request = ColumnRequest(layers.segments, *(layers.columns[name] for name in ("keys", "values", "positions")))
    extra = [None if tile.column is None else tile.column(request) for tile in tiles]
    window = layers.window() if any(tile.window for tile in tiles) else None
    scores(layers.segments, layers.columns, window, tiles, extra, **layers.protect, out=out)


def _run_reference(term: Term, prefix: str, layers: Layers, out: Tensor, observed: Sequence[dict[str, Tensor]]) -> None:
    for view, rows, noted in zip(layers.views, layers.per_view(out), observed, strict=True):
        scores, fresh = scored(term.weighted.scorer, prefix, view)
        rows.copy_(scores)
        noted.update(fresh)


def counts_together(spec: PolicySpec, fusion: Fusion, layers: Layers, total: Tensor, budgets: Tensor) -> Tensor:
    """Candidates to keep in each head, int64 [L·B, K]; `budgets` [L, B] int64 are entries per head."""
    if fusion.allocate:
        pairs = zip(layers.views, layers.per_view(total), budgets, strict=True)
        return torch.cat([allocate(spec, view, scores, budget) for view, scores, budget in pairs])
    free = (budgets.flatten() * layers.segments.heads - layers.protected.sum(1)).clamp(min=0)
    counts = spec.allocate.heads.divide(layers.room, lambda best: _won(layers, total, best), free)
    rows = {"batch": layers.room.shape[0], "kv_heads": layers.segments.heads}
    check_tensor(spec.allocate.heads, counts, rows, torch.int64, total.device)
    return counts  # type: ignore[return-value]  # a tensor: just checked


def _won(layers: Layers, total: Tensor, best: Tensor) -> Tensor:
    from kvpolicy_kernels.select import counts_of_best

    owned = counts_of_best(total, layers.segments, best, positions=layers.columns["positions"], **layers.protect)
    return owned.view(layers.room.shape).long()


def _kept(
    spec: PolicySpec, fusion: Fusion, layers: Layers, total: Tensor, counts: Tensor, nan: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Keep indices, [B, K, N] int64 a layer; and what a merger must not see of each, as in `Chosen`."""
    from kvpolicy_kernels.select import select as best_of

    faults = torch.stack([faults_of(spec.merge, view) for view in layers.views])
    numbers = torch.cat([(counts + layers.protected).flatten(), nan.long(), faults]).tolist()  # the host waits here
    held, wrong, wanting = numbers[: len(nan)], numbers[len(nan) : 2 * len(nan)], numbers[2 * len(nan) :]
    if any(wrong):
        warn_of_nan(sum(wrong), int(layers.room.sum()))
        for view, scores in zip(layers.views, layers.per_view(total), strict=True):
            scores.copy_(faulty_last(scores, view))
    if fusion.select:
        pairs = zip(layers.views, layers.per_view(total), layers.per_layer(counts), strict=True)
        return [indices_of(select(spec, view, scores, own) | view.protected) for view, scores, own in pairs], wanting
    position, protect = layers.columns["positions"], layers.protect
    kept = best_of(total, layers.segments, counts.flatten(), max(held, default=0), positions=position, **protect)
    per_layer = layers.segments.per_layer
    widths = [max(held[start : start + per_layer], default=0) for start in range(0, len(held), per_layer)]
    return [one[..., :width].long() for one, width in zip(layers.per_layer(kept), widths, strict=True)], wanting
