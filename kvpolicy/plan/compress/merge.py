"""What becomes of evicted entries: the merger of a policy, run and checked."""

import torch
from torch import Tensor

from kvpolicy.plan.compress.finite import Sound, kept_finite, warn_of_faults
from kvpolicy.plan.compress.score import state_of
from kvpolicy.plan.forward_observers import MERGE_STATE
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Entries, View
from kvpolicy.stages.checking.returned import check_state, check_tensor, contract_error
from kvpolicy.stages.checking.untouched import tensors_of, watching


def merge(spec: PolicySpec, view: View, kept: Tensor, *, faults: int, undone: Tensor | None = None) -> Entries:
    """The entries of the kept slots, [B, K, N, D] and [B, K, N, Dv].

    `faults` says how many slots and queries must not be shown to the merger: something in them is not finite. What is
    not finite is merged into nothing, and what was finite stays finite; `undone` as in `kept_finite`.
    """
    own = view.with_state(state_of(view, MERGE_STATE), view.row_state)
    if not faults:
        return kept_finite(_merged(spec, own, kept), own, kept, undone)
    warn_of_faults(own)
    sound = Sound.of(spec.merge, own, kept)
    merged = kept_finite(_merged(spec, sound.view, sound.kept), sound.view, sound.kept, undone)
    return sound.whole(merged, own, kept)


def _merged(spec: PolicySpec, view: View, kept: Tensor) -> Entries:
    """What the merger gives, checked; `view` shows its own state."""
    with watching(spec.merge, lambda: {**tensors_of(view), "kept": kept}):
        entries: object = spec.merge.merge(view, kept)
    if not isinstance(entries, Entries):
        raise contract_error(spec.merge, f"returned {type(entries).__name__}, expected Entries")
    slots = dict(zip(("batch", "kv_heads", "kept"), kept.shape, strict=True))
    for vectors, source in ((entries.keys, view.keys), (entries.values, view.values)):
        check_tensor(spec.merge, vectors, {**slots, "dim": source.shape[-1]}, source.dtype, source.device)
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
