"""CAKE's shares where preferences say nothing."""

import pytest
import torch

from kvpolicy.stages import AllocationRequest
from kvpolicy_plugins.allocators.cake import Cake


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_whose_attention_is_faulty_divides_equally_and_leaves_others_alone(wrong):
    statistics = torch.tensor([[0.0, 1.0], [wrong, 3.0], [0.0, 2.0]])[..., None].expand(3, 2, 2)  # [L, B, K]
    room = torch.full((3, 2, 2), 10)
    request = AllocationRequest(
        room, torch.tensor([24, 24]), torch.zeros_like(room), torch.tensor([10, 10]), statistics=statistics
    )
    counts = Cake().allocate(request)

    assert counts[:, 0].tolist() == [[4, 4]] * 3
    assert counts.sum((0, 2)).tolist() == [24, 24]
    assert counts[0, 1, 0] < counts[2, 1, 0] < counts[1, 1, 0]
