"""R-KV's forgiven similarities, against the matrix of all pairs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.lookalikes import search
from kvpolicy_kernels.redundancy import forgiven, traffic
from kvpolicy_plugins.scorers.redundancy import Redundancy
from tests.golden.families import FOLDER, Vectors
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references import redundancy as reference
from tests.kernels.scenes import DEVICE, Scene, scene
from tests.views import view_of

KINDS = ("isotropic", "clustered", "duplicates", "shared mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOUD = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy reports overflows that a GPU does not


def keys_of(kind: str, lengths: torch.Tensor, dim: int, dtype: torch.dtype, seed: int, capacity=None) -> Scene:
    """A scene whose keys resemble each other in one of several ways."""
    found = scene(lengths, dim, dtype, capacity=capacity, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    for keys in found.lists("keys"):
        keys.copy_(resembling(kind, keys.shape[0], dim, random).to(dtype))
    return found


def resembling(kind: str, count: int, dim: int, random: torch.Generator) -> torch.Tensor:
    noise = torch.randn(count, dim, generator=random)
    if kind == "isotropic":
        return noise
    if kind == "shared mean":
        return noise + 1.5 * torch.randn(dim, generator=random)
    centres = torch.randn(5, dim, generator=random) * torch.rand(5, 1, generator=random) * 3
    members = centres[torch.randint(0, 5, (count,), generator=random)]
    return members + (0.5 * noise if kind == "clustered" else 0.0 * noise)


def expected(found: Scene, threshold: float, forgive: int, end: str, empty_row: str):
    """Exact result and same-dtype torch's, [P, T]."""
    shape = (found.segments.count, found.segments.longest)
    exact, same = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    for row, keys in enumerate(found.lists("keys")):
        pairs = reference.similarities(keys.cpu().double())
        chosen = reference.targets(pairs, threshold, forgive, end)
        exact[row, : len(keys)] = reference.forgiven(pairs, chosen, empty_row)
        same[row, : len(keys)] = reference.forgiven(reference.similarities(keys.cpu()), chosen, empty_row)
    return exact, same


def threshold_for(found: Scene, near: float = 0.5) -> float:
    pairs = [reference.similarities(keys.cpu().double()).flatten() for keys in found.lists("keys")]
    return reference.between(torch.cat(pairs), near)


def check(found: Scene, *, near=0.5, forgive=1, end="last", empty_row="slot0") -> torch.Tensor:
    threshold = threshold_for(found, near)
    exact, same = expected(found, threshold, forgive, end, empty_row)
    segments, keys = place(found)
    out = Guarded((segments.count, segments.longest), torch.float32, DEVICE)
    given_back = forgiven(
        segments, keys, threshold=threshold, forgive=forgive, end=end, empty_row=empty_row, out=out.tensor
    )
    out.check()
    assert given_back is out.tensor
    assert_twice_as_good(out.tensor.cpu(), same, exact)
    return out.tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 59), (torch.bfloat16, 64), (torch.float16, 80)], ids=str)
def test_lengths_and_dtypes(kind, length, dtype, dim):
    check(keys_of(kind, torch.tensor([[[length]]]), dim, dtype, seed=length))


@pytest.mark.parametrize(("kind", "dtype", "end"), [
    ("clustered", torch.bfloat16, "last"),
    ("isotropic", torch.float16, "first"),
    ("duplicates", torch.float32, "last"),
])  # fmt: skip
def test_several_chunks_of_columns(kind, dtype, end):
    check(keys_of(kind, torch.tensor([[[515]]]), 32, dtype, seed=1), end=end)


@pytest.mark.parametrize("empty_row", ["slot0", "none"])
@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("forgive", [0, 1, 2, 16])
@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, (*DTYPES, torch.bfloat16), strict=True)), ids=str)
def test_options(kind, forgive, end, empty_row, dtype):
    found = keys_of(kind, torch.tensor([[[67, 3]]]), 16, dtype, seed=forgive)
    check(found, forgive=forgive, end=end, empty_row=empty_row, near=0.3)


