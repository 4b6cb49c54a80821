"""Codecs: what comes out is what went in, up to the error that is admitted, and every unit stands for itself."""

import contextlib
from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import expect_close
from kvpolicy.stages.contracts import Codec
from kvpolicy.stages.declared import formats_of
from kvpolicy.stages.formats import Format, Sample, Site
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.rotary import Rotary
from kvpolicy.stages.untouched import untouched

LAYERS, BATCH, HEADS, GROUP, UNITS = 3, 3, 2, 2, 3
USUAL_DIMS = (64, 128, 256)
UNUSUAL_DIMS = (1, 16, 48, 59)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_LENGTH = 64  # tokens of a text to calibrate on
_LONGEST = 700  # lengths that are tried one by one
_JUNK = 997.0
_Columns = Mapping[str, Tensor]


def holds_a_usual_model(codec: Codec, _promises: Promises) -> None:
    for dtype in DTYPES:
        formats = formats_of(codec, _site(codec, dtype))
        if (formats.keys.joint or formats.values.joint) and not codec.joint:
            raise contract_error(codec, "gave a joint format, expected `joint` to say so")


def refuses_a_model_in_words(codec: Codec, _promises: Promises) -> None:
    """A geometry, or a model whose rotation is not known, is held or refused with a ParameterError."""
    for dim in (*USUAL_DIMS, *UNUSUAL_DIMS):
        for heads in (1, 2, 3):
            for rotary in (None, _rotary(dim)):
                with contextlib.suppress(ParameterError):
                    codec.formats(Site(_geometry(heads, dim), torch.float32, rotary=rotary))


def packs_whole_steps(codec: Codec, _promises: Promises) -> None:
    """More entries never mean fewer packed ones; what is packed is whole units."""
    formats = codec.formats(_site(codec, torch.float32))
    for half in (formats.keys, formats.values):
        counts = [half.packed_length(length) for length in range(_LONGEST)]
        wrong = [
            f"packed {count} of {length} entries after {before}"
            for length, (before, count) in enumerate(zip([0, *counts], counts, strict=False))
            if count < before or count > length or count % half.group_size
        ]
        if wrong:
            raise contract_error(codec, f"{wrong[0]}, expected ever more whole groups of {half.group_size}")


def encodes_to_its_columns(codec: Codec, _promises: Promises) -> None:
    for half, vectors, positions in _samples(codec):
        for units in (UNITS, 0):
            part = slice(None, units * half.group_size)
            encoded = half.encode(vectors[:, :, part], positions[:, :, part])
            if encoded.keys() != half.columns.keys():
                raise contract_error(codec, f"encoded to {sorted(encoded)}, expected {sorted(half.columns)}")
            for name, column in half.columns.items():
                sizes = {"batch": BATCH, "kv_heads": 1 if half.joint else HEADS, "units": units}
                inner = {f"{name}[{place}]": size for place, size in enumerate(column.shape)}
                check_tensor(codec, encoded[name], {**sizes, **inner}, column.dtype, vectors.device)


def decodes_what_it_encoded(codec: Codec, promises: Promises) -> None:
    for half, vectors, positions in _samples(codec):
        for units in (UNITS, 0):
            part = slice(None, units * half.group_size)
            source, at = vectors[:, :, part], positions[:, :, part]
            _expect_within(codec, half.decode(half.encode(source, at), at), source, promises.error)


def decodes_to_finite_numbers(codec: Codec, _promises: Promises) -> None:
    for half, vectors, positions in _samples(codec):
        for name, one in {
            "zeros": torch.zeros_like(vectors),
            "equal numbers": torch.ones_like(vectors),
            "tiny numbers": vectors * torch.finfo(vectors.dtype).tiny,
            "large numbers": vectors * 1e4,
        }.items():
            if not half.decode(half.encode(one, positions), positions).isfinite().all():
                raise contract_error(codec, f"decoded to numbers that are not finite for {name}")


