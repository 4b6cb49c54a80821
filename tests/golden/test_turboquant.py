"""The store `turboquant` holds what the kernels of vLLM hold, byte for byte, and is attended to as they attend."""

import math

import attrs
import pytest
import torch

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.shared.codebook import codebook, edges_between
from kvpolicy_plugins.codecs.shared.hadamard import hadamard
from kvpolicy_plugins.codecs.shared.packing import pack, unpack
from kvpolicy_plugins.codecs.shared.rotated import Rotated
from kvpolicy_plugins.codecs.turboquant import TurboQuant
from tests.golden.families import Vectors, cases, close, same

TIE = 1e-6  # so near to an edge the last bit of float32 decides between two codes
MOST_TIES = 1e-3  # of all codes
SAME_HALF = 0.98  # of numbers in float16; for the others, the last bit of float32 decides how they are rounded


@pytest.mark.parametrize("path", cases("test_turboquant"), ids=lambda path: path.stem)
def test_published_results(path):
    v = Vectors(path)
    assert v.text("p_preset").startswith("turboquant")
    keys, values = formats_of(v)
    key_columns = check_keys(v, keys)
    value_columns = check_values(v, values)
    check_bytes(v, (keys, values), [*as_of_the_engine(v, key_columns), *value_columns.values()])
    at = torch.arange(v["k"].shape[2]).expand(v["k"].shape[:3])
    hats = {"k": keys.decode(key_columns, at), "v": values.decode(value_columns, at)}
    for name, hat in hats.items():
        close(hat, v[f"{name}_hat"], atol=1e-4, rtol=0)
        error = (hat - v[name]).square().sum() / v[name].square().sum()
        close(error, v[f"{name}_relative_mse"], atol=0, rtol=1e-3)
    close(attention(v, hats["k"], hats["v"]), v["out"], atol=1e-4, rtol=0)
    close(attention(v, v["k"], v["v"]), v["out_exact"], atol=1e-4, rtol=0)
    assert v.unread() == []


def formats_of(v):
    """As a policy makes them, with the signs and the numerically integrated levels of the engine."""
    (_, heads, _, dim), signs = v["k"].shape, tuple(v["signs"].int().tolist())
    codec = TurboQuant(
        v.parameter("key_bits"),
        v.parameter("value_bits"),
        norm_correction=bool(v.parameter("norm_correction")),
        signs="none",
    )
    formats = codec.formats(Site(Geometry((0,), v["q"].shape[1], heads, dim), v["k"].dtype))
    levels = v["centroids"].double() * math.sqrt(dim)
    close(levels, torch.tensor(codebook(len(levels).bit_length() - 1), dtype=torch.float64), atol=3e-3, rtol=0)
    if not isinstance(formats.keys, Rotated):
        return formats.keys, formats.values
    assert set(formats.keys.signs) == {1}
    assert len(levels) == 2 ** v.parameter("key_bits")
    return attrs.evolve(formats.keys, signs=signs, levels=tuple(levels.tolist())), formats.values


def check_keys(v, kv_format):
    """The columns with the codes and norms of the file."""
    columns, dim = kv_format.encode(v["k"], None), v["k"].shape[-1]
    if not isinstance(kv_format, Rotated):
        return {"codes": check_float8(v["k"], columns["codes"], v["slot_bytes"][..., :dim])}
    exact = v["k"].double()
    rotated = hadamard(exact / exact.norm(dim=-1, keepdim=True).clamp(min=TIE) * v["signs"].double()) / math.sqrt(dim)
    edges = torch.tensor(edges_between(v["centroids"].double().tolist()), dtype=torch.float64)
    gap = (rotated[..., None] - edges).abs().amin(-1)
    check_codes(unpack(columns["codes"], kv_format.bits, dim), v["k_codes"], gap > TIE)
    # The engine stores the norm and divides by that of the levels when it reads; here the quotient is stored.
    norm = v["k_norm"].half().float()
    if v.parameter("norm_correction"):
        norm = norm * math.sqrt(dim) / torch.tensor(kv_format.levels)[v["k_codes"].int()].norm(dim=-1)
    close(columns["norm"].float(), norm, atol=0, rtol=2**-9)
    return {"codes": pack(v["k_codes"], kv_format.bits), "norm": norm}


def as_of_the_engine(v, columns):
    """The columns of keys, with the norm where the engine has it."""
    return [v["k_norm"].half() if name == "norm" else column for name, column in columns.items()]


def check_float8(numbers, found, published):
    """Every code is a nearest one, and the published one where Triton's interpreter rounds as a GPU does.

    The vectors come from the interpreter. It truncates subnormal numbers, rounds halves up, and loses the carry of half
    the numbers that are rounded up to a power of two: 1.95 becomes 1.
    """
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    error = (found.view(torch.float8_e4m3fn).float() - numbers).abs()
    nearest = (numbers[..., None] - every[every.isfinite()]).abs().amin(-1)
    same(error == nearest, torch.ones_like(error, dtype=torch.bool))
    half = error == (published.view(torch.float8_e4m3fn).float() - numbers).abs()
    to_power_of_two, subnormal = found & 7 == 0, found & 127 < 8
    other = found != published
    assert not (other & ~half & ~to_power_of_two & ~subnormal).any()
    assert other.float().mean() < 0.05
    return published


def check_values(v, kv_format):
    columns = kv_format.encode(v["v"], None)
    exact = v["v"].double()
    low = exact.amin(-1, keepdim=True)
    scale = ((exact.amax(-1, keepdim=True) - low) / (2**kv_format.bits - 1)).clamp(min=1e-8)
    gap = ((exact - low) / scale % 1 - 0.5).abs()
    check_codes(unpack(columns["codes"], kv_format.bits, v["v"].shape[-1]), v["v_codes"], gap > TIE * 2**kv_format.bits)
    stored = {"scale": v["v_scale"][..., None], "minimum": v["v_zero"][..., None]}
    for name, numbers in stored.items():
        close(columns[name].float(), numbers, atol=2**-24, rtol=2**-10)
        assert (columns[name] == numbers.half()).float().mean() >= SAME_HALF
    return {"codes": pack(v["v_codes"], kv_format.bits), **{name: numbers.half() for name, numbers in stored.items()}}


def check_codes(found, expected, clear):
    """Exactly, but for neighbours where the number is at the edge between them."""
    apart = (found.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= MOST_TIES
    assert not apart[clear].any()


def check_bytes(v, kv_formats, columns):
    sizes = [sum(column.bytes_per_slot for column in kv_format.columns.values()) for kv_format in kv_formats]
    same(torch.tensor(sizes), torch.stack([v["key_packed_size"], v["slot_size"] - v["key_packed_size"]]))
    assert v["slot_size_aligned"] == v["slot_size"] + v["slot_size"] % 2 == v["slot_bytes"].shape[-1]
    slots = v["slot_bytes"].shape[:3]
    held = torch.cat([column.contiguous().view(*slots, -1).view(torch.uint8) for column in columns], -1)
    same(held, v["slot_bytes"][..., : sum(sizes)])


def attention(v, keys, values):
    """[B, H, D]: each row attends to as many tokens as the engine was told to read."""
    group = v["q"].shape[1] // keys.shape[1]
    logits = torch.einsum("bhd,bhtd->bht", v["q"], keys.repeat_interleave(group, 1)) / math.sqrt(keys.shape[-1])
    unread = torch.arange(keys.shape[2]) >= v["lengths"][:, None, None]
    weights = logits.masked_fill(unread, -torch.inf).softmax(-1)
    return torch.einsum("bht,bhtd->bhd", weights, values.repeat_interleave(group, 1))
