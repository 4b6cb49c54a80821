"""One compression of one layer: score, allocate, select, merge. A pure function of the view."""

import warnings
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.plan.finite import Sound, faults_of, is_finite, kept_finite, warn_of_faults
from kvpolicy.plan.followers import MERGE_STATE, state_name
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Entries, Scorer, View
from kvpolicy.stages.checks import check_scores, check_state, check_tensor, contract_error, seen_shape
from kvpolicy.stages.declared import slot_state_of
from kvpolicy.stages.slots import indices_of
from kvpolicy.stages.untouched import tensors_of, watching


@attrs.frozen(eq=False)
class Compressed:
    """What remains of a layer. N is the largest number of entries that a head keeps."""

    kept: Tensor  # [B, K, N] int64, slots of the view, ascending, -1 behind a head's last one
    observed: dict[str, Tensor]  # [B, K, T] float32, new slot state of all entries, named as in the store
    entries: Entries | None = None  # [B, K, N, D] and [B, K, N, Dv]; None = those of the kept slots, as they are
    slot_state: dict[str, Tensor] = attrs.field(factory=dict)  # [B, K, N] float32, the merger's; new values only
    row_state: dict[str, Tensor] = attrs.field(factory=dict)  # [B] float32, the merger's


@attrs.frozen(eq=False)
class Chosen:
    """Which entries of a layer stay, and what scorers have noted about all of them."""

    kept: Tensor  # as in `Compressed`
    observed: dict[str, Tensor]  # as in `Compressed`
    faults: int  # how many slots and queries must not be shown to the merger: something in them is not finite


def compress(spec: PolicySpec, view: View, budget: Sequence[int]) -> Compressed:
    """Reduce each row to `budget[b]` entries per KV head on average, protected ones included.

    A row that holds no more than that keeps everything. Rows never influence each other.
    """
    return reduce_to(spec, view, choose(spec, view, budget))


def choose(spec: PolicySpec, view: View, budget: Sequence[int]) -> Chosen:
    """Score, allocate, select."""
    total, observed = weighted_sum(spec, view)
    wrong = total.isnan() & view.candidates
    scores = total.masked_fill(wrong | ~view.candidates, -torch.inf)
    counts = allocate(spec, view, scores, budget)
    stays = select(spec, view, scores, counts) | view.protected
    longest = stays.sum(-1).amax() if stays.numel() else wrong.sum()
    width, nan, faults = torch.stack([longest, wrong.sum(), faults_of(spec.merge, view)]).tolist()  # the host waits
    if nan:
        warn_of_nan(nan, int(view.candidates.sum()))
        stays = select(spec, view, faulty_last(scores, view), counts) | view.protected
        width = None
    return Chosen(indices_of(stays, width), observed, faults)


def faulty_last(scores: Tensor, view: View) -> Tensor:
    """Scores [B, K, T] in which NaN stands for -inf, with NaN for entries that are not finite: those rank below it.

    One NaN key makes NaN of all the scores of its head. It must not be what is kept then.
    """
    sound = is_finite(view.keys) & is_finite(view.values)
    return scores.masked_fill(view.candidates & ~sound & (scores == -torch.inf), torch.nan)


def reduce_to(spec: PolicySpec, view: View, chosen: Chosen) -> Compressed:
    """What remains of a layer of which the `chosen` entries stay."""
    if spec.merge.moves_only:
        return Compressed(chosen.kept, chosen.observed)
    entries = merge(spec, view, chosen.kept, faults=chosen.faults)
    state = {MERGE_STATE + name: values for name, values in entries.slot_state.items()}
    return Compressed(chosen.kept, chosen.observed, entries, state, dict(entries.row_state))


