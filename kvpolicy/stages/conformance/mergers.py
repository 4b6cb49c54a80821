"""Checks for mergers: one entry per keep index, changed entries are marked, and state is as declared."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checking.declared import needs_of
from kvpolicy.stages.checking.returned import check_tensor, contract_error
from kvpolicy.stages.checking.untouched import tensors_of, untouched
from kvpolicy.stages.conformance.observers import expect_declared
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import (
    expect_close,
    of_another_layer,
    query_logits_of,
    rows_of,
    sample_view,
    with_junk,
)
from kvpolicy.stages.contracts import Entries, Merger
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy.stages.view import View


def returns_the_kept_slots(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        for dtype in (torch.float32, torch.bfloat16):
            typed = attrs.evolve(view, keys=view.keys.to(dtype), values=view.values.to(dtype))
            _check_entries(merger, typed, kept, merger.merge(typed, kept))


def gives_finite_entries(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        for keys in (torch.ones_like(view.keys), torch.zeros_like(view.keys), 100 * view.keys):
            special = attrs.evolve(view, keys=keys)
            _check_entries(merger, special, kept, merger.merge(special, kept))


def copes_with_nothing_to_keep(merger: Merger, _promises: Promises) -> None:
    view = _view(merger, lengths=((9, 9), (0, 0), (2, 0)))
    one_head = torch.zeros_like(view.valid)
    one_head[0, 0] = view.valid[0, 0]
    for mask in (view.valid, one_head, torch.zeros_like(one_head)):
        kept = indices_of(mask)
        _check_entries(merger, view, kept, merger.merge(view, kept))


def says_what_it_changed(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        entries = merger.merge(view, kept)
        same = torch.ones_like(kept, dtype=torch.bool) if entries.changed is None else ~entries.changed
        same &= kept >= 0
        for name in ("keys", "values"):
            if not torch.equal(getattr(entries, name)[same], gather(getattr(view, name), kept)[same]):
                raise contract_error(
                    merger, f"returned {name} that are not marked in `changed`, but differ from the kept slots"
                )


def changes_nothing_if_all_is_kept(merger: Merger, _promises: Promises) -> None:
    view = _view(merger)
    _expect_gather(merger, view, indices_of(view.valid))


def moves_entries_bit_for_bit(merger: Merger, promises: Promises) -> None:
    if promises.gathers:
        for view, kept in _samples(merger):
            _expect_gather(merger, view, kept)


def keeps_rows_apart(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        batched = _tensors_of(merger.merge(view, kept))
        for row in range(kept.shape[0]):
            alone = _tensors_of(merger.merge(rows_of(view, [row]), kept[[row]]))
            _expect_same(merger, kept[[row]], alone, _select_rows(batched, [row]), f"for row {row} alone")


def ignores_empty_slots(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        actual, expected = (_tensors_of(merger.merge(sample, kept)) for sample in (with_junk(view), view))
        _expect_same(merger, kept, actual, expected, "when the contents of empty slots differ")


def is_deterministic(merger: Merger, _promises: Promises) -> None:
    for (view, kept), (again, _) in zip(_samples(merger), _samples(merger), strict=True):
        first, second = _tensors_of(merger.merge(view, kept)), _tensors_of(merger.merge(again, kept))
        if not all(torch.equal(first[name], second[name]) for name in first):
            raise contract_error(merger, "gave other entries the second time")


def looks_at_no_layer(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger) if merger.layers_as_rows else ():
        actual, expected = (_tensors_of(merger.merge(sample, kept)) for sample in (of_another_layer(view), view))
        _expect_same(merger, kept, actual, expected, "for another layer")


def leaves_its_input_alone(merger: Merger, _promises: Promises) -> None:
    """The runtime writes the entries over the tensors of the view, so they must not share memory with them."""
    for view, kept in _samples(merger):
        inputs = tensors_of(view)
        with untouched(merger, {**inputs, "kept": kept}):
            entries = merger.merge(view, kept)
        input_pointers = {tensor.untyped_storage().data_ptr() for tensor in inputs.values() if tensor.numel()}
        for name, tensor in _tensors_of(entries).items():
            if tensor.numel() and tensor.untyped_storage().data_ptr() in input_pointers:
                raise contract_error(merger, f"returned {name} in the memory of its input, expected a new tensor")


def _view(merger: Merger, **sizes: tuple[tuple[int, ...], ...]) -> View:
    """A view after one observed forward."""
    view = sample_view(merger, **sizes)
    if not needs_of(merger).forward_queries:
        return view
    observed = merger.observe_forward(query_logits_of(merger, view), view.slot_state)
    return attrs.evolve(view, slot_state={**view.slot_state, **observed})


def _samples(merger: Merger) -> list[tuple[View, Tensor]]:
    """Samples: a third of the candidates kept; only protected entries kept; no forward observed."""
    view, fresh = _view(merger), sample_view(merger)
    some = view.protected | (view.candidates & (view.positions % 3 == 0))
    return [(view, indices_of(some)), (view, indices_of(view.protected)), (fresh, indices_of(some))]


def _check_entries(merger: Merger, view: View, kept: Tensor, entries: Entries) -> None:
    """Check shapes, dtypes, and that numbers are finite."""
    sizes, device = dict(zip(("batch", "kv_heads", "kept"), kept.shape, strict=True)), view.keys.device
    for actual, source in ((entries.keys, view.keys), (entries.values, view.values)):
        check_tensor(merger, actual, {**sizes, "head_dim": source.shape[-1]}, source.dtype, device)
        _expect_finite(merger, "entries", actual)
    if merger.votes:
        check_tensor(merger, entries.log_votes, sizes, torch.float32, device)
        _expect_finite(merger, "log-votes", torch.as_tensor(entries.log_votes)[kept >= 0])
    elif entries.log_votes is not None:
        raise contract_error(merger, "returned log-votes, expected `votes` to be True")
    if entries.changed is not None:
        check_tensor(merger, entries.changed, sizes, torch.bool, device)
    expect_declared(merger, "returned slot state", entries.slot_state, merger.slot_state())
    expect_declared(merger, "returned row state", entries.row_state, merger.row_state())
    for states, shape in ((entries.slot_state, sizes), (entries.row_state, {"batch": kept.shape[0]})):
        for state in states.values():
            check_tensor(merger, state, shape, torch.float32, device)
            _expect_finite(merger, "state", state.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0))


def _expect_finite(merger: Merger, name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise contract_error(merger, f"returned {name} that are not finite")


def _expect_gather(merger: Merger, view: View, kept: Tensor) -> None:
    entries = merger.merge(view, kept)
    for name in ("keys", "values"):
        if not torch.equal(getattr(entries, name), gather(getattr(view, name), kept)):
            raise contract_error(merger, f"returned {name} that differ from the kept slots")
    if merger.votes and view.log_votes is not None:
        expect_close(
            merger, torch.as_tensor(entries.log_votes), gather(view.log_votes, kept), "for votes of kept slots"
        )


def _tensors_of(entries: Entries) -> dict[str, Tensor]:
    """All tensors of the entries, by name."""
    tensors = {
        "keys": entries.keys,
        "values": entries.values,
        "log_votes": entries.log_votes,
        "changed": entries.changed,
    }
    states = {f"{name} of the slots": state for name, state in entries.slot_state.items()}
    rows = {f"{name} of the row": state for name, state in entries.row_state.items()}
    return {name: tensor for name, tensor in {**tensors, **states, **rows}.items() if tensor is not None}


def _select_rows(tensors: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def _expect_same(
    merger: Merger, kept: Tensor, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], condition: str
) -> None:
    for name, tensor in actual.items():
        valid = kept >= 0 if tensor.ndim > 1 else torch.ones_like(tensor, dtype=torch.bool)
        expect_close(merger, tensor[valid], expected[name][valid], condition)


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
    looks_at_no_layer,
    leaves_its_input_alone,
)
