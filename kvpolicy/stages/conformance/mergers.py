"""Mergers: as many entries as were kept, nothing changed without saying so, and state as it was declared."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.observers import expect_declared
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import (
    expect_close,
    query_logits_of,
    rows_of,
    sample_view,
    with_junk,
)
from kvpolicy.stages.contracts import Entries, Merger
from kvpolicy.stages.declared import needs_of
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy.stages.untouched import tensors_of, untouched
from kvpolicy.stages.view import View


def returns_the_kept_slots(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        for dtype in (torch.float32, torch.bfloat16):
            typed = attrs.evolve(view, keys=view.keys.to(dtype), values=view.values.to(dtype))
            _check_entries(merger, typed, kept, merger.merge(typed, kept))


def gives_finite_entries(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        for keys in (torch.ones_like(view.keys), torch.zeros_like(view.keys), 100 * view.keys):
            odd = attrs.evolve(view, keys=keys)
            _check_entries(merger, odd, kept, merger.merge(odd, kept))


def copes_with_nothing_to_keep(merger: Merger, _promises: Promises) -> None:
    view = _view(merger, lengths=((9, 9), (0, 0), (2, 0)))
    head = torch.zeros_like(view.valid)
    head[0, 0] = view.valid[0, 0]
    for mask in (view.valid, head, torch.zeros_like(head)):
        kept = indices_of(mask)
        _check_entries(merger, view, kept, merger.merge(view, kept))


def says_what_it_changed(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        entries = merger.merge(view, kept)
        same = torch.ones_like(kept, dtype=torch.bool) if entries.changed is None else ~entries.changed
        same &= kept >= 0
        for name in ("keys", "values"):
            if not torch.equal(getattr(entries, name)[same], gather(getattr(view, name), kept)[same]):
                raise contract_error(merger, f"returned other {name} than those of kept slots, without `changed`")


def changes_nothing_if_all_is_kept(merger: Merger, _promises: Promises) -> None:
    view = _view(merger)
    _expect_gather(merger, view, indices_of(view.valid))


def moves_entries_bit_for_bit(merger: Merger, promises: Promises) -> None:
    if promises.gathers:
        for view, kept in _samples(merger):
            _expect_gather(merger, view, kept)


def keeps_rows_apart(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        together = _parts(merger.merge(view, kept))
        for row in range(kept.shape[0]):
            alone = _parts(merger.merge(rows_of(view, [row]), kept[[row]]))
            _expect_same(merger, kept[[row]], alone, _taken(together, [row]), f"for row {row} alone")


def ignores_empty_slots(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        found, expected = (_parts(merger.merge(one, kept)) for one in (with_junk(view), view))
        _expect_same(merger, kept, found, expected, "with other empty slots")


def is_deterministic(merger: Merger, _promises: Promises) -> None:
    for (view, kept), (again, _) in zip(_samples(merger), _samples(merger), strict=True):
        first, second = _parts(merger.merge(view, kept)), _parts(merger.merge(again, kept))
        if not all(torch.equal(first[name], second[name]) for name in first):
            raise contract_error(merger, "gave other entries the second time")


def leaves_its_input_alone(merger: Merger, _promises: Promises) -> None:
    """The entries are written where the view's tensors are, so they must be tensors of their own."""
    for view, kept in _samples(merger):
        mine = tensors_of(view)
        with untouched(merger, {**mine, "kept": kept}):
            entries = merger.merge(view, kept)
        taken = {tensor.untyped_storage().data_ptr() for tensor in mine.values() if tensor.numel()}
        for name, tensor in _parts(entries).items():
            if tensor.numel() and tensor.untyped_storage().data_ptr() in taken:
                raise contract_error(
                    merger, f"returned {name} in the memory of its input, expected a tensor of its own"
                )


