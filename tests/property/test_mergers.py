"""Kept entries are moved bit for bit (P6), and the plain store leaves them as they are."""

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.stages import Geometry, Site
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.codecs.plain import Plain
from kvpolicy_plugins.mergers.drop import Drop
from tests.property.layers import generators, layers


@given(layers(), generators, st.sampled_from((torch.float32, torch.bfloat16)), st.booleans())
def test_drop_gathers_exactly(view, random, dtype, votes):
    log_votes = torch.rand(view.positions.shape, generator=random) if votes else None
    view = attrs.evolve(view, keys=view.keys.to(dtype), values=view.values.to(dtype), log_votes=log_votes)
    kept = indices_of(view.valid & (torch.rand(view.positions.shape, generator=random) < 0.5))
    entries = Drop().merge(view, kept)
    for name in ("keys", "values", "log_votes") if votes else ("keys", "values"):
        moved, source = getattr(entries, name), getattr(view, name)
        assert moved.dtype == source.dtype
        for row, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).reshape(-1, 2).tolist():
            held = kept[row, head] >= 0
            assert torch.equal(moved[row, head][held], source[row, head][kept[row, head][held]])
            assert not moved[row, head][~held].any()
    assert votes or entries.log_votes is None


@given(st.integers(0, 10_000))
def test_plain_packs_nothing(length):
    formats = Plain().formats(Site(Geometry((0,), 4, 2, 16), torch.float32))
    for half in (formats.keys, formats.values):
        assert half.packed_length(length) == 0
        assert half.residual_capacity(length) == length
