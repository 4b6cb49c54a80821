"""Checks for codecs: round-trip errors are within the promised bound, and groups are packed independently."""

import contextlib
from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages.checking.declared import formats_of
from kvpolicy.stages.checking.returned import check_tensor, contract_error
from kvpolicy.stages.checking.untouched import untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import expect_close
from kvpolicy.stages.contracts import Codec
from kvpolicy.stages.formats import Format, Sample, Site
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.rotary import Rotary

LAYERS, BATCH, HEADS, GROUP, GROUPS = 3, 3, 2, 2, 3
USUAL_DIMS = (64, 128, 256)
UNUSUAL_DIMS = (1, 16, 48, 59)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_LENGTH = 64  # tokens of a calibration text
_LONGEST = 700  # all lengths below it are checked
_JUNK = 997.0
_Columns = Mapping[str, Tensor]


def holds_a_usual_model(codec: Codec, _promises: Promises) -> None:
    for dtype in DTYPES:
        formats = formats_of(codec, _site(codec, dtype))
        if (formats.keys.joint or formats.values.joint) and not codec.joint:
            raise contract_error(codec, "gave a joint format, expected `joint` to be True")


def refuses_a_model_in_words(codec: Codec, _promises: Promises) -> None:
    """Every geometry, with or without a rotary embedding, is accepted or refused with a ParameterError."""
    for dim in (*USUAL_DIMS, *UNUSUAL_DIMS):
        for heads in (1, 2, 3):
            for rotary in (None, _rotary(dim)):
                with contextlib.suppress(ParameterError):
                    codec.formats(Site(_geometry(heads, dim), torch.float32, rotary=rotary))


def packs_whole_steps(codec: Codec, _promises: Promises) -> None:
    """The packed length never decreases with the length, and is a multiple of the group size."""
    formats = codec.formats(_site(codec, torch.float32))
    for kv_format in (formats.keys, formats.values):
        counts = [kv_format.packed_length(length) for length in range(_LONGEST)]
        violations = [
            f"packed {count} of {length} entries after {previous}"
            for length, (previous, count) in enumerate(zip([0, *counts], counts, strict=False))
            if count < previous or count > length or count % kv_format.group_size
        ]
        if violations:
            raise contract_error(
                codec, f"{violations[0]}, expected whole groups of {kv_format.group_size}, never fewer than before"
            )


def encodes_to_its_columns(codec: Codec, _promises: Promises) -> None:
    for kv_format, vectors, positions in _samples(codec):
        for group_count in (GROUPS, 0):
            slots = slice(None, group_count * kv_format.group_size)
            encoded = kv_format.encode(vectors[:, :, slots], positions[:, :, slots])
            if encoded.keys() != kv_format.columns.keys():
                raise contract_error(codec, f"encoded to {sorted(encoded)}, expected {sorted(kv_format.columns)}")
            for name, column in kv_format.columns.items():
                sizes = {"batch": BATCH, "kv_heads": 1 if kv_format.joint else HEADS, "groups": group_count}
                inner = {f"{name}[{dim}]": size for dim, size in enumerate(column.shape)}
                check_tensor(codec, encoded[name], {**sizes, **inner}, column.dtype, vectors.device)


def decodes_what_it_encoded(codec: Codec, promises: Promises) -> None:
    for kv_format, vectors, positions in _samples(codec):
        for group_count in (GROUPS, 0):
            slots = slice(None, group_count * kv_format.group_size)
            source, slot_positions = vectors[:, :, slots], positions[:, :, slots]
            _expect_within(
                codec,
                kv_format.decode(kv_format.encode(source, slot_positions), slot_positions),
                source,
                promises.error,
            )


def reads_in_its_basis(codec: Codec, _promises: Promises) -> None:
    """`from_basis` undoes `to_basis`, products with queries stay as they are, and entries can be decoded there."""
    for kv_format, vectors, positions in _samples(codec):
        columns = kv_format.encode(vectors, positions)
        exact = torch.promote_types(vectors.dtype, torch.float32)
        decoded, given = kv_format.decode(columns, positions).double(), vectors.to(exact)
        rotated, there = kv_format.decode_in_basis(columns, positions, exact), kv_format.to_basis(given)
        rounding = 4 * torch.finfo(vectors.dtype).eps + 64 * torch.finfo(exact).eps
        for what, actual, expected in (
            ("took back what it took to its basis", kv_format.from_basis(there), given),
            ("decoded in its basis", kv_format.from_basis(rotated), decoded),
            ("gave products", kv_format.queries_to_basis(given) @ there.mT, given @ given.mT),
        ):
            if actual.dtype != exact or actual.shape != expected.shape:
                raise contract_error(codec, f"{what} of {actual.dtype} {list(actual.shape)}, expected {exact}")
            if not (actual.double() - expected.double()).abs().amax() <= rounding * expected.abs().amax():
                raise contract_error(codec, f"{what} to something else than before")


