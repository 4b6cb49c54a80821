"""Strategies: formats of quantised stores, and vectors of every kind for them."""

import torch
from hypothesis import strategies as st

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.fp8 import Fp8
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.nova_vq import NovaVQ
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.tada import Tada
from kvpolicy_plugins.codecs.turboquant import TurboQuant
from tests.property.layers import generators
from tests.support.latents import rotary_of, sample_of

BITS = st.sampled_from((2, 4, 8))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUP = 8


def _outliers(random, *shape):
    return torch.randn(*shape, generator=random) * torch.ones(shape[-1]).index_fill_(0, torch.tensor([1]), 100.0)


CONTENTS = {
    "normal": lambda random, *shape: torch.randn(*shape, generator=random),
    "outlier channel": _outliers,
    "far from zero": lambda random, *shape: 50 + torch.randn(*shape, generator=random),
    "equal": lambda random, *shape: torch.full(shape, torch.randn((), generator=random).item()),
    "zero": lambda random, *shape: torch.zeros(shape),
    "one entry": lambda random, *shape: torch.zeros(shape).index_fill_(2, torch.tensor([0])[: shape[2]], 3.0),
}
EXTREME = {
    "tiny": lambda random, *shape: 1e-40 * torch.randn(*shape, generator=random),
    "beyond half": lambda random, *shape: 1e6 * torch.randn(*shape, generator=random),
    "largest": lambda random, *shape: torch.randn(*shape, generator=random).sign() * torch.finfo(torch.float32).max,
}
codecs = st.one_of(
    st.builds(
        Kivi, BITS, BITS, group=st.just(GROUP), residual=st.just(GROUP), scales=st.sampled_from(("half", "full"))
    ),
    st.builds(Tada, BITS, group=st.sampled_from((0, GROUP)), scales=st.sampled_from(("half", "full"))),
    st.builds(
        Rotation,
        st.integers(1, 4),
        st.integers(0, 3),
        st.booleans(),
        st.sampled_from(("none", "calibrated")),
        st.integers(0, 9),
        scales=st.sampled_from(("half", "full")),
    ),
    st.builds(
        TurboQuant, st.sampled_from((1, 2, 3, 4, 8)), st.integers(2, 4), scales=st.sampled_from(("half", "full"))
    ),
    st.just(Fp8()),
)

fitted = st.builds(
    NovaVQ,
    st.integers(1, 2),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(("float8", "full")),
    st.sampled_from((0, 1, 4)),
    st.sampled_from((2, 3, 4, 8)),
    scales=st.sampled_from(("half", "full")),
)


@st.composite
def kv_formats(draw, kinds=codecs, contents=tuple(CONTENTS), dtypes=FLOATS, least=0):
    """A format of keys or values, and vectors [B, K, n, D] with their positions: B 1-3, K 1-4, D 8-64."""
    batch, heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from((8, 16, 64)))
    dtype = draw(st.sampled_from(dtypes))
    codec, geometry = draw(kinds), Geometry((0,), heads, heads, dim)
    sample = sample_of(draw(generators), geometry, rotary_of(dim), 1, 20)
    formats = codec.formats(Site(geometry, dtype, rotary=rotary_of(dim), calibration=codec.calibrate([sample])[0]))
    kv_format = draw(st.sampled_from((formats.keys, formats.values)))
    shape = batch, heads, kv_format.group_size * draw(st.integers(least, 5)), dim
    vectors = ({**CONTENTS, **EXTREME}[draw(st.sampled_from(contents))])(draw(generators), *shape)
    largest = torch.finfo(dtype).max
    return kv_format, vectors.double().clamp(-largest, largest).to(dtype), torch.arange(shape[2]).expand(shape[:3])


def through(kv_format, vectors, at):
    return kv_format.decode(kv_format.encode(vectors, at), at)


def affine(scales):
    kivi = st.builds(Kivi, BITS, BITS, group=st.just(GROUP), residual=st.just(GROUP), scales=st.just(scales))
    return st.one_of(kivi, st.builds(Tada, BITS, group=st.sampled_from((0, GROUP)), scales=st.just(scales)))
