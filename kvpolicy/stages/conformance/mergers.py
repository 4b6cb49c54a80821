"""Mergers: as many entries as were kept, and nothing changed where nothing was evicted."""

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import (
    expect_close,
    expect_untouched,
    rows_of,
    sample_view,
    tensors_of,
)
from kvpolicy.stages.contracts import Entries, Merger
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy.stages.view import View


def returns_the_kept_slots(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        entries = merger.merge(view, kept)
        sizes = dict(zip(("batch", "kv_heads", "kept"), kept.shape, strict=True))
        for found, source in ((entries.keys, view.keys), (entries.values, view.values)):
            row = {**sizes, "head_dim": source.shape[-1]}
            check_tensor(merger, found, row, source.dtype, source.device)
            if not found.isfinite().all():
                raise contract_error(merger, "returned entries that are not finite")
        if merger.votes:
            check_tensor(merger, entries.log_votes, sizes, torch.float32, view.keys.device)


def changes_nothing_if_all_is_kept(merger: Merger, _promises: Promises) -> None:
    view = _view(merger)
    _expect_gather(merger, view, indices_of(view.valid))


def moves_entries_bit_for_bit(merger: Merger, promises: Promises) -> None:
    if promises.gathers:
        for view, kept in _samples(merger):
            _expect_gather(merger, view, kept)


def keeps_rows_apart(merger: Merger, _promises: Promises) -> None:
    view, kept = _samples(merger)[0]
    together = merger.merge(view, kept)
    for row in range(kept.shape[0]):
        alone = merger.merge(_only(view, row), kept[[row]])
        for name in ("keys", "values"):
            found, expected = getattr(alone, name), getattr(together, name)[[row]]
            held = kept[[row]] >= 0
            expect_close(merger, found[held], expected[held], f"for row {row} alone")


def leaves_its_input_alone(merger: Merger, _promises: Promises) -> None:
    for view, kept in _samples(merger):
        before = {name: tensor.clone() for name, tensor in tensors_of(view).items()}
        merger.merge(view, kept)
        expect_untouched(merger, before, tensors_of(view))


def _view(merger: Merger) -> View:
    view = sample_view()
    return attrs.evolve(view, log_votes=torch.zeros(view.positions.shape)) if merger.votes else view


def _samples(merger: Merger) -> list[tuple[View, Tensor]]:
    view = _view(merger)
    every_third = view.candidates & (view.positions % 3 == 0)
    return [(view, indices_of(mask)) for mask in (view.protected | every_third, view.protected)]


def _only(view: View, row: int) -> View:
    votes = view.log_votes
    alone = rows_of(view, [row])
    slots = alone.positions.shape[-1]
    return attrs.evolve(alone, log_votes=None if votes is None else votes[[row], :, :slots])


def _expect_gather(merger: Merger, view: View, kept: Tensor) -> None:
    entries: Entries = merger.merge(view, kept)
    for name in ("keys", "values"):
        if not torch.equal(getattr(entries, name), gather(getattr(view, name), kept)):
            raise contract_error(merger, f"returned other {name} than those of the kept slots")


CHECKS = (
    returns_the_kept_slots,
    changes_nothing_if_all_is_kept,
    moves_entries_bit_for_bit,
    keeps_rows_apart,
    leaves_its_input_alone,
)
