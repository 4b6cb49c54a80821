"""Decode attention over entries that are hidden, extreme or not there, and what is refused."""

import attrs
import pytest
import torch

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.attention.decode import decode
from kvpolicy_kernels.attention.kv_input import Export, Half
from tests.kernels.attention.decoding import MIXED, SMALL, assert_right, call, channels, run
from tests.kernels.scenes import DEVICE, LOUD


@LOUD
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("division", [None, SMALL])
def test_what_is_not_a_number_stays_in_its_head(where, bad, division):
    one = call(MIXED, 64, torch.float32, seed=3)
    clean, _, _ = run(one, division)
    getattr(one, where)[3][40, 5] = bad
    out, _, _ = run(one, division)
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
        hidden = positions > one.seen[row]
        one.keys[place][hidden] = torch.nan
        one.values[place][hidden] = torch.inf
    assert torch.equal(run(one, SMALL)[0], clean)
    assert any(bool((one.found.lists("positions")[0] > seen).any()) for seen in one.seen)


@pytest.mark.parametrize("division", [None, SMALL])
def test_a_query_that_sees_nothing_gives_zeros(division):
    one = call(MIXED, 64, torch.bfloat16, positions=True)
    out, logits, mass = run(attrs.evolve(one, seen=torch.full_like(one.seen, -1)), division, logits=True, mass=True)
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
    held = attrs.evolve(one.held, segments=attrs.evolve(none, lengths=none.lengths[:0]))
    assert decode(one.queries[:0], held, 1.0).shape == (0, 4, 64)


def refused(one, message, **changes):
    options = {"held": one.held, "queries": one.queries, "seen": one.seen, "slots": one.slots, **changes}
    out = torch.full((one.queries.shape[0], one.queries.shape[1], 64), 7.0, dtype=one.queries.dtype, device=DEVICE)
    given_out = options.pop("out", out)
    with pytest.raises(UnsupportedInputError, match=message):
        decode(options.pop("queries"), options.pop("held"), 1.0, out=given_out, **options)
    assert bool((out == 7.0).all())


def test_what_the_kernel_cannot_do_is_refused():
    one = call(MIXED, 64, torch.float32, votes=True, positions=True, listed=5)
    held, queries = one.held, one.queries
    segments = held.segments
    refused(one, "float64", queries=queries.double())
    refused(one, "contiguous", queries=queries.transpose(1, 2))
    refused(one, "segments", queries=queries[:3].contiguous())
    refused(one, "query heads", queries=queries.repeat(1, 20, 1))
    refused(one, "bfloat16", queries=queries.bfloat16(), out=None)
    refused(one, "keys of 64", queries=torch.cat([queries, queries], 2))
    refused(one, "position", seen=None)
    refused(one, "position", seen=one.seen.float())
    refused(one, "chosen slots", slots=one.slots.float())
    refused(one, "chosen slots", slots=one.slots[:2])
    refused(one, "chosen slots", slots=one.slots.T)
    refused(one, "logits", export=Export(torch.empty(4, 4, 3, device=DEVICE)))
    refused(one, "mass", export=Export(mass=held.votes))
    refused(one, "shape or dtype", out=torch.empty(4, 4, 63, device=DEVICE))
    refused(one, "not contiguous", out=torch.empty(4, 64, 4, device=DEVICE).transpose(1, 2))
    refused(one, "positions", held=attrs.evolve(held, positions=held.votes))
    refused(one, "log-votes", held=attrs.evolve(held, votes=held.positions))
    refused(one, "entries a segment", held=attrs.evolve(held, segments=attrs.evolve(segments, longest=2**30)))
    wide = attrs.evolve(held.values.column, width=300)
    refused(one, "head dim 300", held=attrs.evolve(held, values=Half(wide, segments.starts)))
    packed = call(MIXED, 64, torch.float32, keys=channels(4, 64))
    other = attrs.evolve(packed.held.keys.packed, unpacking=channels(2, 64))
    refused(packed, "another kind", held=attrs.evolve(packed.held, keys=attrs.evolve(packed.held.keys, packed=other)))