def packs_units_apart(codec: Codec, _promises: Promises) -> None:
    """What is packed never has to be packed again: a unit is the same whatever is packed with it."""
    for half, vectors, positions in _samples(codec):
        together = half.encode(vectors, positions)
        decoded = half.decode(together, positions)
        for unit in range(UNITS):
            part = slice(unit * half.group_size, (unit + 1) * half.group_size)
            columns = {name: column[:, :, unit : unit + 1] for name, column in together.items()}
            alone = half.encode(vectors[:, :, part].clone(), positions[:, :, part])
            _expect_same(codec, alone, columns, f"for unit {unit} alone")
            found = half.decode(columns, positions[:, :, part])
            expect_close(codec, found, decoded[:, :, part], f"when unit {unit} is decoded alone")


def keeps_rows_apart(codec: Codec, _promises: Promises) -> None:
    for half, vectors, positions in _samples(codec):
        together = half.encode(vectors, positions)
        for row in range(BATCH):
            alone = half.encode(vectors[[row]], positions[[row]])
            _expect_same(codec, alone, {name: one[[row]] for name, one in together.items()}, f"for row {row} alone")


def keeps_heads_apart(codec: Codec, _promises: Promises) -> None:
    for half, vectors, positions in _samples(codec):
        if half.joint:
            continue
        together = half.encode(vectors, positions)
        for head in range(HEADS):
            other = vectors.clone()
            other[:, [one for one in range(HEADS) if one != head]] = _JUNK
            found = {name: one[:, head] for name, one in half.encode(other, positions).items()}
            expected = {name: one[:, head] for name, one in together.items()}
            _expect_same(codec, found, expected, f"for head {head} beside another one")


def ignores_empty_slots(codec: Codec, _promises: Promises) -> None:
    """A row that holds fewer units is encoded and decoded along with the others."""
    for half, vectors, positions in _samples(codec):
        empty = torch.zeros_like(positions, dtype=torch.bool)
        empty[1, :, half.group_size :] = True
        held = positions.masked_fill(empty, -1)
        expected = half.decode(half.encode(vectors, held), held)
        found = half.decode(half.encode(vectors.masked_fill(empty[..., None], _JUNK), held), held)
        if not found.isfinite().all():
            raise contract_error(codec, "decoded to numbers that are not finite for empty slots")
        expect_close(codec, found[~empty], expected[~empty], "with other empty slots")


def leaves_its_input_alone(codec: Codec, _promises: Promises) -> None:
    for half, vectors, positions in _samples(codec):
        inputs = {"vectors": vectors, "positions": positions}
        with untouched(codec, inputs):
            columns = half.encode(vectors, positions)
        with untouched(codec, {**inputs, **columns}):
            half.decode(columns, positions)
    site = _site(codec, torch.float32)
    with untouched(codec, site.calibration):
        codec.formats(site)
    sample = _sample(0, site.geometry.head_dim)
    with untouched(codec, {name: getattr(sample, name) for name in ("queries", "keys", "values")}):
        codec.calibrate([sample])


def is_deterministic(codec: Codec, _promises: Promises) -> None:
    samples = [_sample(layer, _site(codec, torch.float32).geometry.head_dim) for layer in range(LAYERS)]
    first, again = codec.calibrate(samples), codec.calibrate(samples)
    if len(first) != LAYERS:
        raise contract_error(codec, f"calibrated {len(first)} layers, expected {LAYERS}")
    for found, expected in zip(again, first, strict=True):
        _expect_same(codec, found, expected, "when it calibrates a second time")
    for (half, vectors, positions), (other, *_) in zip(_samples(codec), _samples(codec), strict=True):
        expected = half.encode(vectors, positions)
        _expect_same(codec, other.encode(vectors, positions), expected, "the second time")


