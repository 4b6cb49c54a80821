"""The merger `attention_matching` against least squares by numpy, head by head."""

import math

import numpy as np
import pytest
import torch

from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.mergers.attention_matching import AttentionMatching
from kvpolicy_plugins.shared.least_squares import ridge_towards, square_norm
from tests.support.views import view_of

DIM, GROUP, RECENT = 8, 2, 2
LENGTHS = torch.tensor([[20, 20], [20, 13], [9, 9]])


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(queries, *, votes=True):
    """Rows and heads of different lengths; the last row has had three queries."""
    slots = int(LENGTHS.max())
    newest = LENGTHS.amax(1, keepdim=True) - 1
    places = newest - torch.arange(queries - 1, -1, -1)
    places[2, : max(0, queries - 3)] = -1
    return view_of(
        normal(1, *LENGTHS.shape, slots, DIM),
        queries=normal(2, 3, 2 * GROUP, queries, DIM),
        query_positions=places,
        values=normal(3, *LENGTHS.shape, slots, DIM),
        lengths=LENGTHS,
        recent=RECENT,
        log_votes=normal(4, *LENGTHS.shape, slots).abs() if votes else None,
    )


def kept_of(view):
    return indices_of(view.protected | (view.candidates & (view.positions % 3 == 1)))


def near(matrix, target, prior, ridge):
    """Minimises |A X - target|² + ridge |A|² |X - prior|²: as one system of equations."""
    strength = math.sqrt(ridge) * np.linalg.norm(matrix, 2)
    stacked = np.concatenate([matrix, strength * np.eye(matrix.shape[1])])
    wanted = np.concatenate([target, strength * prior])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0] if ridge else prior + np.linalg.pinv(matrix) @ (
        target - matrix @ prior
    )  # fmt: skip


def expected(view, row, head, kept, merger):
    """Log-votes and values of the candidates that stay, by one head alone in float64."""
    candidates = [slot for slot in range(view.keys.shape[2]) if view.candidates[row, head, slot]]
    stay = [slot for slot in kept if slot in candidates]
    keys, values = view.keys[row, head].double().numpy(), view.values[row, head].double().numpy()
    votes = view.log_votes[row, head].double().numpy() if view.log_votes is not None else np.zeros(len(keys))
    logits = []
    for query_head in range(head * GROUP, (head + 1) * GROUP):
        for query, place in zip(
            view.queries[row, query_head].double().numpy(), view.query_positions[row].tolist(), strict=True
        ):
            if place >= 0:
                seen = [
                    keys[slot] @ query / math.sqrt(DIM) + votes[slot] if slot <= place else -np.inf
                    for slot in candidates
                ]
                logits.append(seen)
    logits = np.array(logits)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    own = [candidates.index(slot) for slot in stay]
    matrix, mass = exponentials[:, own], exponentials.sum(1)
    factors = near(matrix, mass[:, None], np.ones((len(own), 1)), merger.ridge)[:, 0]
    factors = factors.clip(math.exp(-merger.bound), math.exp(merger.bound))
    weights = matrix * factors / (matrix * factors).sum(1, keepdims=True)
    outputs = exponentials / mass[:, None] @ values[candidates]
    return stay, votes[stay] + np.log(factors), near(weights, outputs, values[stay], merger.ridge)


@pytest.mark.parametrize("votes", [True, False])
@pytest.mark.parametrize(("queries", "ridge"), [(2, 0.01), (2, 0.0), (12, 0.1), (6, 0.01)])
def test_each_head_is_fitted_for_itself(queries, ridge, votes):
    view, merger = held(queries, votes=votes), AttentionMatching(ridge=ridge, iterations=0)
    kept = kept_of(view)
    entries = merger.merge(view, kept)

    for row, head in np.ndindex(*LENGTHS.shape):
        slots = [slot for slot in kept[row, head].tolist() if slot >= 0]
        stay, own_votes, own_values = expected(view, row, head, slots, merger)
        at = [slots.index(slot) for slot in stay]
        assert entries.changed[row, head].nonzero()[:, 0].tolist() == at
        # The norm of a matrix is found by power iteration, from below; it is what the ridge is relative to.
        np.testing.assert_allclose(entries.log_votes[row, head, at], own_votes, atol=2e-3 if ridge else 1e-4)
        np.testing.assert_allclose(
            entries.values[row, head, at], own_values, atol=5e-3 if ridge else 1e-3 * abs(own_values).max()
        )


