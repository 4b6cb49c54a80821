"""Layers with a latent store: rotations, calibration samples and requests, made by hand or drawn."""

import attrs
import torch
from hypothesis import strategies as st

from kvpolicy.stages import Geometry, ReadRequest, Rotary, Sample, Site
from kvpolicy_plugins.codecs.latent import Latent
from tests.property.layers import generators


def rotary_of(dim, *, scaling=1.0, share=1.0, dtype=torch.float64):
    """The rotation of the first `share` of `dim` dimensions."""
    width = int(dim * share) // 2 * 2
    return Rotary(100.0 ** -(torch.arange(0, width, 2, dtype=dtype) / width), scaling)


def sample_of(random, geometry, rotary, sequences=2, tokens=40):
    """Float64 keys that favour some directions; queries and values are as random as they come."""
    kv_heads, dim = geometry.kv_heads, geometry.head_dim
    width = kv_heads * dim
    mixing = torch.randn(width, width, generator=random, dtype=torch.float64)
    mixing *= 0.8 ** torch.arange(width)[:, None]
    plain = torch.randn(sequences, tokens, width, generator=random, dtype=torch.float64) @ mixing
    keys = rotary.rotate(plain.unflatten(2, (kv_heads, dim)).transpose(1, 2), torch.arange(tokens))
    queries = torch.randn(sequences, geometry.query_heads, tokens, dim, generator=random, dtype=torch.float64)
    return Sample(geometry, dim**-0.5, rotary, queries, keys, torch.randn(keys.shape, generator=random))


@st.composite
def samples(draw):
    """Calibration samples of K 1-3, G 1-3, D 4, 8 or 12, rotated in full or in part, with and without scaling."""
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((4, 8, 12)))
    geometry = Geometry(tuple(range(8)), kv_heads * group, kv_heads, dim)
    rotary = rotary_of(dim, scaling=draw(st.sampled_from((1.0, 1.25))), share=draw(st.sampled_from((1.0, 0.5))))
    return sample_of(draw(generators), geometry, rotary, draw(st.integers(1, 3)), draw(st.integers(1, 40)))


def formats_of(sample, rank=0.5, *, dtype=torch.float64, layer=0, **parameters):
    """How a layer calibrated on `sample` holds its entries."""
    codec = Latent(rank, value_group=4, scales="full", **{"batch": 1, **parameters})
    (calibration,) = codec.calibrate([sample])
    return codec.formats(Site(sample.geometry, dtype, layer, sample.rotary, calibration))


def read_request(sample, form, lengths=None, layer=4, seed=0):
    """What a reader is asked after the sample's tokens: the sequences are rows of `lengths` entries."""
    slots = sample.keys.shape[2]
    lengths = torch.full((len(sample.keys),), slots) if lengths is None else lengths
    positions = torch.arange(slots).expand(sample.keys.shape[:3])
    positions = positions.where(positions < lengths[:, None, None], -1)
    packed_lengths = torch.tensor([[form.packed_length(length)] for length in lengths.tolist()])
    count = int(packed_lengths.max())
    random = torch.Generator().manual_seed(seed)
    shape = len(lengths), sample.geometry.query_heads, sample.geometry.head_dim
    return ReadRequest(
        queries=torch.randn(shape, generator=random).to(sample.keys.dtype),
        query_positions=lengths - 1,
        positions=positions,
        geometry=sample.geometry,
        layer=layer,
        format=form,
        packed_lengths=packed_lengths.expand(positions.shape[:2]),
        packed=form.encode(sample.keys[:, :, :count], positions[:, :, :count]),
    )


def only_rows(question, rows):
    """The rows named, in that order."""
    part = ("queries", "query_positions", "positions", "packed_lengths")
    packed = {name: column[rows] for name, column in question.packed.items()}
    return attrs.evolve(question, packed=packed, **{name: getattr(question, name)[rows] for name in part})