def has_a_format_for_each_head(codec: Codec, _promises: Promises) -> None:
    """`of_head` packs and reads one head as the format does that head beside the others."""
    for kv_format, vectors, positions in _samples(codec):
        if kv_format.joint:
            continue
        exact = torch.promote_types(vectors.dtype, torch.float32)
        encoded, given = kv_format.encode(vectors, positions), vectors.to(exact)
        for head in range(HEADS):
            own, one = kv_format.of_head(head), slice(head, head + 1)
            columns, at = {name: column[:, one] for name, column in encoded.items()}, positions[:, one]
            _expect_same(codec, own.encode(vectors[:, one], at), columns, f"for head {head} by itself")
            for what, actual, expected in (
                ("decoded", own.decode(columns, at), kv_format.decode(encoded, positions)),
                ("read", own.decode_in_basis(columns, at, exact), kv_format.decode_in_basis(encoded, positions, exact)),
                ("taken to its basis", own.to_basis(given[:, one]), kv_format.to_basis(given)),
                ("taken there as queries", own.queries_to_basis(given[:, one]), kv_format.queries_to_basis(given)),
                ("taken back", own.from_basis(given[:, one]), kv_format.from_basis(given)),
            ):
                expect_close(codec, actual, expected[:, one], f"when head {head} is {what} by itself")


def reads_heads_behind_each_other(codec: Codec, _promises: Promises) -> None:
    """What `of_entries` gives unpacks segments of several heads, some of them shorter, as `of_head` does each."""
    for kv_format, vectors, positions in _samples(codec):
        heads = [HEADS - 1, *range(HEADS)]
        counts = [kv_format.group_size * (1 + index % GROUPS) for index in range(len(heads))]
        reader = None if kv_format.joint else kv_format.of_entries(heads, counts)
        if reader is None:
            continue
        exact = torch.promote_types(vectors.dtype, torch.float32)
        columns, expected = [], []
        for head, count in zip(heads, counts, strict=True):
            own, segment = kv_format.of_head(head), (slice(1), slice(head, head + 1), slice(count))
            columns.append(own.encode(vectors[segment], positions[segment]))
            expected.append(own.decode_in_basis(columns[-1], positions[segment], exact))
        joined = {name: torch.cat([packed[name] for packed in columns], 2) for name in kv_format.columns}
        pairs = zip(heads, counts, strict=True)
        joined_positions = torch.cat([positions[:1, head : head + 1, :count] for head, count in pairs], 2)
        actual = reader.decode_in_basis(joined, joined_positions, exact)
        expect_close(codec, actual, torch.cat(expected, 2), "when heads are read behind each other")


def decodes_to_finite_numbers(codec: Codec, _promises: Promises) -> None:
    for kv_format, vectors, positions in _samples(codec):
        for name, numbers in {
            "zeros": torch.zeros_like(vectors),
            "equal numbers": torch.ones_like(vectors),
            "tiny numbers": vectors * torch.finfo(vectors.dtype).tiny,
            "large numbers": vectors * 1e4,
        }.items():
            if not kv_format.decode(kv_format.encode(numbers, positions), positions).isfinite().all():
                raise contract_error(codec, f"decoded to numbers that are not finite for {name}")


def packs_groups_independently(codec: Codec, _promises: Promises) -> None:
    """A group is packed in the same way alone and with others, so packed entries are never packed again."""
    for kv_format, vectors, positions in _samples(codec):
        batched = kv_format.encode(vectors, positions)
        decoded = kv_format.decode(batched, positions)
        for group in range(GROUPS):
            slots = slice(group * kv_format.group_size, (group + 1) * kv_format.group_size)
            columns = {name: column[:, :, group : group + 1] for name, column in batched.items()}
            alone = kv_format.encode(vectors[:, :, slots].clone(), positions[:, :, slots])
            _expect_same(codec, alone, columns, f"for group {group} alone")
            actual = kv_format.decode(columns, positions[:, :, slots])
            expect_close(codec, actual, decoded[:, :, slots], f"when group {group} is decoded alone")


def keeps_rows_apart(codec: Codec, _promises: Promises) -> None:
    for kv_format, vectors, positions in _samples(codec):
        batched = kv_format.encode(vectors, positions)
        for row in range(BATCH):
            alone = kv_format.encode(vectors[[row]], positions[[row]])
            _expect_same(
                codec, alone, {name: column[[row]] for name, column in batched.items()}, f"for row {row} alone"
            )


def keeps_heads_apart(codec: Codec, _promises: Promises) -> None:
    for kv_format, vectors, positions in _samples(codec):
        if kv_format.joint:
            continue
        batched = kv_format.encode(vectors, positions)
        for head in range(HEADS):
            changed = vectors.clone()
            changed[:, [index for index in range(HEADS) if index != head]] = _JUNK
            actual = {name: column[:, head] for name, column in kv_format.encode(changed, positions).items()}
            expected = {name: column[:, head] for name, column in batched.items()}
            _expect_same(codec, actual, expected, f"for head {head} beside another one")