def test_the_output_for_the_window_is_nearer_than_that_of_the_kept_entries_alone():
    view = held(12, votes=False)
    kept = kept_of(view)
    errors = {}
    for ridge in (0.0, 0.01, 1e6):
        entries = AttentionMatching(ridge=ridge).merge(view, kept)
        errors[ridge] = error(view, kept, entries)
    assert errors[0.0] < errors[0.01] < 0.8 * errors[1e6]


def error(view, kept, entries):
    """Of the first row and head, squared, over what is not protected."""
    queries = view.queries[0, :GROUP].flatten(0, 1) / math.sqrt(DIM)
    inside = view.candidates[0, 0]
    wanted = (queries @ view.keys[0, 0, inside].T).softmax(-1) @ view.values[0, 0, inside]
    stays = inside[kept[0, 0]]
    logits = queries @ entries.keys[0, 0, stays].T + entries.log_votes[0, 0, stays]
    return float((logits.softmax(-1) @ entries.values[0, 0, stays] - wanted).square().sum())


def test_votes_stay_within_the_bound_and_steps_towards_the_minimum_improve_them():
    view = held(12)
    kept = kept_of(view)
    before = view.log_votes.gather(2, kept.clamp(min=0))
    for bound in (0.0, 0.1, 3.0):
        added = (AttentionMatching(ridge=0, bound=bound).merge(view, kept).log_votes - before)[kept >= 0]
        assert added.abs().max() <= bound + 1e-5
    logits = normal(5, 30, 12).double()
    own = logits[:, :4]
    matrix = (own - logits.amax(1, keepdim=True)).exp()
    mass = (logits - logits.amax(1, keepdim=True)).exp().sum(1)
    wrong = [
        float((matrix @ AttentionMatching(0, 0.5, steps).factors(logits, own) - mass).norm()) for steps in (0, 2, 20)
    ]
    assert wrong[0] >= wrong[1] >= wrong[2]


def test_heads_that_lose_nothing_stay_bit_for_bit():
    view = held(4)
    mask = view.valid.clone()
    mask[0, 0, 3:9] = False
    kept = indices_of(mask)
    entries = AttentionMatching().merge(view, kept)

    assert entries.changed[0, 0, 3]
    assert entries.changed.any(-1).tolist() == [[True, False], [False, False], [False, False]]
    for row, head in np.ndindex(*LENGTHS.shape):
        count = int(mask[row, head].sum())
        if (row, head) != (0, 0):
            assert torch.equal(entries.values[row, head, :count], view.values[row, head, :count])
            assert torch.equal(entries.log_votes[row, head, :count], view.log_votes[row, head, :count])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_of_many_solutions_the_nearest_is_found(shape):
    matrix = normal(6, *shape).double().abs()
    matrix[:, 1] = matrix[:, 0]  # a column twice
    matrix = torch.cat([matrix, torch.zeros(2, shape[1], dtype=torch.float64)])
    target, prior = normal(7, shape[0] + 2, 3).double(), normal(8, shape[1], 3).double()
    found = ridge_towards(matrix, target, prior, 0.0, square_norm(matrix))

    nearest = prior + torch.linalg.pinv(matrix) @ (target - matrix @ prior)
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-4)  # as far as the penalty allows


def test_the_norm_of_a_matrix():
    matrix = normal(9, 3, 7, 5).double().abs()
    exact = torch.linalg.matrix_norm(matrix, 2).square()
    torch.testing.assert_close(square_norm(matrix, iterations=30), exact)
    assert (square_norm(matrix) <= exact + 1e-9).all()
    assert square_norm(torch.zeros(4, 3, dtype=torch.float64)) == 0
