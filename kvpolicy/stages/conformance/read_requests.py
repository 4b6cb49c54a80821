"""Questions that readers are tried on: a decode step over random entries, held as a store of theirs holds them."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checks import contract_error
from kvpolicy.stages.contracts import Codec, Reader, ReadRequest
from kvpolicy.stages.formats import AsIs, Format, Sample, Site
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.registry.plugins import registry
from kvpolicy.stages.rotary import Rotary

GEOMETRY = Geometry(managed=tuple(range(8)), query_heads=4, kv_heads=2, head_dim=64)
MIDDLE = 4  # the first and the last layers may be read in full
JUNK = 997.0  # what an empty slot may hold
_ROTARY = Rotary(10000.0 ** -torch.linspace(0, 31 / 32, 32, dtype=torch.float32))
_ALIKE = ((701, 701), (620, 620), (701, 701), (45, 45))
_RAGGED = ((701, 701), (620, 45), (128, 701), (45, 701))


def requests(reader: Reader, junk: float = 0.0) -> Iterator[ReadRequest]:
    """Rows and heads of different lengths, in two dtypes; then the first and the last layer."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _request(reader, junk, dtype, MIDDLE)
    for layer in (0, GEOMETRY.layers - 1):
        yield _request(reader, junk, torch.float32, layer)


def _request(reader: Reader, junk: float, dtype: torch.dtype, layer: int) -> ReadRequest:
    form, site = _keys_format(reader, dtype, layer)
    keys, positions = entries(dtype, junk, _ALIKE if form.joint else _RAGGED)
    lengths = (positions >= 0).sum(-1)
    packed_lengths = torch.tensor([[form.packed_length(length) for length in row] for row in lengths.tolist()])
    most, pages = int(packed_lengths.max()), reader.pages(site)
    return ReadRequest(
        queries=_normal(2, len(keys), GEOMETRY.query_heads, GEOMETRY.head_dim).to(dtype),
        query_positions=lengths.amax(-1) - 1,
        positions=positions,
        geometry=GEOMETRY,
        layer=layer,
        format=form,
        packed_lengths=packed_lengths if most else None,
        packed=form.encode(keys[:, :, :most], positions[:, :, :most]) if most else {},
        pages={} if pages is None else whole_units(pages, keys, positions),
    )


def _keys_format(reader: Reader, dtype: torch.dtype, layer: int) -> tuple[Format, Site]:
    """How keys are held by the first store that the reader can read."""
    site = Site(GEOMETRY, dtype, layer, _ROTARY)
    if not reader.stores:
        return AsIs(), site
    known = registry()
    codec = known.find(Codec.stage, reader.stores[0], known.owner(type(reader)))()
    if not isinstance(codec, Codec):
        raise contract_error(reader, f"reads the store {codec.name!r}, which is no codec")
    if codec.calibrated:
        queries, keys, values = (_normal(seed, 1, heads, 160, 64) for seed, heads in ((3, 4), (4, 2), (5, 2)))
        sample = Sample(GEOMETRY, 64**-0.5, _ROTARY, queries, keys, values)
        site = attrs.evolve(site, calibration=codec.calibrate([sample])[0])
    return codec.formats(site).keys, site


def entries(
    dtype: torch.dtype, junk: float = 0.0, lengths: tuple[tuple[int, ...], ...] = _ALIKE
) -> tuple[Tensor, Tensor]:
    """Keys [B, K, T, D] and positions [B, K, T]."""
    held = torch.tensor(lengths)
    slots = int(held.max())
    positions = torch.arange(slots).expand(*held.shape, slots)
    positions = positions.where(positions < held[..., None], -1)
    keys = _normal(1, *positions.shape, GEOMETRY.head_dim)
    return keys.masked_fill(positions[..., None] < 0, junk).to(dtype), positions


def whole_units(form: Format, keys: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """The columns of all units that are full in the longest head."""
    count = keys.shape[2] // form.group_size * form.group_size
    return form.encode(keys[:, :, :count], positions[:, :, :count])


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def row_alone(request: ReadRequest, row: int) -> ReadRequest:
    """One row of a request, in tensors of its own length."""
    slots = int((request.positions[row] >= 0).sum(-1).max())
    packed = (
        0 if request.packed_lengths is None else int(request.packed_lengths[row].max()) // request.format.group_size
    )
    return attrs.evolve(
        request,
        queries=request.queries[[row]],
        query_positions=request.query_positions[[row]],
        positions=request.positions[[row]][..., :slots],
        packed_lengths=None if request.packed_lengths is None else request.packed_lengths[[row]],
        packed={name: column[[row], :, :packed] for name, column in request.packed.items()},
        pages={name: column[[row]] for name, column in request.pages.items()},
    )