@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("forgive", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_targets(kind, forgive, end):
    found = keys_of(kind, torch.tensor([[[140, 3]]]), 16, torch.bfloat16, seed=forgive)
    threshold = threshold_for(found, 0.45)
    result = search(*place(found), threshold=threshold, forgive=forgive, end=end)
    for row, keys in enumerate(found.lists("keys")):
        chosen = reference.targets(reference.similarities(keys.cpu().double()), threshold, forgive, end)
        padded = [columns + [-1] * (forgive - len(columns)) for columns in chosen]
        assert result.targets[row, : len(keys)].tolist() == padded


LAYOUTS = [
    torch.tensor([[[37, 1, 64, 5]]]),
    torch.tensor([[[0, 20]], [[7, 0]]]),
    torch.tensor([[[66, 9], [130, 0]], [[2, 33], [1, 65]], [[0, 0], [0, 0]]]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [None, 140])
@pytest.mark.parametrize("lengths", LAYOUTS, ids=["heads", "layers", "all"])
def test_ragged_and_dense_segments_of_several_layers(lengths, capacity, dtype):
    result = check(keys_of("clustered", lengths, 16, dtype, seed=4, capacity=capacity))
    for row, length in zip(result, lengths.flatten().tolist(), strict=True):
        assert not row[length:].any()


@pytest.mark.timeout(600)
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    forgive=st.integers(0, 4),
    end=st.sampled_from(["last", "first"]),
    empty_row=st.sampled_from(["slot0", "none"]),
    near=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**20),
)
def test_any_segments(lengths, dim, dtype, kind, forgive, end, empty_row, near, seed):
    found = keys_of(kind, torch.tensor(lengths).reshape(2, 1, 2), dim, dtype, seed)
    check(found, near=near, forgive=forgive, end=end, empty_row=empty_row)


@pytest.mark.parametrize("name", ["clustered", "duplicates", "isolated"])
@pytest.mark.parametrize(("forgive", "mode"), [(1, "last"), (0, "first")])
def test_published_similarities(name, forgive, mode):
    """Mode `first` of the published code takes those that look different for slot 0: every entry forgives it."""
    vectors = Vectors(FOLDER / f"rkv_similarity_{name}.npz")
    keys = vectors["k"].to(DEVICE)
    segments = Segments.of([keys], torch.full(keys.shape[:2], keys.shape[2], device=DEVICE)[None])
    sums = forgiven(segments, Column.of([keys]), threshold=vectors.parameter("threshold"), forgive=forgive)
    directions = keys[0].double() / (keys[0].double().norm(dim=-1, keepdim=True) + 1e-8)
    everyone = directions @ directions.transpose(-1, -2) - torch.eye(keys.shape[2], device=DEVICE)
    scores = ((everyone.sum(1) - sums) / keys.shape[2]).softmax(-1)
    torch.testing.assert_close(scores.float().cpu(), vectors[f"redundancy_{mode}"], atol=2e-8, rtol=1e-6)


