"""The ring gives what a list of the newest queries gives."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.integrations.transformers.decode_graph.query_ring import QueryRing


@given(size=st.integers(1, 5), before=st.integers(0, 7), pushed=st.integers(0, 12))
def test_the_newest_queries_oldest_first(size, before, pushed):
    total = before + pushed
    queries, positions = torch.randn(2, 3, total, 4), torch.arange(total, dtype=torch.int32).expand(2, -1)
    ring = QueryRing.empty(size, (2, 3, 4), torch.float32, torch.device("cpu"))
    first = max(0, before - size)
    ring.fill(queries[:, :, first:before], positions[:, first:before])
    for at in range(before, total):
        ring.push(queries[:, :, at : at + 1], positions[:, at])
    held, places = ring.ordered()
    count = min(size, total)
    assert torch.equal(held[:, :, size - count :], queries[:, :, total - count :])
    assert places.tolist() == [[-1] * (size - count) + list(range(total - count, total))] * 2


def test_what_the_ring_held_before_is_forgotten():
    ring = QueryRing.empty(3, (1, 1, 2), torch.float32, torch.device("cpu"))
    for at in range(4):
        ring.push(torch.ones(1, 1, 1, 2), torch.tensor([at], dtype=torch.int32))
    ring.fill(torch.zeros(1, 1, 1, 2), torch.tensor([[7]], dtype=torch.int32))
    assert ring.ordered()[1].tolist() == [[-1, -1, 7]]
