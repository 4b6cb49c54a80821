"""Attention of decode steps in the kernel, against the same attention in torch."""

import logging

import attrs
import pytest
import torch

from kvpolicy.attention import attend as attention
from kvpolicy.attention.attend import attend
from kvpolicy.plan.compress import kernel_errors
from kvpolicy.plan.forward_observers import ATTENTION, ForwardObserver
from kvpolicy.plan.plan import LOG_VOTES
from kvpolicy_kernels import UnsupportedInputError
from tests.support.storage import tensors
from tests.unit.attention.test_attend import LENGTHS, stored


@pytest.fixture
def launches(monkeypatch):
    """How many calls the kernel has served."""
    served = []
    inner = attention.attend_in_kernel

    def counting(*given, **named):
        output = inner(*given, **named)
        served.append(output)
        return output

    monkeypatch.setattr(attention, "attend_in_kernel", counting)
    return served


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize("pads", [0, 1], ids=["full", "padded"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_it_is_what_torch_gives(lengths, pads, votes, dtype, launches):
    _, held, asked = stored(lengths, 1, dtype, votes=votes, pads=pads)
    before = {name: one.clone() for name, one in tensors(held).items()}
    expected = attend(held, asked, pads=bool(pads))
    found = attend(held, asked, pads=bool(pads), kernels=True)
    assert len(launches) == 1
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert all(torch.equal(tensors(held)[name], one) for name, one in before.items())


@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize("pads", [0, 1], ids=["full", "padded"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_observers_see_the_same(lengths, pads, votes, launches):
    glimpses = []
    other = ForwardObserver(1, {"mine": ATTENTION + "2"}, lambda query_logits, _: glimpses.append(query_logits) or {})
    outputs, masses = [], []
    for kernels in (False, True):
        plan, held, asked = stored(lengths, 1, votes=votes, pads=pads)
        held.slots.columns[ATTENTION + "2"] = held.slots.columns[LOG_VOTES if votes else ATTENTION]
        held.slots.tensors[ATTENTION + "2"] = held.slots.tensors[LOG_VOTES if votes else ATTENTION].clone()
        observers = (*plan.observers, other)
        outputs.append(attend(held, asked, observers=observers, pads=bool(pads), kernels=kernels))
        masses.append(held.slots.tensors[ATTENTION])
    assert len(launches) == 1
    assert torch.allclose(*outputs, atol=1e-5)
    assert torch.allclose(*masses, atol=1e-5)
    assert len(glimpses) % 2 == 0
    half = len(glimpses) // 2
    for torchs, kernels in zip(glimpses[:half], glimpses[half:], strict=True):
        assert torch.allclose(torchs.logits, kernels.logits, atol=1e-5)
        assert (torchs.log_votes is None) == (kernels.log_votes is None)
        assert torch.allclose(torchs.probabilities, kernels.probabilities, atol=1e-6)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chosen_slots_are_all_that_is_read(lengths, launches):
    _, held, asked = stored(lengths, 1, votes=True)
    slots = torch.full((2, 2, 4), -1)
    for row, heads in enumerate(held.slots.lengths):
        for head, length in enumerate(heads):
            chosen = torch.arange(0, length, 2)[:4]
            slots[row, head, : len(chosen)] = chosen
    expected = attend(held, asked, slots, pads=False)
    assert torch.allclose(attend(held, asked, slots, pads=False, kernels=True), expected, atol=1e-5)
    assert len(launches) == 1


@pytest.mark.parametrize(("count", "dropout"), [(3, 0.0), (1, 0.5)])
def test_more_queries_and_dropout_are_left_to_torch(count, dropout, launches):
    _, held, asked = stored(LENGTHS["ragged"], count)
    attend(held, asked, pads=False, dropout=dropout, kernels=True)
    assert not launches


def test_what_the_kernel_refuses_is_done_by_torch_and_said_once(monkeypatch, caplog, launches):
    monkeypatch.setattr(kernel_errors, "_noted", set())
    _, held, asked = stored(LENGTHS["ragged"], 1, torch.float64)
    asked = attrs.evolve(asked, queries=asked.queries.double())
    with caplog.at_level(logging.WARNING, logger="kvpolicy"):
        found = [attend(held, asked, pads=False, kernels=True) for _ in range(3)]
    assert not launches
    assert all(torch.equal(one, attend(held, asked, pads=False)) for one in found)
    assert [record.message for record in caplog.records] == [
        "attention over held entries runs without a kernel: no attention in torch.float64"
    ]


def test_other_reasons_are_said_too(monkeypatch, caplog):
    monkeypatch.setattr(kernel_errors, "_noted", set())
    _, held, asked = stored(LENGTHS["even"], 1)
    for reason in ("one", "two", "one"):

        def refuse(*_, reason=reason, **__):
            raise UnsupportedInputError(reason)

        monkeypatch.setattr(attention, "attend_in_kernel", refuse)
        attend(held, asked, pads=False, kernels=True)
    assert [record.message.rsplit(" ", 1)[1] for record in caplog.records] == ["one", "two"]


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(attention, "attend_in_kernel", fail)
    _, held, asked = stored(LENGTHS["even"], 1)
    with pytest.raises(ZeroDivisionError):
        attend(held, asked, pads=False, kernels=True)
