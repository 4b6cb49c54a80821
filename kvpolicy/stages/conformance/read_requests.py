"""Sample read requests for readers: a decode step over random entries, packed by a store that the reader supports."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.contracts import Codec, Reader, ReadRequest
from kvpolicy.stages.formats import AsIs, Format, Sample, Site
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.registry.plugins import registry
from kvpolicy.stages.rotary import Rotary
from kvpolicy.stages.slots import take

GEOMETRY = Geometry(managed=tuple(range(8)), query_heads=4, kv_heads=2, head_dim=64)
MIDDLE = 4  # a layer in the middle: readers may read the first and the last layers in full
JUNK = 997.0  # a number in empty slots
_ROTARY = Rotary(10000.0 ** -torch.linspace(0, 31 / 32, 32, dtype=torch.float32))
_EQUAL_LENGTHS = ((701, 701), (620, 620), (701, 701), (45, 45))
_RAGGED_LENGTHS = ((701, 701), (620, 45), (128, 701), (45, 701))


def requests(reader: Reader, junk: float = 0.0) -> Iterator[ReadRequest]:
    """Requests with rows and heads of different lengths, in two dtypes; then of the first and the last layer."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _request(reader, junk, dtype, MIDDLE)
    for layer in (0, GEOMETRY.layers - 1):
        yield _request(reader, junk, torch.float32, layer)


def _request(reader: Reader, junk: float, dtype: torch.dtype, layer: int) -> ReadRequest:
    key_format, site = _keys_format(reader, dtype, layer)
    keys, positions = entries(dtype, junk, _EQUAL_LENGTHS if key_format.joint else _RAGGED_LENGTHS)
    lengths = (positions >= 0).sum(-1)
    packed_lengths = torch.tensor([[key_format.packed_length(length) for length in row] for row in lengths.tolist()])
    longest, pages = int(packed_lengths.max()), reader.pages(site)
    return ReadRequest(
        queries=_normal(2, len(keys), GEOMETRY.query_heads, GEOMETRY.head_dim).to(dtype),
        query_positions=lengths.amax(-1) - 1,
        positions=positions,
        geometry=GEOMETRY,
        layer=layer,
        format=key_format,
        packed_lengths=packed_lengths if longest else None,
        packed=key_format.encode(keys[:, :, :longest], positions[:, :, :longest]) if longest else {},
        pages={} if pages is None else complete_groups(pages, keys, positions),
        newest_page={} if pages is None else newest_group(pages, keys, lengths),
    )


def _keys_format(reader: Reader, dtype: torch.dtype, layer: int) -> tuple[Format, Site]:
    """The key format of the first store that the reader supports, and its site."""
    site = Site(GEOMETRY, dtype, layer, _ROTARY)
    if not reader.stores:
        return AsIs(), site
    plugins = registry()
    codec = plugins.find(Codec.stage, reader.stores[0], plugins.owner(type(reader)))()
    if not isinstance(codec, Codec):
        raise contract_error(reader, f"reads the store {codec.name!r}, which is not a codec")
    if codec.calibrated:
        queries, keys, values = (_normal(seed, 1, heads, 160, 64) for seed, heads in ((3, 4), (4, 2), (5, 2)))
        sample = Sample(GEOMETRY, 64**-0.5, _ROTARY, queries, keys, values)
        site = attrs.evolve(site, calibration=codec.calibrate([sample])[0])
    return codec.formats(site).keys, site


def entries(
    dtype: torch.dtype, junk: float = 0.0, lengths: tuple[tuple[int, ...], ...] = _EQUAL_LENGTHS
) -> tuple[Tensor, Tensor]:
    """Keys [B, K, T, D] and positions [B, K, T]."""
    counts = torch.tensor(lengths)
    slots = int(counts.max())
    positions = torch.arange(slots).expand(*counts.shape, slots)
    positions = positions.where(positions < counts[..., None], -1)
    keys = _normal(1, *positions.shape, GEOMETRY.head_dim)
    return keys.masked_fill(positions[..., None] < 0, junk).to(dtype), positions


def complete_groups(page_format: Format, keys: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """The columns of all complete groups of the longest head."""
    length = keys.shape[2] // page_format.group_size * page_format.group_size
    return page_format.encode(keys[:, :, :length], positions[:, :, :length])


def newest_group(page_format: Format, keys: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """The columns of the group of each head's newest entry, which stands in all of its free places."""
    size, newest = page_format.group_size, lengths[..., None] - 1
    slots = (newest // size * size + torch.arange(size)).minimum(newest).clamp(min=0)
    return page_format.encode(take(keys, slots), slots)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def row_alone(request: ReadRequest, row: int) -> ReadRequest:
    """A request with one row, in tensors of its own length."""
    slots = int((request.positions[row] >= 0).sum(-1).max())
    groups = (
        0 if request.packed_lengths is None else int(request.packed_lengths[row].max()) // request.format.group_size
    )
    return attrs.evolve(
        request,
        queries=request.queries[[row]],
        query_positions=request.query_positions[[row]],
        positions=request.positions[[row]][..., :slots],
        packed_lengths=None if request.packed_lengths is None else request.packed_lengths[[row]],
        packed={name: column[[row], :, :groups] for name, column in request.packed.items()},
        pages={name: column[[row]] for name, column in request.pages.items()},
        newest_page={name: column[[row]] for name, column in request.newest_page.items()},
    )
