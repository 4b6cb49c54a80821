"""Decode steps in the kernel over entries that are packed in a basis of their own, and the newest that are not."""

import attrs
import pytest
import torch

from kvpolicy.attention.attend import attend
from kvpolicy.attention.decode_kernel import attend_in_kernel
from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.forward_observers import ATTENTION, ForwardObserver
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages import Column, Entries, Geometry, Site
from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_plugins.codecs.fp8 import Fp8
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.turboquant import TurboQuant
from tests.kernels.scenes import LOUD
from tests.support.driving import GROUP, HEADS, worth_plan
from tests.support.latents import rotary_of
from tests.unit.attention.test_attend import PAST, reference

EVEN, RAGGED = ((7, 7), (7, 7)), ((9, 2), (1, 5))
CODECS = {
    **{f"rotation {bits}": Rotation(bits, residual=bits % 3, batch=2) for bits in (1, 2, 3, 4)},
    **{f"turboquant {bits}": TurboQuant(bits, 4 - bits % 3, residual=bits % 3, batch=2) for bits in (1, 2, 3, 4, 8)},
    "turboquant, not corrected": TurboQuant(3, 3, norm_correction=False, signs="none", residual=1, batch=3),
    "rotation, full scales": Rotation(2, scales="full", batch=1),
    "fp8": Fp8(residual=2, batch=2),
}
CENTRED = Rotation(3, 4, norm_correction=True, centre="calibrated", sinks=2, batch=2)


def held_by(codec, lengths, dim=16, dtype=torch.float32, *, votes=False, pads=0):
    """Old entries and a new one in a storage that packs, and the query of it; the first row is a pad if `pads`."""
    random = torch.Generator().manual_seed(dim)
    rows, longest = len(lengths), max(map(max, lengths))
    plan = worth_plan(ragged=len({*lengths[0], *lengths[1]}) > 1)
    geometry = Geometry((0,), HEADS * GROUP, HEADS, dim)
    columns = {**plan.columns, LOG_VOTES: Column((), torch.float32)} if votes else plan.columns
    sizes = {"first": (HEADS, 2, dim), "others": (HEADS, dim)} if codec.calibrated else {}
    means = {name: 3 * torch.randn(size, generator=random) for name, size in sizes.items()}
    formats = codec.formats(Site(geometry, dtype, rotary=rotary_of(dim), calibration=means))
    plan = attrs.evolve(plan, columns=columns, dtype=dtype, geometry=geometry, formats=(formats,))
    keys, values = (torch.randn(rows, HEADS, longest + 1, dim, generator=random).to(dtype) for _ in range(2))
    queries = 2 * torch.randn(rows, HEADS * GROUP, 1, dim, generator=random).to(dtype)
    positions = torch.arange(longest).expand(rows, HEADS, -1).int()
    old = {POSITIONS: positions, ATTENTION: torch.zeros(rows, HEADS, longest, GROUP)}
    if votes:
        old[LOG_VOTES] = torch.rand(rows, HEADS, longest, generator=random)
    held = SegmentedStorage(plan, 0, rows, torch.device("cpu"))
    kept = torch.arange(longest).where(torch.arange(longest) < torch.tensor(lengths)[..., None], -1)
    past = Entries(keys[:, :, :longest], values[:, :, :longest])
    held.replace(CompactionPlan(range(rows), kept), past, old, longest + 1)
    at = torch.full((rows, 1), PAST)
    at[0, :pads] = -1
    held.append(keys[:, :, longest:], values[:, :, longest:], at[:, None].expand(-1, HEADS, -1).int(), longest + 1)
    assert not held.keys.is_plain
    return held, QueryBatch(queries, at, padded=bool(pads), scaling=dim**-0.5)


