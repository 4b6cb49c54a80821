"""What holds for keys in a latent basis whatever they are."""

import itertools

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.latent import Latent, joint_spectrum
from kvpolicy_plugins.readers.latent_topk import LatentTopK
from tests.property.layers import generators
from tests.support.latents import formats_of, only_rows, read_request, samples

ranks = st.sampled_from((0.1, 0.25, 0.5, 0.9, 1.0))
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def places_of(sample):
    return torch.arange(sample.keys.shape[2]).expand(sample.keys.shape[:3])


def round_trip(form, sample):
    return form.decode(form.encode(sample.keys, places_of(sample)), places_of(sample))


def scale_of(sample):
    return float(sample.keys.square().sum()) or 1.0


@given(samples())
def test_full_rank_gives_the_keys_back(sample):
    found = round_trip(formats_of(sample, 1.0).keys, sample)
    assert_close(found, sample.keys, atol=1e-10 * scale_of(sample) ** 0.5, rtol=1e-10)


@given(samples(), ranks)
def test_the_basis_is_orthonormal_and_says_what_it_keeps(sample, rank):
    codec = Latent(rank)
    (fitted,) = codec.calibrate([sample])
    width = sample.geometry.kv_heads * sample.geometry.head_dim
    assert fitted["basis"].shape == (width, max(1, round(rank * width)))
    assert_close(fitted["basis"].T @ fitted["basis"], torch.eye(fitted["basis"].shape[1], dtype=torch.float64), **EXACT)
    assert 0 <= fitted["energy"] <= 1 + 1e-12
    assert rank < 1 or abs(fitted["energy"] - 1) < 1e-12
    again = codec.calibrate([sample])[0]
    assert all(torch.equal(again[name], fitted[name]) for name in fitted)


@given(samples(), ranks)
def test_what_is_lost_of_the_calibration_keys_is_the_discarded_eigenvalues(sample, rank):
    form = formats_of(sample, rank).keys
    eigenvalues, _ = joint_spectrum(sample)
    plain = sample.rotary.unrotate(sample.keys, places_of(sample))
    lost = plain - sample.rotary.unrotate(round_trip(form, sample), places_of(sample))
    assert_close(lost.square().sum(), eigenvalues[form.rank :].sum(), atol=1e-10 * scale_of(sample), rtol=1e-8)


@given(samples())
def test_the_error_never_grows_with_the_rank(sample):
    errors = [float((round_trip(formats_of(sample, r).keys, sample) - sample.keys).norm()) for r in (0.1, 0.3, 0.6, 1)]
    assert all(wider <= narrower + 1e-9 for narrower, wider in itertools.pairwise(errors))


@given(samples(), st.integers(1, 4))
def test_a_joint_basis_keeps_at_least_what_one_per_head_keeps(sample, each):
    """Schur: the largest eigenvalues of a matrix sum to no less than those of its diagonal blocks."""
    heads = sample.geometry.kv_heads
    joint, _ = joint_spectrum(sample)
    apart = 0.0
    for head in range(heads):
        alone = Geometry((0,), 1, 1, sample.geometry.head_dim)
        one = attrs.evolve(sample, geometry=alone, keys=sample.keys[:, [head]])
        apart += joint_spectrum(one)[0][:each].sum()
    assert joint[: heads * each].sum() >= apart - 1e-9 * scale_of(sample)


@given(samples())
def test_eigenvectors_have_one_sign_and_the_order_of_tokens_is_nothing(sample):
    eigenvalues, vectors = joint_spectrum(sample)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert (eigenvalues.diff() <= 0).all()
    swapped, _ = joint_spectrum(attrs.evolve(sample, keys=sample.keys.flip(0)))
    assert_close(swapped, eigenvalues, atol=1e-10 * scale_of(sample), rtol=1e-8)


@given(samples(), ranks, st.data())
def test_entries_are_packed_apart_from_each_other(sample, rank, data):
    """One at a time, and read alone, they are what they are among others."""
    form, places = formats_of(sample, rank).keys, places_of(sample)
    together = form.encode(sample.keys, places)["latent"]
    one = slice(slot := data.draw(st.integers(0, places.shape[2] - 1)), slot + 1)
    alone = form.encode(sample.keys[:, :, one], places[:, :, one])["latent"]
    assert_close(alone, together[:, :, one], **EXACT)
    decoded = form.decode({"latent": together}, places)[:, :, one]
    assert_close(form.decode({"latent": alone}, places[:, :, one]), decoded, **EXACT)