def checks_its_calibration(codec: Codec, _promises: Promises) -> None:
    """What it has measured is as it should be; the same with NaN in it is not."""
    if not codec.calibrated:
        return
    site = _site(codec, torch.float32)
    codec.check_calibration(site)
    for name, tensor in site.calibration.items():
        if tensor.is_floating_point():
            other = attrs.evolve(site, calibration={**site.calibration, name: torch.full_like(tensor, torch.nan)})
            with contextlib.suppress(ParameterError):
                codec.check_calibration(other)
                raise contract_error(codec, f"found nothing wrong with a calibration whose {name!r} is NaN")


def _site(codec: Codec, dtype: torch.dtype) -> Site:
    """With the smallest usual head dimension that the codec can hold, and calibrated if it asks for that."""
    refusals = []
    for dim in USUAL_DIMS:
        try:
            calibration = (
                codec.calibrate([_sample(layer, dim) for layer in range(LAYERS)])[1] if codec.calibrated else {}
            )
            site = Site(_geometry(HEADS, dim), dtype, 1, _rotary(dim), calibration)
            codec.formats(site)
        except ParameterError as error:
            refusals.append(str(error))
        else:
            return site
    raise contract_error(codec, f"holds no model with a head dimension of {USUAL_DIMS}: {refusals}")


def _samples(codec: Codec) -> Iterator[tuple[Format, Tensor, Tensor]]:
    """Each half that packs anything, with vectors [B, K, n, D] of some units at their positions."""
    random = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        site = _site(codec, dtype)
        formats = codec.formats(site)
        for half in (formats.keys, formats.values):
            if half.columns:
                shape = BATCH, HEADS, UNITS * half.group_size
                vectors = torch.randn(*shape, site.geometry.head_dim, generator=random, dtype=torch.float32).to(dtype)
                yield half, vectors, torch.arange(shape[-1]).repeat(BATCH, HEADS, 1)


def _sample(layer: int, dim: int) -> Sample:
    """A layer on calibration text."""
    random = torch.Generator().manual_seed(layer)
    queries, keys, values = (
        torch.randn(2, heads, _LENGTH, dim, generator=random, dtype=torch.float32)
        for heads in (HEADS * GROUP, HEADS, HEADS)
    )
    return Sample(_geometry(HEADS, dim), dim**-0.5, _rotary(dim), queries, keys, values)


def _geometry(heads: int, dim: int) -> Geometry:
    return Geometry(tuple(range(LAYERS)), heads * GROUP, heads, dim)


def _rotary(dim: int) -> Rotary:
    return Rotary(10_000.0 ** -(torch.arange(0, dim - dim % 2, 2, dtype=torch.float32) / dim))


def _expect_within(codec: Codec, found: Tensor, source: Tensor, error: float) -> None:
    sizes = dict(zip(("batch", "kv_heads", "seq", "head_dim"), source.shape, strict=True))
    check_tensor(codec, found, sizes, source.dtype, source.device)
    if not source.numel():
        return
    worst = float((found.double() - source.double()).abs().max())
    allowed = error * float(source.abs().max())
    if not worst <= allowed:
        raise contract_error(codec, f"decoded with an error of {worst:g}, expected at most {allowed:g}")


def _expect_same(codec: Codec, found: _Columns, expected: _Columns, when: str) -> None:
    """Whole numbers are the same, others close: products of matrices round by the number of their rows."""
    for name, column in expected.items():
        if column.is_floating_point():
            expect_close(codec, found[name], column, when)
        elif not torch.equal(found[name], column):
            raise contract_error(codec, f"encodes other {name!r} {when}")


CHECKS = (
    holds_a_usual_model,
    refuses_a_model_in_words,
    packs_whole_steps,
    encodes_to_its_columns,
    decodes_what_it_encoded,
    decodes_to_finite_numbers,
    packs_units_apart,
    keeps_rows_apart,
    keeps_heads_apart,
    ignores_empty_slots,
    leaves_its_input_alone,
    is_deterministic,
    checks_its_calibration,
)