def assert_close(found, expected, dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, atol=tolerance), (found - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_it_is_attention_over_decoded_entries(codec, lengths, dtype):
    held, asked = held_by(codec, lengths, 16, dtype, votes=dtype != torch.float32)
    found = attend_in_kernel(held, asked, None, (), pads=False)
    assert_close(found, reference(held, asked)[0], dtype)


@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("codec", [*CODECS.values(), CENTRED], ids=[*CODECS, "centred"])
def test_torch_gives_attention_over_decoded_entries_too(codec, lengths):
    """A segment that is read by itself has the format of its head."""
    held, asked = held_by(codec, lengths)
    assert_close(attend(held, asked, pads=False), reference(held, asked)[0], torch.float32)


def test_means_by_position_are_left_to_torch():
    held, asked = held_by(CENTRED, EVEN)
    with pytest.raises(UnsupportedInputError, match=r"^Rotated adds a mean that depends on the position$"):
        attend_in_kernel(held, asked, None, (), pads=False)


@pytest.mark.parametrize("dim", [8, 32, 64, 128, 256])
@pytest.mark.parametrize("codec", [Rotation(3, batch=2), TurboQuant(3, 3, residual=1, batch=2)], ids=["all", "half"])
def test_head_dims(codec, dim):
    held, asked = held_by(codec, RAGGED, dim)
    found = attend_in_kernel(held, asked, None, (), pads=False)
    assert_close(found, reference(held, asked)[0], torch.float32)


@pytest.mark.parametrize("pads", [0, 1], ids=["full", "padded"])
@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
def test_observers_see_logits_and_weights_of_decoded_entries(lengths, pads):
    seen = []
    for kernels in (False, True):
        held, asked = held_by(TurboQuant(residual=2, batch=2), lengths, votes=True, pads=pads)
        held.slots.columns["mine"] = held.slots.columns[LOG_VOTES]
        held.slots.tensors["mine"] = held.slots.tensors[LOG_VOTES].clone()

        def sums(query_logits, state):
            return {"mine": state["mine"] + query_logits.logits.nan_to_num(neginf=-1).sum((2, 3))}

        def mass(query_logits, state):
            return {ATTENTION: state[ATTENTION] + query_logits.probabilities.sum(3).transpose(2, 3)}

        observers = ForwardObserver(1, {"mine": "mine"}, sums), ForwardObserver(1, {ATTENTION: ATTENTION}, mass)
        if kernels:
            out = attend_in_kernel(held, asked, None, observers, pads=bool(pads))
        else:
            out = attend(held, asked, observers=observers, pads=bool(pads))
        seen.append((out, held.slots.tensors["mine"], held.slots.tensors[ATTENTION]))
    for torchs, kernels in zip(*seen, strict=True):
        assert torch.allclose(torchs, kernels, atol=1e-5)


def test_chosen_slots_may_be_packed_or_not():
    held, asked = held_by(TurboQuant(residual=2, batch=2), EVEN)
    slots = torch.tensor([0, 3, 6, 7, -1]).expand(2, HEADS, -1)
    found = attend_in_kernel(held, asked, slots, (), pads=False)
    assert torch.allclose(found, attend(held, asked, slots, pads=False), atol=1e-5)


@LOUD
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_is_not_a_number_stays_in_its_head(name, bad):
    held, asked = held_by(Rotation(4, residual=2, batch=2), RAGGED)
    clean = attend_in_kernel(held, asked, None, (), pads=False)
    getattr(held, name).residual.segment(name, 1, 1)[-1, 3] = bad
    found = attend_in_kernel(held, asked, None, (), pads=False)
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :GROUP], clean[1, :GROUP])
    assert not torch.equal(found[1, GROUP:], clean[1, GROUP:])


def test_what_is_beyond_half_precision_in_the_basis_becomes_the_largest_number():
    held, asked = held_by(Rotation(4, residual=3, batch=2), EVEN, 64, torch.float16)
    values = held.values.residual.segment("values", 0, 0)
    values[-1] = 6e4 * torch.tensor(held.values.form.signs)  # 8 times as much in one component
    found = attend_in_kernel(held, asked, None, (), pads=False)
    assert bool(found.isfinite().all())


def test_nothing_held_changes():
    held, asked = held_by(TurboQuant(residual=2, batch=2), RAGGED)
    before = [tensor.clone() for store in held.stores for tensor in store.tensors.values()]
    attend_in_kernel(held, asked, None, (), pads=False)
    after = [tensor for store in held.stores for tensor in store.tensors.values()]
    assert all(map(torch.equal, before, after))
