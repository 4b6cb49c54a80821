"""Keys in a latent basis, and reading by latent scores: what the formulas of SALS give in float64."""

import pytest
import torch

from kvpolicy.stages import Geometry, ReadRequest, Rotary, Sample, Site
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.codecs.latent import Latent, joint_spectrum
from kvpolicy_plugins.codecs.shared.packing import unpack
from kvpolicy_plugins.readers.latent_topk import LatentTopK
from tests.golden.families import Vectors, cases, close, same


@pytest.mark.parametrize("path", cases("test_latent"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    case = Case(vectors)
    check_calibration(vectors, case)
    check_keys(vectors, case)
    check_values(vectors, case)
    check_reading(vectors, case)
    check_attention(vectors, case)
    assert vectors.unread() == []


def tight(found, expected):
    close(found, expected, atol=1e-10, rtol=1e-10)


class Case:
    """A file's entries and query as a model gives them, rotated, and the plugins that its parameters describe."""

    def __init__(self, v):
        self.batch, self.kv_heads, slots, dim = v["k_pre"].shape
        self.geometry = Geometry((0,), v["q_pre"].shape[1], self.kv_heads, dim)
        self.rotary = Rotary(v["rope_base"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        self.positions = v["positions"].expand(self.batch, self.kv_heads, slots)
        self.keys = self.rotary.rotate(v["k_pre"], self.positions)
        self.query_positions = v["query_position"].expand(self.batch)
        self.queries = self.rotary.rotate(v["q_pre"][:, :, 0], self.query_positions[:, None])
        self.codec = Latent(
            v["rank"].item() / (self.kv_heads * dim), v["value_bits"].item(), v["value_group"].item(), "full"
        )
        site = Site(self.geometry, torch.float64, rotary=self.rotary, calibration={"basis": v["proj"]})
        self.formats = self.codec.formats(site)
        parts = (v[name].item() for name in ("sink", "critical", "recent"))
        self.reader = LatentTopK(*parts, v["score_rank"].item() / v["rank"].item(), dense_first=0, dense_last=0)

    def request(self):
        packed_lengths = torch.full(self.keys.shape[:2], self.keys.shape[2])
        packed = self.formats.keys.encode(self.keys, self.positions)
        held = {"format": self.formats.keys, "packed_lengths": packed_lengths, "packed": packed}
        return ReadRequest(self.queries, self.query_positions, self.positions, self.geometry, **held)

    def chosen(self):
        """Slots [B, K, n] that are read."""
        found = self.reader.choose(self.request())
        return torch.arange(self.keys.shape[2]).expand(self.positions.shape) if found is None else found


def check_calibration(v, case):
    plain = v["calibration_keys"].unflatten(1, (case.kv_heads, -1)).transpose(0, 1)[None]
    keys = case.rotary.rotate(plain, torch.arange(plain.shape[2]))
    sample = Sample(case.geometry, 1.0, case.rotary, keys, keys, keys)
    eigenvalues, _ = joint_spectrum(sample)
    close(eigenvalues, v["eigvals"], atol=1e-8, rtol=1e-8)
    (fitted,) = case.codec.calibrate([sample])
    close(fitted["basis"] @ fitted["basis"].T, v["proj"] @ v["proj"].T, atol=1e-8, rtol=0)
    tight(fitted["energy"], v["eigvals"][: v["rank"]].sum() / v["eigvals"].sum())


def check_keys(v, case):
    tight(case.formats.keys.encode(case.keys, case.positions)["latent"][:, 0], v["k_latent"])
    assert case.formats.keys.rank == v["rank"]


def check_values(v, case):
    columns = case.formats.values.encode(v["v"], case.positions)
    same(unpack(columns["codes"], case.codec.value_bits, case.geometry.head_dim), v["v_codes"])
    tight(columns["scale"], v["v_scale"])
    tight(columns["minimum"], v["v_zero"])


def check_reading(v, case):
    tight(case.reader.latent_query(case.request()), v["q_latent"])
    tight(case.reader.scores(case.request()), v["scores"])
    same(case.chosen(), v["selected"][:, None].expand(-1, case.kv_heads, -1))


def check_attention(v, case):
    chosen = case.chosen()
    latents = case.request().packed["latent"]
    places = case.positions.gather(2, chosen)
    keys = case.formats.keys.decode({"latent": gather(latents, chosen[:, :1])}, places)
    columns = case.formats.values.encode(v["v"], case.positions)
    values = case.formats.values.decode({name: gather(one, chosen) for name, one in columns.items()}, places)
    tight(probabilities(case.queries, keys) @ spread(case, values), v["out"])
    dense = probabilities(case.queries, case.keys)
    tight(dense @ spread(case, v["v"]), v["out_full_attention"])
    mass = dense[:, :, 0].gather(2, spread(case, chosen))
    tight(mass.sum(-1).mean(1), v["retained_mass"])


def spread(case, per_head):
    """[B, K, ...] to [B, H, ...]."""
    return per_head.repeat_interleave(case.geometry.group, 1)


def probabilities(queries, keys):
    """[B, H, 1, n] of queries [B, H, D] over keys [B, K, n, D]."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    logits = queries[:, :, None] @ keys.transpose(-1, -2)
    return (logits / keys.shape[-1] ** 0.5).softmax(-1)
