"""The window as kernels are given it: every query in its place, zeros and -1 around."""

import pytest
import torch

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.score.window_queries import WindowQueries
from tests.kernels.scenes import DEVICE, scene


def segments(layers=2, rows=2, heads=2):
    return scene(torch.full((layers, rows, heads), 5), 16, torch.float32).segments


def window(group, width, dim=8, layers=2, rows=2, heads=2, dtype=torch.float32):
    queries = [torch.randn(rows, heads * group, width, dim, device=DEVICE).to(dtype) for _ in range(layers)]
    positions = [torch.randint(0, 99, (rows, width), device=DEVICE) for _ in range(layers)]
    return queries, positions, WindowQueries.of(queries, positions, segments(layers, rows, heads), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 8, 31, 32])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_every_query_is_in_its_place(group, width, dtype):
    queries, positions, packed = window(group, width, dtype=dtype)
    padded_group, padded_width = packed.queries.shape[1:3]

    for place in range(8):
        layer, row, head = place // 4, place // 2 % 2, place % 2
        own = queries[layer][row, head * group : (head + 1) * group]
        assert torch.equal(packed.queries[place, :group, padded_width - width :], own)
        assert packed.positions[place // 2, padded_width - width :].tolist() == positions[layer][row].tolist()
    assert padded_group * padded_width >= 16
    assert (packed.group, packed.scaling, packed.queries.dtype) == (group, 0.5, dtype)


@pytest.mark.parametrize(("group", "width"), [(3, 5), (1, 1), (4, 7)])
def test_padding_is_zeros_and_no_position(group, width):
    _, _, packed = window(group, width)
    padded_width = packed.queries.shape[2]

    assert (packed.queries[:, group:] == 0).all()
    assert (packed.queries[:, :, : padded_width - width] == 0).all()
    assert (packed.positions[:, : padded_width - width] == -1).all()
    assert packed.positions.dtype == torch.int32


def test_powers_of_two_are_only_stacked():
    queries, _, packed = window(4, 8)

    assert torch.equal(packed.queries.view(2, 2, 8, 8, 8), torch.stack(queries))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda queries, positions: (queries[:1], positions), "for each layer"),
        (lambda queries, positions: ([queries[0], queries[1][:, :, :2]], positions), "differ"),
        (lambda queries, positions: ([queries[0], queries[1].double()], positions), "dtype"),
        (lambda queries, positions: ([one[:, :3] for one in queries], positions), "do not divide"),
        (lambda queries, positions: (queries, [one[:, :2] for one in positions]), "differ"),
        (lambda queries, positions: ([one[:, :, :0] for one in queries], positions), "no queries"),
    ],
)
def test_windows_that_do_not_fit_are_refused(change, message):
    queries, positions, _ = window(2, 4)

    with pytest.raises(UnsupportedInputError, match=message):
        WindowQueries.of(*change(queries, positions), segments(), 0.5)
