"""The reader `latent_topk` on requests that can be answered by hand."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages import AsIs, Geometry, ReadRequest, Rotary
from kvpolicy.stages.conformance import conformance_cases
from kvpolicy_plugins.codecs.shared.calibrated.latent_keys import LatentKeys
from kvpolicy_plugins.readers.latent_topk import LatentTopK

GEOMETRY = Geometry(tuple(range(6)), 4, 2, 2)
VARIANTS = (
    LatentTopK(),
    LatentTopK(2, 30, 5, dense_first=0, dense_last=0, min_length=100),
    LatentTopK(0, 1, 0, 1.0, 0, 0),
    LatentTopK(100, 600, 90),
)


def read_request(latents, lengths, packed_lengths, *, query=(1.0, 0.0, 0.0, 0.0), layer=3):
    """Rows of `lengths` entries; the basis is the identity and every query head of KV head h asks `query`'s part h."""
    latents = torch.as_tensor(latents)[:, None]
    slots = max(lengths)
    positions = torch.arange(slots).expand(len(lengths), 2, slots)
    positions = positions.where(positions < torch.tensor(lengths)[:, None, None], -1)
    heads = torch.tensor(query).reshape(2, 1, 2).expand(2, 2, 2).reshape(4, 2)
    return ReadRequest(
        queries=heads.expand(len(lengths), 4, 2),
        query_positions=torch.zeros(len(lengths), dtype=torch.int64),
        positions=positions,
        geometry=GEOMETRY,
        layer=layer,
        format=LatentKeys(Rotary(torch.tensor([1.0])), torch.eye(4), 2, torch.float32),
        packed_lengths=torch.tensor(packed_lengths)[:, None].expand(-1, 2),
        packed={"latent": latents},
    )


def along(numbers, dimension=0):
    """Latents [T, 4] with these numbers in one dimension, and a decoy in the last."""
    latents = torch.zeros(len(numbers), 4)
    latents[:, dimension] = torch.tensor(numbers)
    latents[:, 3] = torch.linspace(9, 0, len(numbers))
    return latents


NUMBERS = [0.0, 1.0, 7.0, 5.0, 7.0, 2.0, 7.0, 0.0, 9.0, 0.0]


def test_the_best_between_the_first_and_the_last_are_read_the_earlier_of_equals():
    request = read_request(along(NUMBERS)[None], [10], [10])
    found = LatentTopK(sinks=1, critical=2, recent=2).choose(request)
    assert found.tolist() == [[[0, 2, 4, 8, 9]] * 2]
    assert found.dtype == torch.int64


def test_entries_without_a_latent_are_read():
    request = read_request(along(NUMBERS)[None], [10], [6])
    assert LatentTopK(1, 2, 2).choose(request).tolist() == [[[0, 2, 4, 6, 7, 8, 9]] * 2]
    nothing_packed = attrs.evolve(request, packed_lengths=None, packed={})
    assert LatentTopK(1, 2, 2).choose(nothing_packed) is None


def test_rows_of_different_lengths():
    request = read_request(torch.stack([along(NUMBERS)] * 3), [10, 7, 3], [10, 7, 3])
    found = LatentTopK(1, 2, 2).choose(request)[:, 0]
    assert found.tolist() == [[0, 2, 4, 8, 9], [0, 2, 4, 5, 6], [0, 1, 2, -1, -1]]
    found = LatentTopK(1, 2, 2, min_length=8).choose(request)[:, 0]
    assert found.tolist() == [[0, 2, 4, 8, 9, -1, -1], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, -1, -1, -1, -1]]


def test_only_the_leading_dimensions_are_looked_at():
    """The last dimension holds a decoy, which a query along it sees with `dims` 1 only."""
    request = read_request(along(NUMBERS)[None], [10], [10], query=(1.0, 0.0, 0.0, 5.0))
    assert LatentTopK(1, 2, 2, dims=0.5).choose(request)[0, 0].tolist() == [0, 2, 4, 8, 9]
    assert LatentTopK(1, 2, 2, dims=1.0).choose(request)[0, 0].tolist() == [0, 1, 2, 8, 9]
    assert LatentTopK(dims=0.01).scores(request).tolist() == [NUMBERS]


def test_query_heads_are_averaged_and_their_rotation_is_undone():
    request = read_request(along(NUMBERS)[None], [10], [10])
    plain = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    turned = request.format.rotary.rotate(plain, torch.tensor([[123]]))
    request = attrs.evolve(request, queries=turned, query_positions=torch.tensor([123]))
    expected = torch.cat([plain[:, :2].mean(1), plain[:, 2:].mean(1)], -1)
    assert_close(LatentTopK().latent_query(request), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "dense"), [(0, True), (1, True), (2, False), (4, False), (5, True)])
def test_the_first_two_layers_and_the_last_read_everything(layer, dense):
    request = read_request(along(NUMBERS)[None], [10], [10], layer=layer)
    assert (LatentTopK(1, 2, 2).choose(request) is None) == dense
    assert LatentTopK(1, 2, 2, dense_first=0, dense_last=0).choose(request) is not None


def test_what_would_be_read_anyway_is_not_searched():
    request = read_request(along(NUMBERS)[None], [10], [10])
    assert LatentTopK(3, 4, 3).choose(request) is None
    assert LatentTopK(3, 4, 2).choose(request) is not None
    assert LatentTopK(1, 2, 2, min_length=11).choose(request) is None
    assert LatentTopK(1, 2, 2, min_length=10).choose(request) is not None


def test_keys_of_another_store_are_refused():
    request = attrs.evolve(read_request(along(NUMBERS)[None], [10], [10]), format=AsIs())
    with pytest.raises(TypeError, match="keys must be stored as latents: AsIs"):
        LatentTopK(1, 2, 2).choose(request)


@pytest.mark.parametrize("name", ["sinks", "critical", "recent", "dims", "dense_first", "dense_last", "min_length"])
def test_parameters_keep_their_rules(name):
    with pytest.raises(ParameterError, match=f"{name}: must be"):
        LatentTopK(**{name: -1})


@pytest.mark.parametrize("check", [case for one in VARIANTS for _, case in conformance_cases(one)])
def test_contract(check):
    check()