@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("forgive", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_as_the_plugin(seed, forgive, end):
    """The scorer's own formula around the kernel gives the scorer's scores."""
    found = keys_of("clustered", torch.tensor([[[90, 90]]]), 24, torch.float32, seed, capacity=90)
    keys = torch.stack(found.lists("keys"))[None].cpu()
    threshold = threshold_for(found)
    plugin = Redundancy(threshold, forgive=forgive, forgive_end=end)
    sums = forgiven(found.segments, found.columns["keys"], threshold=threshold, forgive=forgive, end=end).cpu()
    pairs = torch.stack([reference.similarities(one.double()) for one in keys[0]])
    mean = (pairs.sum(1) - sums) / 90
    torch.testing.assert_close(mean.softmax(-1).float(), plugin.score(view_of(keys))[0], atol=1e-8, rtol=1e-6)


@LOUD
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("slot", [0, 17, 99])
def test_a_key_that_is_not_finite_spoils_the_first_slot_of_its_segment_only(slot, wrong, dtype):
    lengths = torch.tensor([[[100, 100]]])
    clean, dirty = (keys_of("clustered", lengths, 16, dtype, seed=8) for _ in range(2))
    dirty.lists("keys")[0][slot, 5] = wrong
    options = {"threshold": threshold_for(clean), "forgive": 1}
    before = forgiven(clean.segments, clean.columns["keys"], **options)
    after = forgiven(dirty.segments, dirty.columns["keys"], **options)
    assert torch.equal(after[1], before[1])
    assert after[0, 0].isnan() == (slot > 0)  # the first forgives itself nothing
    assert after[0, 1:].isfinite().all()
    assert not forgiven(dirty.segments, dirty.columns["keys"], **options, empty_row="none").isnan().any()


@LOUD
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e15, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_far_from_one(scale, dtype):
    """Keys so small that their norm is lost beside 1e-8 look like nobody; so do those whose norm overflows."""
    found = keys_of("clustered", torch.tensor([[[80]]]), 16, torch.float32, seed=2)
    column = found.columns["keys"]
    keys = (column.storages[0] * scale).to(dtype)
    scaled = Column(torch.tensor([keys.data_ptr()], device=DEVICE), dtype, 16, (keys,))
    sums = forgiven(found.segments, scaled, threshold=0.5, forgive=1).cpu()[0]
    held = keys[:80].cpu().float()
    directions = held / (held.square().sum(-1, keepdim=True).sqrt() + 1e-8)
    pairs = (directions.double() @ directions.double().T).fill_diagonal_(0)
    exact = reference.forgiven(pairs, reference.targets(pairs, 0.5, 1, "last"), "slot0")
    torch.testing.assert_close(sums.double(), exact, atol=1e-4, rtol=1e-5)
    assert bool(sums[1:].any()) == (scale == 1e15)


def test_the_search_ends_when_all_have_met_a_look_alike():
    lengths = torch.tensor([[[500]]])
    alike = search(*place(keys_of("shared mean", lengths, 64, torch.bfloat16, 1)), threshold=0.3, forgive=1)
    alone = search(*place(keys_of("isotropic", lengths, 64, torch.bfloat16, 1)), threshold=0.9, forgive=1)
    assert alike.compared.tolist() == [[256] * 8]
    assert alone.compared.tolist() == [[500] * 8]
    oldest = search(
        *place(keys_of("shared mean", lengths, 64, torch.bfloat16, 1)), threshold=0.3, forgive=1, end="first"
    )
    assert oldest.compared.tolist() == [[256] * 8]


@pytest.mark.parametrize(("dtype", "forgive"), [(torch.bfloat16, 1), (torch.float16, 3)], ids=str)
def test_every_run_gives_the_same_bits(dtype, forgive):
    found = keys_of("duplicates", torch.tensor([[[70]]]), 16, dtype, 6)
    threshold = threshold_for(found)
    first = forgiven(*place(found), threshold=threshold, forgive=forgive)
    for _ in range(19):
        assert torch.equal(forgiven(*place(found), threshold=threshold, forgive=forgive), first)


def test_order_of_segments_and_dirt_behind_them_do_not_matter():
    found = keys_of("clustered", torch.tensor([[[65, 30, 90]]]), 16, torch.float32, 5)
    segments = found.segments
    turned = Segments(segments.starts.flip(0), segments.lengths.flip(0), 1, 1, 3, segments.longest)
    options = {"threshold": 0.5, "forgive": 1}
    sums = forgiven(segments, found.columns["keys"], **options)
    assert torch.equal(forgiven(turned, found.columns["keys"], **options), sums.flip(0))


def pairs_of(targets, lengths, empty_row):
    """How many pairs of entries forgive."""
    chosen = [targets[place, :length] for place, length in enumerate(lengths)]
    lonely = sum(int((one < 0).all(-1)[1:].sum()) for one in chosen) if empty_row == "slot0" else 0
    return lonely + sum(int((one >= 0).sum()) for one in chosen)


if DEVICE == "cpu":  # bytes are counted by the interpreter

    @pytest.mark.parametrize(("forgive", "empty_row"), [(0, "slot0"), (1, "slot0"), (1, "none"), (3, "slot0")])
    @pytest.mark.parametrize(("kind", "near", "dtype"), [
        ("clustered", 0.5, torch.float32),
        ("isotropic", 0.999, torch.bfloat16),
    ], ids=str)  # fmt: skip
    def test_traffic_is_what_the_kernels_address(kind, near, forgive, empty_row, dtype):
        found = keys_of(kind, torch.tensor([[[70, 0]], [[130, 2]]]), 20, dtype, 1)
        (segments, keys), lengths = place(found), found.segments.lengths.tolist()
        out = torch.empty(segments.count, segments.longest)
        result = search(segments, keys, threshold=near, forgive=forgive)
        with counted({"keys": keys.storages, "out": out}) as counts:
            forgiven(segments, keys, threshold=near, forgive=forgive, empty_row=empty_row, out=out)
        pairs = pairs_of(result.targets, lengths, empty_row)
        planned = traffic(segments, lengths, keys, forgive=forgive, compared=int(result.compared.sum()), pairs=pairs)
        assert counts.read["keys"] == planned.read["keys"]
        assert counts.written["out"] == planned.written["out"]
        most = traffic(segments, lengths, keys, forgive=forgive)
        assert most.read["keys"] >= planned.read["keys"]
        assert most.launches == 4


def place(found: Scene) -> tuple[Segments, Column]:
    return found.segments, found.columns["keys"]


def test_what_the_kernels_cannot_do_is_refused_before_anything_is_written():
    found = keys_of("clustered", torch.tensor([[[20, 30]]]), 16, torch.float32, 0)
    segments, keys = place(found)
    wide = torch.zeros(4, 300, device=DEVICE)
    out = Guarded((2, 30), torch.float32, DEVICE)
    usual = {"threshold": 0.5, "forgive": 1, "out": out.tensor}
    whole = torch.zeros(4, 16, dtype=torch.int32, device=DEVICE)
    for changed in (
        {"forgive": 17},
        {"forgive": -1},
        {"threshold": -0.5},
        {"threshold": float("nan")},
        {"end": "newest"},
        {"empty_row": "slot1"},
        {"out": torch.empty(2, 31, device=DEVICE)},
        {"out": torch.empty(2, 30, dtype=torch.float64, device=DEVICE)},
        {"out": torch.empty(30, 2, device=DEVICE).T},
        {"keys": Column(keys.addresses, torch.float32, 300, (wide,))},
        {"keys": Column(keys.addresses, torch.int32, 16, (whole,))},
        {"keys": Column(keys.addresses.repeat(2), torch.float32, 16, keys.storages)},
        {"segments": Segments(segments.starts, segments.lengths.long(), 1, 1, 2, 30)},
        {"segments": Segments(segments.starts[:1], segments.lengths, 1, 1, 2, 30)},
        {"segments": Segments(segments.starts, segments.lengths, 1, 1, 2, 1 << 23), "out": None},
    ):
        options = {"segments": segments, "keys": keys, **usual, **changed}
        with pytest.raises(UnsupportedInputError):
            forgiven(options.pop("segments"), options.pop("keys"), **options)
    assert out.tensor.isnan().all()


def test_nothing_at_all():
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    segments = Segments(empty, empty.int(), 1, 0, 2, 5)
    keys = Column(torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.float32, 8, ())
    assert forgiven(segments, keys, threshold=0.5, forgive=1).shape == (0, 5)


if torch.cuda.is_available():

    def test_storage_beyond_two_to_the_31_elements():
        storage = torch.empty((1 << 31) // 128 + 600, 128, dtype=torch.bfloat16, device=DEVICE)
        keys = resembling("clustered", 500, 128, torch.Generator().manual_seed(1)).to(storage)
        storage[-500:] = keys
        starts = torch.tensor([storage.shape[0] - 500], device=DEVICE)
        far = Segments(starts, torch.tensor([500], dtype=torch.int32, device=DEVICE), 1, 1, 1, 500)
        near = Segments(torch.zeros_like(starts), far.lengths, 1, 1, 1, 500)
        options = {"threshold": 0.5, "forgive": 1}
        columns = [
            Column(torch.tensor([one.data_ptr()], device=DEVICE), one.dtype, 128, (one,)) for one in (storage, keys)
        ]
        assert torch.equal(forgiven(far, columns[0], **options), forgiven(near, columns[1], **options))
