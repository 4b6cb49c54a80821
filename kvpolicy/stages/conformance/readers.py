"""Readers: slots that hold entries, in order, and the same ones whatever lies beside them."""

import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.read_requests import (
    GEOMETRY,
    JUNK,
    MIDDLE,
    entries,
    requests,
    row_alone,
    whole_units,
)
from kvpolicy.stages.contracts import Reader, ReadRequest
from kvpolicy.stages.declared import pages_of
from kvpolicy.stages.formats import Site
from kvpolicy.stages.untouched import tensors_of_request, untouched


def chooses_held_slots_in_order(reader: Reader, _promises: Promises) -> None:
    for request in requests(reader):
        chosen = reader.choose(request)
        if chosen is None:
            continue
        width = chosen.shape[-1] if isinstance(chosen, Tensor) and chosen.ndim else 0
        row = dict(zip(("batch", "kv_heads"), request.positions.shape[:2], strict=True))
        check_tensor(reader, chosen, {**row, "chosen": width}, torch.int64, request.positions.device)
        _expect_in_order(reader, chosen, request.positions)


def reads_something_of_every_head(reader: Reader, _promises: Promises) -> None:
    for request in requests(reader):
        lost = ~_read(reader, request).any(-1) & (request.positions >= 0).any(-1)
        if lost.any():
            raise contract_error(reader, f"chose nothing in {int(lost.sum())} heads that hold entries")


def encodes_pages_to_their_columns(reader: Reader, _promises: Promises) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        form = pages_of(reader, Site(GEOMETRY, dtype, MIDDLE))
        if form is None:
            return
        keys, positions = entries(dtype)
        pages = whole_units(form, keys, positions)
        if pages.keys() != form.columns.keys():
            raise contract_error(reader, f"encoded pages to {sorted(pages)}, expected {sorted(form.columns)}")
        for name, column in form.columns.items():
            row = (*keys.shape[:2], keys.shape[2] // form.group_size, *column.shape)
            sizes = {f"{name}[{index}]": size for index, size in enumerate(row)}
            check_tensor(reader, pages[name], sizes, column.dtype, keys.device)


def keeps_rows_apart(reader: Reader, _promises: Promises) -> None:
    for request in requests(reader):
        together = _read(reader, request)
        for row in range(len(together)):
            alone = _read(reader, row_alone(request, row))
            if not torch.equal(alone[0], together[row][:, : alone.shape[-1]]):
                raise contract_error(reader, f"chose other entries for row {row} alone")


def ignores_empty_slots(reader: Reader, _promises: Promises) -> None:
    for request, *others in zip(*(requests(reader, junk) for junk in (0.0, JUNK, -JUNK)), strict=True):
        if any(not torch.equal(_read(reader, other), _read(reader, request)) for other in others):
            raise contract_error(reader, "chose other entries with other empty slots")


def is_deterministic(reader: Reader, _promises: Promises) -> None:
    for request, again in zip(requests(reader), requests(reader), strict=True):
        if not torch.equal(_read(reader, request), _read(reader, again)):
            raise contract_error(reader, "chose other entries the second time")


def leaves_its_input_alone(reader: Reader, _promises: Promises) -> None:
    for request in requests(reader):
        with untouched(reader, tensors_of_request(request)):
            reader.choose(request)


def _expect_in_order(reader: Reader, chosen: Tensor, positions: Tensor) -> None:
    lengths = (positions >= 0).sum(-1, keepdim=True)
    if ((chosen < -1) | (chosen >= lengths)).any():
        raise contract_error(reader, "chose slots that hold nothing")
    behind = positions.shape[-1]
    slots = chosen.masked_fill(chosen < 0, behind)
    if ((slots[..., 1:] <= slots[..., :-1]) & (slots[..., 1:] < behind)).any():
        raise contract_error(reader, "chose slots that are not ascending, with -1 behind a head's last one")


def _read(reader: Reader, request: ReadRequest) -> Tensor:
    """[B, K, T] bool: what is attended."""
    held = request.positions >= 0
    chosen = reader.choose(request)
    if chosen is None:
        return held
    behind = request.positions.shape[-1]
    marked = torch.zeros(*held.shape[:2], behind + 1, dtype=torch.bool)
    return marked.scatter_(-1, chosen.where(chosen >= 0, behind), value=True)[..., :behind]


CHECKS = (
    chooses_held_slots_in_order,
    reads_something_of_every_head,
    encodes_pages_to_their_columns,
    keeps_rows_apart,
    ignores_empty_slots,
    is_deterministic,
    leaves_its_input_alone,
)
