"""Calls of the quantising kernels, and what torch gives for the same vectors."""

import torch

from kvpolicy_kernels.quantise import quantise_channels, quantise_tokens
from kvpolicy_plugins.codecs.shared import affine
from tests.kernels.accuracy import assert_twice_as_good
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