@given(samples(), ranks, generators)
def test_positions_travel_with_their_entries(sample, rank, random):
    """Stored in another order, with other positions in every head, keys come out the same."""
    form = formats_of(sample, rank).keys
    shift = torch.randint(0, 50, sample.keys.shape[:2], generator=random)[..., None]
    places = places_of(sample) + shift
    plain = sample.rotary.unrotate(sample.keys, places_of(sample))
    keys = sample.rotary.rotate(plain, places)
    order = torch.randperm(keys.shape[2], generator=random)
    shuffled = {"latent": form.encode(keys, places)["latent"][:, :, order]}
    decoded = form.decode(shuffled, places[:, :, order])
    original = sample.rotary.unrotate(round_trip(form, sample), places_of(sample))
    assert_close(sample.rotary.unrotate(decoded, places[:, :, order]), original[:, :, order], atol=1e-8, rtol=1e-8)


@given(samples(), ranks, st.sampled_from((7.0, -1e30)))
def test_empty_slots_pack_to_nothing(sample, rank, junk):
    form = formats_of(sample, rank).keys
    empty = places_of(sample) % 3 == 1
    places = places_of(sample).masked_fill(empty, -1)
    keys = sample.keys.masked_fill(empty[..., None], junk)
    latents = form.encode(keys, places)["latent"]
    assert not latents[:, 0][empty[:, 0]].any()
    expected = form.encode(sample.keys, places_of(sample))["latent"][:, 0]
    assert_close(latents[:, 0][~empty[:, 0]], expected[~empty[:, 0]], **EXACT)


@given(samples(), st.integers(-20, 10**5))
def test_a_common_shift_of_all_positions_changes_no_score(sample, shift):
    """No rotation takes part in a score."""
    reader, form = LatentTopK(), formats_of(sample).keys
    question = read_request(sample, form)
    moved = places_of(sample) + abs(shift)
    keys = sample.rotary.rotate(sample.rotary.unrotate(sample.keys, places_of(sample)), moved)
    queries = sample.rotary.unrotate(question.queries, question.query_positions[:, None])
    later = question.query_positions + abs(shift)
    other = attrs.evolve(
        question,
        queries=sample.rotary.rotate(queries, later[:, None]),
        query_positions=later,
        positions=moved,
        packed=form.encode(keys, moved),
    )
    assert_close(reader.scores(other), reader.scores(question), atol=1e-8, rtol=1e-8)


@given(samples(), generators)
def test_rows_are_scored_apart(sample, random):
    question = read_request(sample, formats_of(sample).keys)
    rows = torch.randperm(len(sample.keys), generator=random)
    reader = LatentTopK()
    assert_close(reader.scores(only_rows(question, rows)), reader.scores(question)[rows], **EXACT)


@given(samples(), ranks, st.integers(0, 60), st.sampled_from((2, 4, 8)), st.integers(0, 9), st.integers(1, 20))
def test_bytes_are_what_the_closed_form_says(sample, rank, slots, bits, residual, batch):
    """Per entry 2r + K·D·bits/8 + 4·K·D/group, in half precision; more for what stays exact."""
    codec = Latent(rank, value_bits=bits, value_group=4, residual=residual, batch=batch)
    geometry, (calibration,) = sample.geometry, codec.calibrate([sample])
    formats = codec.formats(Site(geometry, torch.bfloat16, 0, sample.rotary, calibration))
    width, packed = geometry.kv_heads * geometry.head_dim, max(0, slots - residual) // batch * batch
    tail = min(slots, residual + batch)
    parts = {
        formats.keys: 2 * formats.keys.rank * packed + 2 * width * tail,
        formats.values: (width * bits // 8 + 4 * width // 4) * packed + 2 * width * tail,
    }
    for form, expected in parts.items():
        found = form.nbytes(slots, geometry, torch.bfloat16) * geometry.kv_heads
        assert abs(found - expected) < 1e-6
