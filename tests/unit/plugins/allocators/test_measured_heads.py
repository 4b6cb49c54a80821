"""Heads that are measured while they copy: needles, budgets at the edges, and calibrations that are none."""

import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import AllocationRequest, Geometry, Site
from kvpolicy_plugins.allocators.duo import Duo
from kvpolicy_plugins.allocators.headkv import HeadKV
from kvpolicy_plugins.allocators.shared.needle import Needles
from kvpolicy_plugins.allocators.surfacelogic import SurfaceLogic
from tests.support.views import view_of

DIVIDERS = (HeadKV, SurfaceLogic)


def divided(allocator, importance, total, room=20):
    """Counts [L, K] of one row."""
    statistics = torch.tensor(importance)[:, None]
    rooms = torch.full(statistics.shape, room) if isinstance(room, int) else torch.tensor(room)[:, None]
    given = rooms, torch.tensor([total]), torch.zeros_like(rooms), torch.tensor([20])
    return allocator.allocate(AllocationRequest(*given, statistics=statistics))[:, 0].tolist()


def test_each_row_ends_with_a_span_of_itself():
    text = torch.arange(60).reshape(3, 20)
    probes = HeadKV(needle=4).probes(text)

    assert probes[:, :16].tolist() == text[:, :16].tolist()
    assert (probes[:, 16:] - text[:, :1]).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert Needles.of(3, 20, 32, text.device).length == 5


@pytest.mark.parametrize("kind", DIVIDERS)
def test_heads_are_equal_where_importance_says_nothing(kind):
    for importance in ([[0.0, 0.0], [0.0, 0.0]], [[3.0, 3.0], [3.0, 3.0]]):
        assert divided(kind(), importance, 40) == [[10, 10], [10, 10]]
    unlike = [[0.1, 0.2], [0.3, 0.9]]
    assert divided(kind(beta=1e9), unlike, 40) == [[10, 10], [10, 10]]
    assert divided(kind(exponent=0), unlike, 40) == [[10, 10], [10, 10]]


@pytest.mark.parametrize("kind", DIVIDERS)
def test_more_important_heads_keep_more_up_to_what_they_hold(kind):
    counts = divided(kind(beta=1.5), [[0.1, 0.2], [0.3, 9.0]], 40)

    assert counts[0][0] < counts[0][1] < counts[1][0] < counts[1][1] == 20
    assert sum(map(sum, counts)) == 40


def test_floors_that_a_short_head_cannot_use_go_to_the_others():
    assert divided(HeadKV(beta=10), [[1.0, 1.0], [1.0, 1.0]], 40, [[1, 20], [20, 20]]) == [[1, 13], [13, 13]]


def test_streaming_heads_get_what_retrieval_heads_have_no_room_for():
    importance = [[0.5, 0.5], [0.1, 0.9]]
    assert divided(Duo(), importance, 20) == [[0, 10], [0, 10]]
    assert divided(Duo(), importance, 50) == [[5, 20], [5, 20]]
    assert divided(Duo(streaming=0), importance, 20) == [[5, 5], [5, 5]]
    assert divided(Duo(streaming=1), importance, 20) == [[5, 5], [5, 5]]


def test_a_gate_is_the_importance_of_its_kv_head():
    """Whatever the group is reduced by."""
    table = torch.tensor([[0.25, 1.0], [0.0, 0.5]], dtype=torch.float64)
    for group in ("max", "mean"):
        allocator, layers = Duo(group=group), Duo().calibration_of(table, Geometry((0, 1), 6, 2, 8))
        for layer, gates in zip(layers, table, strict=True):
            site = Site(Geometry((0, 1), 6, 2, 8), torch.float32, calibration=layer)
            allocator.check_calibration(site)
            view = view_of(torch.zeros(3, 2, 4, 8), calibration=layer)
            assert torch.equal(allocator.statistics(view), gates.float().expand(3, 2))


@pytest.mark.parametrize("gate", [-0.01, 1.5])
def test_gates_are_from_0_to_1(gate):
    """The first that is not is named, by its layer in the model."""
    table = torch.tensor([[0.5, 0.5], [0.5, gate], [2, 0]], dtype=torch.float64)
    with pytest.raises(ParameterError, match=f"gates must be from 0 to 1: layer 5, head 1 has {gate}"):
        Duo().calibration_of(table, Geometry((2, 5, 7), 2, 2, 8))


def test_published_importances_of_query_heads_are_reduced_as_measured_ones():
    """They can be of any scale: what does not fit into float32 is not lost."""
    geometry = Geometry((0, 1), 6, 2, 8)
    table = torch.tensor([[4, 0, 2, 0, 0, 1], [1, 1, 1, 8, 0, 0]], dtype=torch.float64)
    for scale in (1, 1e-300, 1e300):
        layers = HeadKV().calibration_of(scale * table, geometry)
        for layer, mean, largest in zip(layers, ([2, 1 / 3], [1, 8 / 3]), ([4, 1], [1, 8]), strict=True):
            HeadKV().check_calibration(Site(geometry, torch.float32, calibration=layer))
            view = view_of(torch.zeros(3, 2, 4, 8), calibration=layer)
            for group, expected in (("mean", mean), ("max", largest)):
                shown = HeadKV(group=group).statistics(view)
                assert torch.allclose(8 * shown, torch.tensor(expected, dtype=torch.float32).expand(3, 2))


def test_published_importances_may_all_be_zero_but_not_negative():
    geometry = Geometry((0, 4), 2, 2, 8)
    table = torch.zeros(2, 2, dtype=torch.float64)
    assert [layer["importance"].tolist() for layer in HeadKV().calibration_of(table, geometry)] == [[0, 0], [0, 0]]
    table[1, 0] = -1e-9
    with pytest.raises(ParameterError, match="importances must not be negative: layer 4, head 0 has -1e-09"):
        HeadKV().calibration_of(table, geometry)


def test_what_is_measured_otherwise_reads_no_table():
    with pytest.raises(ParameterError, match="reads no table of heads"):
        SurfaceLogic().calibration_of(torch.ones(1, 2), Geometry((0,), 2, 2, 8))


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(3), r"must be \{'importance': \(4,\)\}: \{'importance': \(3,\)\}"),
        (torch.tensor([1.0, 1.0, -1.0, 1.0]), "the importance of a head must not be negative"),
        (torch.tensor([1.0, torch.inf, 1.0, 1.0]), "'importance' must be finite"),
        (torch.ones(4, dtype=torch.int64), "'importance' must be floating point"),
    ],
)
def test_an_importance_is_one(importance, message):
    geometry = Geometry((0,), 4, 2, 8)
    with pytest.raises(ParameterError, match=message):
        Duo().check_calibration(Site(geometry, torch.float32, calibration={"importance": importance}))