def score(spec: PolicySpec, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum [B, K, T] over the scorers, -inf outside the candidates; and their new slot state."""
    total, observed = weighted_sum(spec, view)
    return _without_nan(total, view.candidates), observed


def weighted_sum(spec: PolicySpec, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """`score` as it comes: any number outside the candidates, and NaN where scorers give it."""
    total = torch.zeros(view.positions.shape, dtype=torch.float32, device=view.keys.device)
    observed: dict[str, Tensor] = {}
    for term, weighted in enumerate(spec.score):
        scores, fresh = scored(weighted.scorer, state_name(term, ""), view)
        observed.update(fresh)
        total = total + weighted.weight * _normalised(scores, view, weighted.normalise)
    return total, observed


def scored(scorer: Scorer, prefix: str, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores [B, K, T] of one scorer, and its new slot state, whose names begin with `prefix` in the store."""
    own = _own_state(view, prefix)
    seen = view.with_state(own)
    fresh: Mapping[str, Tensor] = {}
    if own:
        with watching(scorer, lambda: tensors_of(seen)):
            fresh = scorer.observe(seen)
        check_state(scorer, fresh, own)
    if fresh:
        seen = seen.with_state({**own, **fresh})
    with watching(scorer, lambda: tensors_of(seen)):
        scores = scorer.score(seen)
    check_scores(scorer, scores, view)
    return scores, {prefix + name: _remembered(scorer, name, values) for name, values in fresh.items()}


def _remembered(scorer: Scorer, name: str, values: Tensor) -> Tensor:
    """State to be carried on: NaN is told by this round's scores, and forgotten, or it would stay for good."""
    fill = next((state.fill for state in slot_state_of(scorer) if state.name == name), 0.0)
    return values.masked_fill(values.isnan(), fill)


def allocate(spec: PolicySpec, view: View, scores: Tensor, budget: Sequence[int] | Tensor) -> Tensor:
    """Candidates to keep per head [B, K]: the row's budget over all heads, less what is protected anyway."""
    heads = view.positions.shape[1]
    total = torch.as_tensor(budget, dtype=torch.int64, device=view.positions.device) * heads
    free = (total - view.protected.sum((1, 2))).clamp(min=0)
    competing = view.in_sequence(scores), view.in_sequence(view.candidates)
    shown = dict(zip(("scores", "candidates", "budget"), (*competing, free), strict=True))
    with watching(spec.allocate.heads, lambda: shown):
        counts = spec.allocate.heads.allocate(*competing, free)
    rows = {"batch": scores.shape[0], "kv_heads": heads}
    check_tensor(spec.allocate.heads, counts, rows, torch.int64, scores.device)
    return counts


def select(spec: PolicySpec, view: View, scores: Tensor, counts: Tensor) -> Tensor:
    """The candidates that stay, bool [B, K, T]."""
    shown = {"scores": view.in_sequence(scores), "candidates": view.in_sequence(view.candidates), "counts": counts}
    with watching(spec.select, lambda: shown):
        chosen = spec.select.select(*shown.values())
    check_tensor(spec.select, chosen, seen_shape(view), torch.bool, scores.device)
    return view.in_slots(chosen) & view.candidates


def merge(spec: PolicySpec, view: View, kept: Tensor, *, faults: int) -> Entries:
    """The entries of the kept slots, [B, K, N, D] and [B, K, N, Dv]; `faults` as in `Chosen`.

    What is not finite is merged into nothing, and what was finite stays finite.
    """
    own = view.with_state(_own_state(view, MERGE_STATE), view.row_state)
    if not faults:
        return kept_finite(_merged(spec, own, kept), own, kept)
    warn_of_faults(own)
    sound = Sound.of(spec.merge, own, kept)
    merged = kept_finite(_merged(spec, sound.view, sound.kept), sound.view, sound.kept)
    return sound.whole(merged, own, kept)


def _merged(spec: PolicySpec, view: View, kept: Tensor) -> Entries:
    """What the merger gives, checked; `view` shows its own state."""
    with watching(spec.merge, lambda: {**tensors_of(view), "kept": kept}):
        entries: object = spec.merge.merge(view, kept)
    if not isinstance(entries, Entries):
        raise contract_error(spec.merge, f"returned {type(entries).__name__}, expected Entries")
    slots = dict(zip(("batch", "kv_heads", "kept"), kept.shape, strict=True))
    for found, source in ((entries.keys, view.keys), (entries.values, view.values)):
        check_tensor(spec.merge, found, {**slots, "dim": source.shape[-1]}, source.dtype, source.device)
    if spec.merge.votes:
        check_tensor(spec.merge, entries.log_votes, slots, torch.float32, view.keys.device)
    if entries.changed is not None:
        check_tensor(spec.merge, entries.changed, slots, torch.bool, view.keys.device)
    states = (
        {name: state.new_empty(kept.shape) for name, state in view.slot_state.items()} if entries.slot_state else {}
    )
    check_state(spec.merge, entries.slot_state, states)
    check_state(spec.merge, entries.row_state, view.row_state)
    return entries


def _own_state(view: View, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in view.slot_state.items() if name.startswith(prefix)}


def _normalised(scores: Tensor, view: View, how: str) -> Tensor:
    if how == "none":
        return scores
    inside = scores.masked_fill(~view.candidates, 0)
    count = view.candidates.sum(-1, keepdim=True).clamp(min=1)
    if how == "max":
        magnitude = inside.abs().masked_fill(~inside.isfinite(), 0).amax(-1, keepdim=True)
        return scores / magnitude.clamp(min=torch.finfo(torch.float32).tiny)
    mean = inside.sum(-1, keepdim=True) / count
    spread = ((inside - mean).masked_fill(~view.candidates, 0).square().sum(-1, keepdim=True) / count).sqrt()
    return (scores - mean) / spread.clamp(min=torch.finfo(torch.float32).tiny)


def _without_nan(scores: Tensor, candidates: Tensor) -> Tensor:
    wrong = scores.isnan() & candidates
    if bool(wrong.any()):
        warn_of_nan(int(wrong.sum()), int(candidates.sum()))
    return scores.masked_fill(wrong | ~candidates, -torch.inf)


def warn_of_nan(wrong: int, candidates: int) -> None:
    """NaN is never kept and never silent."""
    if wrong:
        message = f"{wrong} of {candidates} scores are NaN; they rank last"
        warnings.warn(message, NonFiniteScoreWarning, stacklevel=2)