def ignores_empty_slots(codec: Codec, _promises: Promises) -> None:
    """Rows with fewer groups are encoded and decoded in one batch with the others."""
    for kv_format, vectors, positions in _samples(codec):
        empty = torch.zeros_like(positions, dtype=torch.bool)
        empty[1, :, kv_format.group_size :] = True
        occupied = positions.masked_fill(empty, -1)
        expected = kv_format.decode(kv_format.encode(vectors, occupied), occupied)
        actual = kv_format.decode(kv_format.encode(vectors.masked_fill(empty[..., None], _JUNK), occupied), occupied)
        if not actual.isfinite().all():
            raise contract_error(codec, "decoded to numbers that are not finite for empty slots")
        expect_close(codec, actual[~empty], expected[~empty], "when the contents of empty slots differ")


def leaves_its_input_alone(codec: Codec, _promises: Promises) -> None:
    for kv_format, vectors, positions in _samples(codec):
        inputs = {"vectors": vectors, "positions": positions}
        with untouched(codec, inputs):
            columns = kv_format.encode(vectors, positions)
        with untouched(codec, {**inputs, **columns}):
            kv_format.decode(columns, positions)
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
    for actual, expected in zip(again, first, strict=True):
        _expect_same(codec, actual, expected, "when it is calibrated a second time")
    for (kv_format, vectors, positions), (other, *_) in zip(_samples(codec), _samples(codec), strict=True):
        expected = kv_format.encode(vectors, positions)
        _expect_same(codec, other.encode(vectors, positions), expected, "the second time")


def checks_its_calibration(codec: Codec, _promises: Promises) -> None:
    """A calibration by the codec is accepted, and refused with NaN in it."""
    if not codec.calibrated:
        return
    site = _site(codec, torch.float32)
    codec.check_calibration(site)
    for name, tensor in site.calibration.items():
        if tensor.is_floating_point() and tensor.numel():
            other = attrs.evolve(site, calibration={**site.calibration, name: torch.full_like(tensor, torch.nan)})
            with contextlib.suppress(ParameterError):
                codec.check_calibration(other)
                raise contract_error(codec, f"accepts a calibration whose {name!r} is NaN")


def _site(codec: Codec, dtype: torch.dtype) -> Site:
    """A site with the smallest usual head dimension that the codec supports, and a calibration if it needs one."""
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
    raise contract_error(codec, f"supports no head dimension of {USUAL_DIMS}: {refusals}")


def _samples(codec: Codec) -> Iterator[tuple[Format, Tensor, Tensor]]:
    """Formats of keys and values that pack entries, with vectors [B, K, n, D] of some groups, and positions."""
    random = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        site = _site(codec, dtype)
        formats = codec.formats(site)
        for kv_format in (formats.keys, formats.values):
            if kv_format.columns:
                shape = BATCH, HEADS, GROUPS * kv_format.group_size
                vectors = torch.randn(*shape, site.geometry.head_dim, generator=random, dtype=torch.float32).to(dtype)
                yield kv_format, vectors, torch.arange(shape[-1]).repeat(BATCH, HEADS, 1)


def _sample(layer: int, dim: int) -> Sample:
    """A calibration sample of one layer."""
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


def _expect_within(codec: Codec, decoded: Tensor, source: Tensor, error: float) -> None:
    sizes = dict(zip(("batch", "kv_heads", "seq", "head_dim"), source.shape, strict=True))
    check_tensor(codec, decoded, sizes, source.dtype, source.device)
    if not source.numel():
        return
    worst = float((decoded.double() - source.double()).abs().max())
    allowed = error * float(source.abs().max())
    if not worst <= allowed:
        raise contract_error(codec, f"decoded with an error of {worst:g}, expected at most {allowed:g}")


def _expect_same(codec: Codec, actual: _Columns, expected: _Columns, condition: str) -> None:
    """Integers must be equal, floats close: rounding in matrix products depends on the number of rows."""
    for name, column in expected.items():
        if column.is_floating_point():
            expect_close(codec, actual[name], column, condition)
        elif not torch.equal(actual[name], column):
            raise contract_error(codec, f"encodes other {name!r} {condition}")


CHECKS = (
    holds_a_usual_model,
    refuses_a_model_in_words,
    packs_whole_steps,
    encodes_to_its_columns,
    decodes_what_it_encoded,
    reads_in_its_basis,
    has_a_format_for_each_head,
    reads_heads_behind_each_other,
    decodes_to_finite_numbers,
    packs_groups_independently,
    keeps_rows_apart,
    keeps_heads_apart,
    ignores_empty_slots,
    leaves_its_input_alone,
    is_deterministic,
    checks_its_calibration,
)
