"""Checks for readers: they choose valid slots, in order, independent of other rows and of empty slots."""

import torch
from torch import Tensor

from kvpolicy.stages.checking.declared import pages_of
from kvpolicy.stages.checking.returned import check_tensor, contract_error
from kvpolicy.stages.checking.untouched import tensors_of_request, untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.read_requests import (
    GEOMETRY,
    JUNK,
    MIDDLE,
    complete_groups,
    entries,
    requests,
    row_alone,
)
from kvpolicy.stages.contracts import Reader, ReadRequest
from kvpolicy.stages.formats import Site


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
        unread = ~_read(reader, request).any(-1) & (request.positions >= 0).any(-1)
        if unread.any():
            raise contract_error(reader, f"chose nothing in {int(unread.sum())} heads that have entries")


def encodes_pages_to_their_columns(reader: Reader, _promises: Promises) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        page_format = pages_of(reader, Site(GEOMETRY, dtype, MIDDLE))
        if page_format is None:
            return
        keys, positions = entries(dtype)
        pages = complete_groups(page_format, keys, positions)
        if pages.keys() != page_format.columns.keys():
            raise contract_error(reader, f"encoded pages to {sorted(pages)}, expected {sorted(page_format.columns)}")
        for name, column in page_format.columns.items():
            shape = (*keys.shape[:2], keys.shape[2] // page_format.group_size, *column.shape)
            sizes = {f"{name}[{index}]": size for index, size in enumerate(shape)}
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
            raise contract_error(reader, "chose other entries when the contents of empty slots differ")


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
        raise contract_error(reader, "chose empty slots")
    end = positions.shape[-1]
    slots = chosen.masked_fill(chosen < 0, end)
    if ((slots[..., 1:] <= slots[..., :-1]) & (slots[..., 1:] < end)).any():
        raise contract_error(reader, "chose slots that are not ascending and padded with -1 at the end")


def _read(reader: Reader, request: ReadRequest) -> Tensor:
    """[B, K, T] bool: slots that are attended."""
    valid = request.positions >= 0
    chosen = reader.choose(request)
    if chosen is None:
        return valid
    slots = request.positions.shape[-1]
    attended = torch.zeros(*valid.shape[:2], slots + 1, dtype=torch.bool)
    return attended.scatter_(-1, chosen.where(chosen >= 0, slots), value=True)[..., :slots]


CHECKS = (
    chooses_held_slots_in_order,
    reads_something_of_every_head,
    encodes_pages_to_their_columns,
    keeps_rows_apart,
    ignores_empty_slots,
    is_deterministic,
    leaves_its_input_alone,
)
