"""Keys in the metric of queries are what the published code of NOVA-KV makes of them."""

import pytest
import torch

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.nova_vq import NovaVQ
from kvpolicy_plugins.codecs.shared.calibrated.query_statistics import query_weighted_basis, stratified
from kvpolicy_plugins.codecs.shared.packing import unpack
from tests.golden.families import Vectors, cases, close, family_of, same

TIE = 1e-5  # relative difference of two distances within which either centroid will do


@pytest.mark.parametrize("path", cases("test_vector_quantisation"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def check_nova_vq(v):
    check_basis(v)
    check_groups(v)
    check_codes(v)


def check_basis(v):
    """Columns are determined up to their signs, so the products that their signs cancel in are compared, too."""
    forward = query_weighted_basis(v["sigma_q"], v["k_cov"])
    close(forward @ forward.mT, v["sigma_q"], atol=1e-9, rtol=1e-9)
    variances = (forward.mT @ v["k_cov"] @ forward).diagonal(dim1=-2, dim2=-1)
    close(forward.mT @ v["k_cov"] @ forward, torch.diag_embed(variances), atol=1e-9, rtol=0)
    assert (variances.diff(dim=-1) <= 0).all()
    forward = forward[..., v["perm"]]
    signs = (forward * v["forward"]).sum(-2, keepdim=True).sign()
    close(forward * signs, v["forward"], atol=1e-6, rtol=1e-6)
    close(torch.linalg.inv(forward) * signs.mT, v["inverse"], atol=1e-6, rtol=1e-6)


def check_groups(v):
    dim, group, bits = v["k"].shape[-1], v.parameter("group"), v.parameter("bits_per_coord")
    order = stratified(dim, group)
    same(order, v["perm"])
    sizes = [len(cut) for cut in order.split(group)]
    ends = torch.tensor(sizes).cumsum(0)
    same(torch.stack([ends - torch.tensor(sizes), ends, bits * torch.tensor(sizes)], 1), v["group_bounds"])


def check_codes(v):
    form, keys = format_of(v), v["k"].movedim(0, 1)[None].double()
    at = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    columns = form.encode(keys, at)
    scale = columns["scale"] if "scale" in columns else torch.ones(keys.shape[:3], dtype=torch.float64)
    close(scale[0].T, v["token_scale"], atol=1e-9, rtol=1e-9)
    codes = unpack(columns["codes"], form.bits, v["codes"].shape[-1])[0].movedim(0, 1)
    check_nearest(v, codes.long(), v["codes"].long())
    decoded = form.decode(columns, at)
    close(decoded[0].movedim(0, 1), v["k_hat"], atol=1e-4, rtol=0)
    in_basis = form.decode_in_basis(columns, at, torch.float64)
    group = v["q"].shape[1] // keys.shape[1]
    queries = v["q"].movedim(0, 1).double().unflatten(0, (-1, group))  # [K, G, n, D]
    exact = queries @ keys[0, :, None].mT
    for heads, packed in ((queries.flatten(1, 2), decoded), (form.queries_to_basis(queries.flatten(1, 2)), in_basis)):
        logits = (heads @ packed[0].mT).unflatten(1, (group, -1))
        close((logits - exact).square().mean((2, 3)).flatten(), v["logit_mse"], atol=0, rtol=1e-4)


def format_of(v):
    """The published basis, in which the codebooks are."""
    group, bits, heads = v.parameter("group"), v.parameter("bits_per_coord"), v["k"].shape[1]
    dim, entries = v["k"].shape[-1], 2 ** (bits * group)
    books = torch.zeros(heads, -(-dim // group), entries, group, dtype=torch.float64)
    for head in range(heads):
        for number in range(books.shape[1]):
            book = v[f"codebook_h{head}_g{number}"]
            books[head, number, :, : book.shape[1]] = book[torch.arange(entries) % len(book)]
    calibration = {"forward": v["forward"], "means": v["k_mean"][:, None], "centroids": books}
    normalise = bool(v.parameter("pertoken_norm"))
    codec = NovaVQ(bits, group, normalise, "full", sinks=0, value_rotation=False, scales="full")
    site = Site(Geometry((0,), v["q"].shape[1], heads, dim), torch.float64, calibration=calibration)
    codec.check_calibration(site)
    return codec.formats(site).keys


def check_nearest(v, codes, expected):
    """Codes are the published ones, but where two centroids are equally near."""
    for token, head, number in (codes != expected).nonzero().tolist():
        forward = v["forward"][head]
        coordinates = (v["k"][token, head] - v["k_mean"][head]).double() @ forward / v["token_scale"][token, head]
        start, end, _ = v["group_bounds"][number].tolist()
        book = v[f"codebook_h{head}_g{number}"].double()
        distances = (book - coordinates[start:end]).norm(dim=-1)
        found, least = (distances[one[token, head, number]].item() for one in (codes, expected))
        assert abs(found - least) <= TIE * least


CHECKS = {"nova_vq": check_nova_vq}