def _view(merger: Merger, **sizes: tuple[tuple[int, ...], ...]) -> View:
    """What the merger is shown by a cache that has been observed for one forward."""
    view = sample_view(merger, **sizes)
    if not needs_of(merger).forward_queries:
        return view
    observed = merger.observe_forward(query_logits_of(merger, view), view.slot_state)
    return attrs.evolve(view, slot_state={**view.slot_state, **observed})


def _samples(merger: Merger) -> list[tuple[View, Tensor]]:
    """A third of the entries kept, only the protected ones, and a cache of which nothing was seen."""
    view, fresh = _view(merger), sample_view(merger)
    some = view.protected | (view.candidates & (view.positions % 3 == 0))
    return [(view, indices_of(some)), (view, indices_of(view.protected)), (fresh, indices_of(some))]


def _check_entries(merger: Merger, view: View, kept: Tensor, entries: Entries) -> None:
    """Shapes, dtypes and finite numbers."""
    sizes, device = dict(zip(("batch", "kv_heads", "kept"), kept.shape, strict=True)), view.keys.device
    for found, source in ((entries.keys, view.keys), (entries.values, view.values)):
        check_tensor(merger, found, {**sizes, "head_dim": source.shape[-1]}, source.dtype, device)
        _expect_finite(merger, "entries", found)
    if merger.votes:
        check_tensor(merger, entries.log_votes, sizes, torch.float32, device)
        _expect_finite(merger, "log-votes", torch.as_tensor(entries.log_votes)[kept >= 0])
    elif entries.log_votes is not None:
        raise contract_error(merger, "returned log-votes, expected `votes` to say so")
    if entries.changed is not None:
        check_tensor(merger, entries.changed, sizes, torch.bool, device)
    expect_declared(merger, "returned slot state", entries.slot_state, merger.slot_state())
    expect_declared(merger, "returned row state", entries.row_state, merger.row_state())
    for states, shape in ((entries.slot_state, sizes), (entries.row_state, {"batch": kept.shape[0]})):
        for state in states.values():
            check_tensor(merger, state, shape, torch.float32, device)
            _expect_finite(merger, "state", state.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0))


def _expect_finite(merger: Merger, what: str, found: Tensor) -> None:
    if not found.isfinite().all():
        raise contract_error(merger, f"returned {what} that are not finite")


def _expect_gather(merger: Merger, view: View, kept: Tensor) -> None:
    entries = merger.merge(view, kept)
    for name in ("keys", "values"):
        if not torch.equal(getattr(entries, name), gather(getattr(view, name), kept)):
            raise contract_error(merger, f"returned other {name} than those of the kept slots")
    if merger.votes and view.log_votes is not None:
        expect_close(
            merger, torch.as_tensor(entries.log_votes), gather(view.log_votes, kept), "for votes of kept slots"
        )


def _parts(entries: Entries) -> dict[str, Tensor]:
    """Every tensor of the entries, by name."""
    own = {"keys": entries.keys, "values": entries.values, "log_votes": entries.log_votes, "changed": entries.changed}
    states = {f"{name} of the slots": state for name, state in entries.slot_state.items()}
    rows = {f"{name} of the row": state for name, state in entries.row_state.items()}
    return {name: part for name, part in {**own, **states, **rows}.items() if part is not None}


def _taken(parts: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: part[rows] for name, part in parts.items()}


def _expect_same(
    merger: Merger, kept: Tensor, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str
) -> None:
    for name, part in found.items():
        held = kept >= 0 if part.ndim > 1 else torch.ones_like(part, dtype=torch.bool)
        expect_close(merger, part[held], expected[name][held], when)


CHECKS = (
    returns_the_kept_slots,
    gives_finite_entries,
    copes_with_nothing_to_keep,
    says_what_it_changed,
    changes_nothing_if_all_is_kept,
    moves_entries_bit_for_bit,
    keeps_rows_apart,
    ignores_empty_slots,
    is_deterministic,
    leaves_its_input_alone,
)
