"""Codes, scales and minima as torch computes them, bit for bit; numbers as near as torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import UnsupportedInputError, quantise_channels, quantise_tokens
from kvpolicy_plugins import affine, affine_kernels
from kvpolicy_plugins.gpu import runs_kernels
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.scenes import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS, TOKENS = "channels", "tokens"


def vectors_of(shape, dtype, seed=0, kind="normal"):
    """Numbers [1, S, n, D]; some channels are outliers, some are constant."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(1, *shape, generator=random)
    if kind == "outliers":
        numbers[..., ::5] *= 100
        numbers[..., 1::7] = 3.25
    if kind == "grid":  # many numbers half way between two codes
        numbers = torch.randint(0, 31, numbers.shape, generator=random) / 2.0
    if kind == "offset":  # rounding the minimum takes it further than a step
        numbers = 100.0 + numbers / 100
    if kind == "tiny":
        numbers *= 1e-41
    if kind == "large":
        numbers *= 6e4 if dtype == torch.float16 else 3e38
        numbers = numbers.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return numbers.to(dtype)


def guarded(shapes, stored):
    return [Guarded(shape, dtype, DEVICE) for shape, dtype in zip(shapes, (torch.uint8, stored, stored), strict=True)]


def by_kernel(axis, vectors, group, bits, stored):
    """Codes, scales and minima of the launcher, in guarded outputs."""
    slabs, tokens, dim = vectors.shape
    width = -(-dim * bits // 8)
    if axis == CHANNELS:
        codes, groups = (slabs, tokens // group, group, width), (slabs, tokens // group, dim)
    else:
        codes, groups = (slabs, tokens, width), (slabs, tokens, dim // group)
    out = guarded((codes, groups, groups), stored)
    launch = quantise_channels.quantise_channels if axis == CHANNELS else quantise_tokens.quantise_tokens
    found = launch(vectors, group, bits, stored, out=tuple(one.tensor for one in out))
    for one, kept in zip(out, found, strict=True):
        one.check()
        assert kept is one.tensor
    return found


def by_torch(axis, vectors, group, bits, stored):
    """What the plugins compute on a CPU."""
    function = affine.quantise_channels if axis == CHANNELS else affine.quantise_tokens
    return tuple(part[0] for part in function(vectors.cpu()[None], group, bits, stored))


def decoded_by_kernel(axis, parts, dim, bits, dtype):
    tokens = parts[0].shape[1] * (parts[0].shape[2] if axis == CHANNELS else 1)
    out = Guarded((parts[0].shape[0], tokens, dim), dtype, DEVICE)
    if axis == CHANNELS:
        quantise_channels.dequantise_channels(*parts, bits, dtype, out=out.tensor)
    else:
        quantise_tokens.dequantise_tokens(*parts, dim, bits, dtype, out=out.tensor)
    out.check()
    return out.tensor


def exact_numbers(axis, parts, group, bits, dim):
    """Code · scale + minimum in float64, number by number."""
    codes, scales, minima = (part.cpu() for part in parts)
    rows = codes.flatten(1, 2) if axis == CHANNELS else codes
    places = torch.arange(dim)
    each = 8 // bits
    numbers = (rows[..., places // each].long() >> (places % each) * bits) & (2**bits - 1)
    if axis == CHANNELS:
        wide = [part.double().repeat_interleave(group, 1) for part in (scales, minima)]
    else:
        wide = [part.double().repeat_interleave(group, 2) for part in (scales, minima)]
    return numbers * wide[0] + wide[1]


def check(axis, vectors, group, bits, stored):
    """Codes equal those of torch, numbers are those of the codes, and near what was quantised."""
    dim, dtype = vectors.shape[-1], vectors.dtype
    given = vectors.to(DEVICE)
    found, exact = by_kernel(axis, given, group, bits, stored), by_torch(axis, vectors, group, bits, stored)
    for name, one, other in zip(("codes", "scales", "minima"), found, exact, strict=True):
        assert torch.equal(one.cpu(), other), f"{name} differ"
    numbers = decoded_by_kernel(axis, found, dim, bits, dtype).cpu()
    undo = affine.dequantise_channels if axis == CHANNELS else affine.dequantise_tokens
    sizes = (bits,) if axis == CHANNELS else (dim, bits)
    by_reference = undo(*(part[None] for part in exact), *sizes, dtype)[0]
    limit = torch.finfo(dtype).max
    wanted = exact_numbers(axis, found, group, bits, dim).clamp(-limit, limit)
    assert_twice_as_good(numbers, by_reference, wanted)
    return found, wanted


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1, 2, 31, 32, 128])
@pytest.mark.parametrize("dim", [59, 64, 80])
def test_channels(dim, unit, dtype, bits):
    kind = ["normal", "outliers", "grid", "offset"][(dim + unit + bits // 2) % 4]
    vectors = vectors_of((2, 2 * unit, dim), dtype, seed=unit, kind=kind)[0]
    check(CHANNELS, vectors, unit, bits, DTYPES[(dim + unit) % 3])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group"), [(64, 32), (128, 32), (128, 8), (80, 20), (80, 80), (59, 59), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_tokens(tokens, dim, group, dtype, bits):
    kind = ["normal", "outliers", "grid", "offset"][(dim + group + tokens + bits // 2) % 4]
    vectors = vectors_of((2, tokens, dim), dtype, seed=tokens, kind=kind)[0]
    check(TOKENS, vectors, group, bits, DTYPES[(dim + tokens) % 3])


@settings(max_examples=60)
@given(
    axis=st.sampled_from([CHANNELS, TOKENS]),
    sets=st.integers(1, 4),
    group=st.sampled_from([4, 8, 12, 16]),
    others=st.integers(1, 40),
    slabs=st.integers(1, 3),
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "outliers", "grid", "offset", "tiny", "large"]),
    seed=st.integers(0, 2**20),
)
def test_any_groups(axis, sets, group, others, slabs, bits, dtype, stored, kind, seed):
    shape = (slabs, sets * group, others) if axis == CHANNELS else (slabs, others, sets * group)
    check(axis, vectors_of(shape, dtype, seed=seed, kind=kind)[0], group, bits, stored)


@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_no_further_than_half_a_step(axis, bits):
    vectors = vectors_of((2, 64, 64), torch.float32, kind="outliers")[0]
    (_, scales, _), numbers = check(axis, vectors, 32, bits, torch.float32)
    wide = scales.cpu().repeat_interleave(32, 1 if axis == CHANNELS else 2).double()
    assert ((numbers - vectors.double()).abs() <= 0.5001 * wide + 1e-5).all()
    constant = vectors == 3.25
    assert torch.equal(numbers[constant], vectors.double()[constant]) or axis == TOKENS


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")  # NumPy's opinion
@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_group(bad, stored, bits, axis):
    vectors = vectors_of((1, 32, 32), torch.float32)[0].to(DEVICE)
    clean = by_kernel(axis, vectors, 16, bits, stored)
    vectors[0, 18, 5] = bad
    found = by_kernel(axis, vectors, 16, bits, stored)
    spoilt = torch.zeros(1, 32, 32, dtype=torch.bool)
    if axis == CHANNELS:
        spoilt[0, 16:, 5] = True
        group = (0, 1, 5)
    else:
        spoilt[0, 18, :16] = True
        group = (0, 18, 0)
    before, after = (exact_numbers(axis, parts, 16, bits, 32) for parts in (clean, found))
    assert torch.equal(after[~spoilt], before[~spoilt])
    codes = by_torch(axis, vectors, 16, bits, stored)
    assert torch.equal(found[0].cpu(), codes[0])
    for one, other in zip(found[1:], codes[1:], strict=True):
        assert torch.equal(one.cpu().nan_to_num(7), other.nan_to_num(7))
        assert not math.isnan(bad) or one[group].isnan()


@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_vectors(axis, dtype):
    whole = vectors_of((2, 100, 40), dtype)[0].to(DEVICE)
    part = whole[:, 3:67, 4:36]
    found, again = (by_kernel(axis, one, 8, 4, torch.float16) for one in (part, part.contiguous()))
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dim", [40, 60])
def test_traffic_is_what_kernels_address(dim, bits, axis):
    unit, group = 16, 20
    vectors = vectors_of((2, 48, dim), torch.bfloat16)[0].to(DEVICE)
    parts = by_kernel(axis, vectors, unit if axis == CHANNELS else group, bits, torch.float16)
    module = quantise_channels if axis == CHANNELS else quantise_tokens
    said = module.traffic(2, 48, dim, unit if axis == CHANNELS else group, bits, 2, 2)
    named = dict(zip(("codes", "scales", "minima"), parts, strict=True))
    with counted({"vectors": vectors, **named}) as seen:
        launch = quantise_channels.quantise_channels if axis == CHANNELS else quantise_tokens.quantise_tokens
        launch(vectors, unit if axis == CHANNELS else group, bits, torch.float16, out=parts)
    assert (seen.read, seen.written) == (said.read, said.written)
    out = torch.empty_like(vectors)
    with counted({"vectors": out, **named}) as seen:
        if axis == CHANNELS:
            quantise_channels.dequantise_channels(*parts, bits, torch.bfloat16, out=out)
        else:
            quantise_tokens.dequantise_tokens(*parts, dim, bits, torch.bfloat16, out=out)
    assert (seen.read, seen.written) == (said.written, said.read)


def test_what_kernels_cannot_do_is_refused():
    vectors = vectors_of((2, 32, 32), torch.float32)[0].to(DEVICE)
    half = torch.float16
    channels, tokens = quantise_channels.quantise_channels, quantise_tokens.quantise_tokens
    for launch in (channels, tokens):
        for arguments in (
            (vectors.double(), 16, 4, half),
            (vectors, 16, 4, torch.float64),
            (vectors, 16, 3, half),
            (vectors, 0, 4, half),
            (vectors, 12, 4, half),
            (vectors.mT, 16, 4, half),
            (vectors[0], 16, 4, half),
            (vectors.repeat(1, 1, 9), 16, 4, half),
        ):
            with pytest.raises(UnsupportedInputError):
                launch(*arguments)
    with pytest.raises(UnsupportedInputError, match="share a byte"):
        tokens(vectors, 2, 2, half)
    with pytest.raises(UnsupportedInputError):
        channels(vectors.repeat(1, 16, 1), 512, 4, half)
    codes, scales, minima = tokens(vectors, 16, 4, half)
    for arguments in (
        (codes, scales, minima.float(), 32, 4, half),
        (codes, scales, minima[:, :4], 32, 4, half),
        (codes[..., :3], scales, minima, 32, 4, half),
        (codes, scales, minima, 31, 4, half),
        (codes, scales, minima, 32, 4, torch.float64),
    ):
        with pytest.raises(UnsupportedInputError):
            quantise_tokens.dequantise_tokens(*arguments)
    codes, scales, minima = channels(vectors, 16, 4, half)
    for arguments in (
        (codes, scales[..., :3], minima, 4, half),
        (codes.mT, scales, minima, 4, half),
        (codes, scales, minima, 8, half),
        (codes[0], scales, minima, 4, half),
    ):
        with pytest.raises(UnsupportedInputError):
            quantise_channels.dequantise_channels(*arguments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("group", [3, 16])
def test_plugins_use_the_kernels_where_they_can(group, dtype, monkeypatch):
    vectors = vectors_of((4, 48, 48), torch.float32).to(DEVICE, dtype).view(2, 2, 48, 48)
    calls = {
        "quantise_channels": (vectors, group, 4, torch.float16),
        "quantise_tokens": (vectors, group, 4, torch.float16),
    }
    launched = []
    for name in ("quantise_channels", "quantise_tokens", "dequantise_channels", "dequantise_tokens"):
        monkeypatch.setattr(affine_kernels, name, _noting(getattr(affine_kernels, name), name, launched))

    def run():
        found = {name: getattr(affine, name)(*given) for name, given in calls.items()}
        back = affine.dequantise_channels(*found["quantise_channels"], 4, dtype)
        return found, back, affine.dequantise_tokens(*found["quantise_tokens"], 48, 4, dtype)

    monkeypatch.setattr(affine, "runs_kernels", lambda _device: True)
    by_kernels = run()
    able = [] if dtype == torch.float64 else ["quantise_channels", "dequantise_channels"]
    both = [*able, "quantise_tokens", "dequantise_tokens"] if able and group == 16 else able
    assert sorted(launched) == sorted(both)
    monkeypatch.setattr(affine, "runs_kernels", lambda _device: False)
    exact = run()
    for name, parts in by_kernels[0].items():
        for one, other in zip(parts, exact[0][name], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other) or DEVICE == "cuda"
    for one, other in zip(by_kernels[1:], exact[1:], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)


def _noting(function, name, names):
    def call(*given):
        result = function(*given)
        names.append(name)
        return result

    return call


def test_kernels_run_on_the_current_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    names = ("cpu", "cuda", "cuda:0", "cuda:1")
    assert [runs_kernels(torch.device(name)) for name in names] == [False, True, False, True]
