"""The quantised stores hold what the published code, or a float64 form of the published formulas, holds."""

import math

import pytest
import torch

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.shared.affine import dequantise, quantise
from kvpolicy_plugins.codecs.shared.codebook import codebook, edges_between
from kvpolicy_plugins.codecs.shared.packing import pack, unpack
from kvpolicy_plugins.codecs.shared.rotated import Rotated
from kvpolicy_plugins.codecs.tada import Tada
from tests.golden.families import Vectors, cases, close, family_of, same

KIVI = {"k": (2, -2), "v": (3, -1)}  # dimension that is cut into groups, and where its group then lies


@pytest.mark.parametrize("path", cases("test_stores"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def number(v, name):
    return v[name].item()


def site_of(vectors, query_heads=None):
    heads, dim = vectors.shape[1], vectors.shape[-1]
    return Site(Geometry((0,), query_heads or heads, heads, dim), vectors.dtype)


def places(vectors):
    return torch.arange(vectors.shape[2]).expand(vectors.shape[:3])


def exactly(found, expected):
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def attention(queries, keys, values, scale):
    """[B, H, w, D] over all that is given."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return (queries @ keys.mT * scale).softmax(-1) @ values


def check_kivi(v):
    bits, group = number(v, "bits"), number(v, "group_size")
    formats = Kivi(bits, group=group, residual=group, scales="full").formats(site_of(v["k"]))
    for name, kv_format in (("k", formats.keys), ("v", formats.values)):
        check_kivi_arithmetic(v, name, bits, group)
        check_kivi_format(v, name, bits, kv_format)
    words = v["k_codes"].mT
    exactly(pack(words, bits).view(torch.int32), v["k_packed_kernel"])
    exactly(v["k_packed_kernel"].mT, v["k_packed"])
    exactly(pack(v["v_codes"], bits).view(torch.int32), v["v_packed"])
    exactly(unpack(v["v_packed"].view(torch.uint8), bits, v["v"].shape[-1]), v["v_codes"])
    for what in ("scale", "min"):
        exactly(v[f"k_{what}_kernel"].mT, v[f"k_{what}"])


def check_kivi_arithmetic(v, name, bits, group):
    """In the dtype of the file, as the published code computes: the same bits."""
    cut, inside = KIVI[name]
    groups = v[name].unflatten(cut, (-1, group))
    codes, scale, minimum = quantise(groups, inside, bits, groups.dtype)
    exactly(codes.flatten(cut, cut + 1), v[f"{name}_codes"])
    exactly(scale.squeeze(inside), v[f"{name}_scale"])
    exactly(minimum.squeeze(inside), v[f"{name}_min"])
    decoded = dequantise(codes, scale, minimum, groups.dtype).flatten(cut, cut + 1)
    unit = torch.finfo(groups.dtype).eps * v[name].abs().max().item()
    close(decoded, v[f"{name}_dequant"], atol=2 * unit, rtol=0)


def check_kivi_format(v, name, bits, kv_format):
    """What is held: computed in float32, where half precision rounds some quotients to a neighbouring code."""
    vectors, exact = v[name], v[name].dtype == torch.float32
    at = places(vectors)
    columns = kv_format.encode(vectors, at)
    codes = unpack(columns["codes"], bits, vectors.shape[-1]).view(vectors.shape).int()
    apart = (codes - v[f"{name}_codes"].int()).abs()
    assert apart.max() <= (0 if exact else 1)
    eps = torch.finfo(vectors.dtype).eps
    assert (apart > 0).float().mean() <= eps * 2**bits
    close(columns["scale"], v[f"{name}_scale"], atol=0, rtol=0 if exact else eps)
    exactly(columns["minimum"], v[f"{name}_min"])
    decoded = kv_format.decode(columns, at)
    unit = eps * vectors.abs().max().item()
    close(decoded[apart == 0], v[f"{name}_dequant"][apart == 0], atol=2 * unit, rtol=0)


class KVTensor:
    """Keys or values while tokens come: packed as they are due, never packed again."""

    def __init__(self, form, vectors):
        self.form, self.vectors, self.packed_lengths = form, vectors, 0
        self.columns = form.encode(vectors[:, :, :0], places(vectors)[..., :0])

    def pack(self, length):
        due = slice(self.packed_lengths, self.form.packed_length(length))
        new = self.form.encode(self.vectors[:, :, due], places(self.vectors)[..., due])
        self.columns = {name: torch.cat([column, new[name]], 2) for name, column in self.columns.items()}
        self.packed_lengths = due.stop

    def entries(self, length):
        packed = self.form.decode(self.columns, places(self.vectors)[..., : self.packed_lengths])
        return torch.cat([packed, self.vectors[:, :, self.packed_lengths : length]], 2)

    def counts(self, length):
        return [self.packed_lengths, length - self.packed_lengths]


def check_kivi_decode(v):
    keys, values, prefill = v["k"], v["v"], number(v, "prefill")
    codec = Kivi(
        number(v, "k_bits"),
        number(v, "v_bits"),
        group=number(v, "group_size"),
        residual=number(v, "residual"),
        batch=1,
        scales="full",
    )
    formats = codec.formats(site_of(keys, v["q"].shape[1]))
    kv_tensors = KVTensor(formats.keys, keys), KVTensor(formats.values, values)
    states = []
    for step in range(v["q"].shape[2] + 1):
        length = prefill + step
        if step:
            entries = [kv_tensor.entries(length) for kv_tensor in kv_tensors]
            out = attention(v["q"][:, :, step - 1 : step], *entries, keys.shape[-1] ** -0.5)
            close(out, v["out"][:, :, step - 1 : step], atol=1e-12, rtol=1e-10)
        for kv_tensor in kv_tensors:
            kv_tensor.pack(length)
        states.append([count for kv_tensor in kv_tensors for count in kv_tensor.counts(length)])
    same(torch.tensor(states), v["state_kq_kres_vq_vres"])


def check_tada(v):
    bits, group, residual = (number(v, name) for name in ("bits", "group_size", "residual"))
    site = site_of(v["k"], v["q"].shape[1])
    codec = Tada(bits, group=group, residual=residual, batch=1, scales="full")
    formats = codec.formats(site)
    hats = [check_tada_format(v, "k", formats.keys), check_tada_format(v, "v", formats.values)]
    close(attention(v["q"], *hats, site.geometry.head_dim**-0.5), v["out"], atol=1e-12, rtol=1e-10)
    kv_format = Tada(bits, group=group, residual=residual, batch=1).formats(site).keys
    held = 8 * sum(column.bytes_per_slot for column in kv_format.columns.values())
    numbers = site.geometry.kv_heads * site.geometry.head_dim
    assert math.isclose(held / numbers, number(v, "compressed_bits_per_element"))


def check_tada_format(v, name, kv_format):
    vectors = v[name]
    packed = kv_format.packed_length(vectors.shape[2])
    at = places(vectors)[..., :packed]
    columns = kv_format.encode(vectors[:, :, :packed], at)
    close(columns["mean"][:, 0], v[f"{name}_mean"], atol=1e-12)
    same(unpack(columns["codes"][:, 0], kv_format.bits, kv_format.dim).movedim(2, 1), v[f"{name}_codes"])
    close(columns["scale"][:, 0].movedim(2, 1), v[f"{name}_scale"], atol=1e-12)
    close(columns["minimum"][:, 0].movedim(2, 1), v[f"{name}_zero"], atol=1e-12)
    hat = torch.cat([kv_format.decode(columns, at), vectors[:, :, packed:]], 2)
    close(hat, v[f"{name}_hat"], atol=1e-12)
    close((hat - vectors)[:, :, :packed].square().mean(), v[f"{name}_mse_centered"], atol=0, rtol=1e-9)
    groups = vectors[:, :, :packed].unflatten(-1, (-1, kv_format.group))
    raw = dequantise(*quantise(groups, -1, kv_format.bits, groups.dtype), groups.dtype)
    close((raw - groups).square().mean(), v[f"{name}_mse_uncentered"], atol=0, rtol=1e-9)
    return hat


def check_rotation_codebook(v):
    bits, dim = number(v, "bits"), v["x"].shape[-1]
    vectors = v["x"].reshape(1, 1, -1, dim)
    kv_format = Rotated(tuple(v["signs"].tolist()), vectors.dtype, vectors.dtype, bits)
    columns = kv_format.encode(vectors, places(vectors))
    close(columns["norm"].flatten(), v["norm"].flatten(), atol=0, rtol=1e-12)
    same(unpack(columns["codes"], bits, dim).view(v["codes"].shape), v["codes"])
    hat = kv_format.decode(columns, places(vectors)).view(v["x"].shape)
    close(hat, v["x_hat"], atol=1e-9, rtol=1e-9)
    relative = (hat - v["x"]).square().sum() / v["x"].square().sum()
    close(relative, v["relative_mse"], atol=0, rtol=1e-9)
    close(torch.tensor(codebook(bits), dtype=torch.float64), v["codebook"], atol=1e-9, rtol=0)
    close(torch.tensor(codebook_error(bits), dtype=torch.float64), v["codebook_mse"], atol=1e-9, rtol=0)
    assert len(Rotation(bits).formats(site_of(vectors)).keys.signs) == dim


def codebook_error(bits):
    """Mean squared error for a standard normal number; 1 - E[code²], because every code is a mean."""
    edges = [-math.inf, *edges_between(codebook(bits)), math.inf]
    shares = [math.erf(edge / math.sqrt(2)) / 2 for edge in edges]
    return 1 - sum((high - low) * code**2 for low, high, code in zip(shares, shares[1:], codebook(bits), strict=False))


CHECKS = {
    "kivi": check_kivi,
    "kivi_decode": check_kivi_decode,
    "tada": check_tada,
    "rotation_codebook": check_rotation_codebook,
}
