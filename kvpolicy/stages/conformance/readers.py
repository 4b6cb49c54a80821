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
    questions,
    row_alone,
    whole_units,
)
from kvpolicy.stages.contracts import Question, Reader
from kvpolicy.stages.declared import pages_of
from kvpolicy.stages.formats import Site
from kvpolicy.stages.untouched import tensors_of_question, untouched


def chooses_held_slots_in_order(reader: Reader, _promises: Promises) -> None:
    for question in questions(reader):
        chosen = reader.choose(question)
        if chosen is None:
            continue
        width = chosen.shape[-1] if isinstance(chosen, Tensor) and chosen.ndim else 0
        row = dict(zip(("batch", "kv_heads"), question.positions.shape[:2], strict=True))
        check_tensor(reader, chosen, {**row, "chosen": width}, torch.int64, question.positions.device)
        _expect_in_order(reader, chosen, question.positions)


def reads_something_of_every_head(reader: Reader, _promises: Promises) -> None:
    for question in questions(reader):
        lost = ~_read(reader, question).any(-1) & (question.positions >= 0).any(-1)
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
            row = (*keys.shape[:2], keys.shape[2] // form.unit, *column.shape)
            sizes = {f"{name}[{index}]": size for index, size in enumerate(row)}
            check_tensor(reader, pages[name], sizes, column.dtype, keys.device)


def keeps_rows_apart(reader: Reader, _promises: Promises) -> None:
    for question in questions(reader):
        together = _read(reader, question)
        for row in range(len(together)):
            alone = _read(reader, row_alone(question, row))
            if not torch.equal(alone[0], together[row][:, : alone.shape[-1]]):
                raise contract_error(reader, f"chose other entries for row {row} alone")


def ignores_empty_slots(reader: Reader, _promises: Promises) -> None:
    for question, *others in zip(*(questions(reader, junk) for junk in (0.0, JUNK, -JUNK)), strict=True):
        if any(not torch.equal(_read(reader, other), _read(reader, question)) for other in others):
            raise contract_error(reader, "chose other entries with other empty slots")


def is_deterministic(reader: Reader, _promises: Promises) -> None:
    for question, again in zip(questions(reader), questions(reader), strict=True):
        if not torch.equal(_read(reader, question), _read(reader, again)):
            raise contract_error(reader, "chose other entries the second time")


def leaves_its_input_alone(reader: Reader, _promises: Promises) -> None:
    for question in questions(reader):
        with untouched(reader, tensors_of_question(question)):
            reader.choose(question)


def _expect_in_order(reader: Reader, chosen: Tensor, positions: Tensor) -> None:
    lengths = (positions >= 0).sum(-1, keepdim=True)
    if ((chosen < -1) | (chosen >= lengths)).any():
        raise contract_error(reader, "chose slots that hold nothing")
    behind = positions.shape[-1]
    slots = chosen.masked_fill(chosen < 0, behind)
    if ((slots[..., 1:] <= slots[..., :-1]) & (slots[..., 1:] < behind)).any():
        raise contract_error(reader, "chose slots that are not ascending, with -1 behind a head's last one")


def _read(reader: Reader, question: Question) -> Tensor:
    """[B, K, T] bool: what is attended."""
    held = question.positions >= 0
    chosen = reader.choose(question)
    if chosen is None:
        return held
    behind = question.positions.shape[-1]
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
