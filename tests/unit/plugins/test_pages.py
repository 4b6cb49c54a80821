"""The reader `pages` on requests that can be answered by hand."""

import attrs
import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, ReadRequest, Site
from kvpolicy.stages.conformance import conformance_cases
from kvpolicy_plugins.readers.pages import Pages

VARIANTS = (Pages(), Pages(16, 40, "mean", 0), Pages(7, 7), Pages(1, 33, "sum"), Pages(16, 700), Pages(300, 301))


def read_request(reader, numbers, queries=((1.0, 0.0),), lengths=None, layer=2):
    """One row; keys [K, T] of two dimensions, `numbers` and their negatives in the second; one query head or more."""
    keys = torch.tensor(numbers)[None, ..., None] * torch.tensor([1.0, -1.0])
    heads, slots = keys.shape[1:3]
    positions = torch.arange(slots).expand(1, heads, slots)
    if lengths is not None:
        positions = positions.where(positions < torch.tensor(lengths)[:, None], -1)
    geometry = Geometry(tuple(range(4)), len(queries), heads, 2)
    full = slots // reader.page * reader.page
    pages = reader.pages(Site(geometry, torch.float32)).encode(keys[:, :, :full], positions[:, :, :full])
    query_tensor = torch.tensor(queries)[None]
    return ReadRequest(query_tensor, positions.amax((1, 2)), positions, geometry, layer, pages=pages)


NUMBERS = [3.0, -9.0, 0.0, 0.0, 5.0, 5.0, -8.0, 4.0, 1.0, 1.0, 0.0]  # pages of 2; the last one is being filled


def test_the_pages_with_the_highest_bounds_are_read_and_the_newest():
    reader = Pages(2, 5)
    request = read_request(reader, [NUMBERS])
    assert reader.bounds(request).tolist() == [[[3.0, 0.0, 5.0, 4.0, 1.0]]]
    assert reader.choose(request).tolist() == [[[4, 5, 6, 7, 10]]]
    away = read_request(reader, [NUMBERS], queries=((-1.0, 0.0),))
    assert reader.bounds(away).tolist() == [[[9.0, 0.0, -5.0, 8.0, -1.0]]]
    assert reader.choose(away).tolist() == [[[0, 1, 6, 7, 10]]]


def test_the_newest_page_is_read_even_if_it_has_just_been_filled():
    reader = Pages(2, 4)
    request = read_request(reader, [NUMBERS[:10]])
    assert reader.choose(request).tolist() == [[[4, 5, 8, 9]]]
    assert Pages(2, 2).choose(request).tolist() == [[[8, 9]]]


def test_of_equal_pages_the_earlier_are_read():
    reader = Pages(2, 6)
    assert reader.choose(read_request(reader, [[1.0] * 12])).tolist() == [[[0, 1, 2, 3, 10, 11]]]


def test_a_bound_adds_up_the_best_of_each_channel():
    """A page of (3, -3) and (-9, 9) is bounded by a corner that no key is at."""
    reader = Pages(2, 5)
    both = read_request(reader, [NUMBERS], queries=((1.0, 2.0),))
    assert reader.bounds(both)[0, 0, 0] == 3 + 2 * 9


@pytest.mark.parametrize(
    ("group", "bounds"),
    [("max", [9.0, 0.0, 5.0, 8.0, 1.0]), ("mean", [6.0, 0.0, 0.0, 6.0, 0.0]), ("sum", [12.0, 0.0, 0.0, 12.0, 0.0])],
)
def test_query_heads_share_the_pages_of_their_kv_head(group, bounds):
    reader = Pages(2, 5, group)
    request = read_request(reader, [NUMBERS], queries=((1.0, 0.0), (-1.0, 0.0)))
    assert reader.bounds(request).tolist() == [[bounds]]


def test_bounds_of_half_precision_are_computed_in_float32():
    reader = Pages(2, 5)
    exact = read_request(reader, [NUMBERS], queries=((1.0078125, 0.0),))
    pages = {name: column.bfloat16() for name, column in exact.pages.items()}
    narrow = attrs.evolve(exact, queries=exact.queries.bfloat16(), pages=pages)
    assert reader.bounds(narrow).dtype == torch.float32
    assert torch.equal(reader.bounds(narrow), reader.bounds(exact))


def test_heads_choose_for_themselves_as_long_as_they_are():
    reader = Pages(2, 5)
    request = read_request(
        reader, [NUMBERS, NUMBERS, NUMBERS], queries=((1.0, 0.0), (-1.0, 0.0), (1.0, 0.0)), lengths=(11, 8, 3)
    )
    assert reader.choose(request).tolist() == [[[4, 5, 6, 7, 10], [0, 1, 6, 7, -1], [0, 1, 2, -1, -1]]]
    empty = read_request(reader, [NUMBERS, NUMBERS], queries=((1.0, 0.0),) * 2, lengths=(11, 0))
    assert reader.choose(empty)[0, 1].tolist() == [-1] * 5


def test_what_fits_is_read_and_so_are_the_first_layers():
    request = read_request(Pages(2, 5), [NUMBERS])
    assert Pages(2, 11).choose(request) is None
    assert Pages(2, 10).choose(request) is not None
    assert [Pages(2, 5).choose(attrs.evolve(request, layer=layer)) is None for layer in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert Pages(2, 5, dense_first=0).choose(attrs.evolve(request, layer=0)) is not None


def test_pages_keep_the_extremes_exactly_in_the_dtype_of_the_keys():
    form = Pages(3, 3).pages(Site(Geometry((0,), 2, 2, 4), torch.bfloat16))
    assert (form.group_size, form.step, form.residual_length, form.packed_length(11)) == (3, 3, 0, 9)
    keys = torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    columns = form.encode(keys, torch.arange(9).expand(2, 2, 9))
    for name, found in columns.items():
        assert (found.dtype, found.shape) == (form.columns[name].dtype, (2, 2, 3, *form.columns[name].shape))
    assert torch.equal(columns["minimum"][:, :, 1], keys[:, :, 3:6].amin(2))
    assert torch.equal(columns["maximum"][:, :, 2], keys[:, :, 6:].amax(2))
    with pytest.raises(NotImplementedError, match="cannot be decoded from its bounds"):
        form.decode(columns, torch.arange(9).expand(2, 2, 9))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"page": 0}, "page: must be an integer from 1 to 1000000000: 0"),
        ({"page": 16, "budget": 15}, "budget: must be at least one page of 16 entries: 15"),
        ({"group": "median"}, "group: must be one of mean, max, sum"),
        ({"dense_first": -1}, "dense_first: must be an integer from 0 to 1000000000: -1"),
    ],
)
def test_parameters_keep_their_rules(parameters, message):
    with pytest.raises(ParameterError, match=message):
        Pages(**parameters)


@pytest.mark.parametrize("check", [case for one in VARIANTS for _, case in conformance_cases(one)])
def test_contract(check):
    check()
