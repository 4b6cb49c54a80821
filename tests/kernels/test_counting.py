"""What counts the bytes counts them: by tensor, by element size, without what is masked."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.conftest import counts
from tests.kernels.counting import counted


@triton.jit
def copy(SOURCE, TARGET, COUNTS, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    most = tl.load(COUNTS + tl.program_id(0))
    values = tl.load(SOURCE + n, mask=n < most, other=0)
    tl.store(TARGET + n, values, mask=n < N)


def copied(dtype, count=50, most=(16, 20, 40, 0)):
    source, target = torch.arange(64).to(dtype), torch.zeros(64, dtype=dtype)
    counts = torch.tensor(most, dtype=torch.int32)
    return (source, target, counts), lambda: copy[(4,)](source, target, counts, count, 16)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int64], ids=str
)
def test_elements_are_counted_with_their_size(dtype):
    (source, target, counts), launch = copied(dtype)

    with counted({"source": source, "target": target, "counts": counts}) as seen:
        launch()

    assert seen.read == {"source": (16 + 4 + 8) * dtype.itemsize, "counts": 4 * 4}
    assert seen.written == {"target": 50 * dtype.itemsize}


def test_tensors_of_one_name_are_added_up():
    (source, target, _), launch = copied(torch.float32)

    with counted({"both": (source, target)}) as seen:
        launch()

    assert (seen.read, seen.written) == ({"both": 28 * 4}, {"both": 50 * 4})


def test_views_are_counted_apart():
    (source, target, _), launch = copied(torch.float32)

    with counted({"head": source[:10], "tail": source[10:], "untouched": torch.empty(64)}) as seen:
        launch()

    assert (seen.read, seen.written) == ({"head": 10 * 4, "tail": 18 * 4}, {})
    assert target[49] == 0  # stored, though masked when it was read


def test_nothing_is_counted_afterwards():
    (source, _, _), launch = copied(torch.float32)

    with counted({"source": source}) as seen:
        pass
    launch()

    assert seen.read == {}


def test_a_failure_inside_stops_the_counting():
    (source, _, _), launch = copied(torch.float32)

    with pytest.raises(ZeroDivisionError), counted({"source": source}) as seen:
        raise ZeroDivisionError
    launch()

    assert seen.read == {}


def test_tests_that_count_are_known_also_if_a_helper_does():
    assert counts(test_elements_are_counted_with_their_size)
    assert counts(lambda: test_elements_are_counted_with_their_size(torch.bool))
    assert not counts(copied)
    assert not counts(print)
