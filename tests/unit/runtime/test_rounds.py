"""What the layers of one step share."""

import torch

from kvpolicy.runtime.rounds import Round
from tests.driving import worth_plan


def test_positions_are_those_of_the_tokens_that_arrive():
    """Made once for all layers of a step, and anew for other tokens or rows."""
    shared, cpu = Round(worth_plan(), waits=False), torch.device("cpu")
    first = shared.positions([3, 0], 2, cpu)
    assert first.tolist() == [[3, 4], [0, 1]]
    assert first.dtype == torch.int32
    assert shared.positions([3, 0], 2, cpu) is first
    assert shared.positions([3, 0], 1, cpu).tolist() == [[3], [0]]
    assert shared.positions([4], 1, cpu).tolist() == [[4]]
