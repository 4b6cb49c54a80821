"""Decode attention over entries that are hidden, extreme or not there, and what is refused."""

import attrs
import pytest
import torch

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.attention.decode import decode
from kvpolicy_kernels.attention.kv_input import ExtraOutputs, KVTensorInput
from tests.kernels.attention.decoding import MIXED, SMALL, assert_right, call, channels, run
from tests.kernels.scenes import DEVICE, LOUD


@LOUD
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("plan", [None, SMALL])
def test_what_is_not_a_number_stays_in_its_head(where, bad, plan):
    one = call(MIXED, 64, torch.float32, seed=3)
    clean, _, _ = run(one, plan)
    getattr(one, where)[3][40, 5] = bad
    out, _, _ = run(one, plan)
    others = torch.arange(one.found.segments.count) != 3
    assert torch.equal(out[others], clean[others])
    assert not torch.equal(out[3], clean[3])
    wrong = ~out[3].isfinite()
    assert bool(wrong.all() if where == "keys" and bad != bad else wrong[:, 5].any())  # noqa: PLR0124 NaN


def test_a_hidden_entry_may_hold_anything():
    one = call(MIXED, 64, torch.float32, positions=True, seed=4)
    clean, _, _ = run(one, SMALL)
    for place in range(one.found.segments.count):
        positions = one.found.lists("positions")[place]
        row = place % one.found.segments.per_layer // one.found.segments.heads
        hidden = positions > one.query_positions[row]
        one.keys[place][hidden] = torch.nan
        one.values[place][hidden] = torch.inf
    assert torch.equal(run(one, SMALL)[0], clean)
    assert any(bool((one.found.lists("positions")[0] > seen).any()) for seen in one.query_positions)


@pytest.mark.parametrize("plan", [None, SMALL])
def test_a_query_that_sees_nothing_gives_zeros(plan):
    one = call(MIXED, 64, torch.bfloat16, positions=True)
    nothing = attrs.evolve(one, query_positions=torch.full_like(one.query_positions, -1))
    out, logits, mass = run(nothing, plan, logits=True, mass=True)
    assert not out.any()
    assert bool((logits == -torch.inf).all())
    assert all(bool((layer == 0.5).all()) for layer in mass)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e4])
def test_tiny_and_huge_entries(scale):
    one = call(MIXED, 64, torch.float32, seed=5)
    for keys, values in zip(one.keys, one.values, strict=True):
        keys.mul_(max(1.0, scale))
        values.mul_(scale)
        values[:1] = -0.0
    assert_right(one, SMALL)


def test_no_segments_give_no_output():
    one = call(MIXED, 64)
    none = attrs.evolve(one.found.segments, starts=one.found.segments.starts[:0], rows=0)
    kv = attrs.evolve(one.kv, segments=attrs.evolve(none, lengths=none.lengths[:0]))
    assert decode(one.queries[:0], kv, 1.0).shape == (0, 4, 64)


def refused(one, message, **changes):
    where = {"query_positions": one.query_positions, "slots": one.slots}
    options = {"kv": one.kv, "queries": one.queries, **where, **changes}
    out = torch.full((one.queries.shape[0], one.queries.shape[1], 64), 7.0, dtype=one.queries.dtype, device=DEVICE)
    given_out = options.pop("out", out)
    with pytest.raises(UnsupportedInputError, match=message):
        decode(options.pop("queries"), options.pop("kv"), 1.0, out=given_out, **options)
    assert bool((out == 7.0).all())


def test_what_the_kernel_cannot_do_is_refused():
    one = call(MIXED, 64, torch.float32, votes=True, positions=True, listed=5)
    kv, queries = one.kv, one.queries
    segments = kv.segments
    refused(one, "float64", queries=queries.double())
    refused(one, "contiguous", queries=queries.transpose(1, 2))
    refused(one, "segments", queries=queries[:3].contiguous())
    refused(one, "query heads", queries=queries.repeat(1, 20, 1))
    refused(one, "bfloat16", queries=queries.bfloat16(), out=None)
    refused(one, "keys of 64", queries=torch.cat([queries, queries], 2))
    refused(one, "position", query_positions=None)
    refused(one, "position", query_positions=one.query_positions.float())
    refused(one, "chosen slots", slots=one.slots.float())
    refused(one, "chosen slots", slots=one.slots[:2])
    refused(one, "chosen slots", slots=one.slots.T)
    refused(one, "logits", extra=ExtraOutputs(torch.empty(4, 4, 3, device=DEVICE)))
    refused(one, "mass", extra=ExtraOutputs(mass=kv.votes))
    refused(one, "shape or dtype", out=torch.empty(4, 4, 63, device=DEVICE))
    refused(one, "not contiguous", out=torch.empty(4, 64, 4, device=DEVICE).transpose(1, 2))
    refused(one, "positions", kv=attrs.evolve(kv, positions=kv.votes))
    refused(one, "log-votes", kv=attrs.evolve(kv, votes=kv.positions))
    refused(one, "entries a segment", kv=attrs.evolve(kv, segments=attrs.evolve(segments, longest=2**30)))
    wide = attrs.evolve(kv.values.column, width=300)
    refused(one, "head dim 300", kv=attrs.evolve(kv, values=KVTensorInput(wide, segments.starts)))
    packed = call(MIXED, 64, torch.float32, keys=channels(4, 64))
    other = attrs.evolve(packed.kv.keys.packed, unpacking=channels(2, 64))
    refused(packed, "another kind", kv=attrs.evolve(packed.kv, keys=attrs.evolve(packed.kv.keys, packed=other)))
