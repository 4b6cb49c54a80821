"""Entries chosen by the mass that is left: against loops over heads in numpy, and what happens at the edges."""

import math

import attrs
import numpy as np
import pytest
import torch

from kvpolicy.stages import SelectionRequest
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.selectors.omp import OMP
from tests.support.views import view_of

ROWS, HEADS, GROUP, SLOTS, DIM, QUERIES, RECENT = 2, 3, 2, 30, 6, 8, 4
PLAIN = OMP(QUERIES, ridge=0, drop_below=-27)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def held(seed=0, **changes):
    """Rows of different lengths; with votes."""
    given = {
        "queries": 2 * normal(ROWS, HEADS * GROUP, QUERIES, DIM, seed=seed),
        "lengths": torch.tensor([[SLOTS] * HEADS, [SLOTS - 7] * HEADS]),
        "log_votes": normal(ROWS, HEADS, SLOTS, seed=seed + 1).abs(),
        "recent": RECENT,
    }
    return view_of(normal(ROWS, HEADS, SLOTS, DIM, seed=seed + 2), **{**given, **changes})


def exponentials_of(view, row, head):
    """[n, T] of the candidates of a head, float64, and their slots."""
    slots = view.candidates[row, head].nonzero()[:, 0].tolist()
    keys, votes = view.keys[row, head, slots].double().numpy(), view.log_votes[row, head, slots].double().numpy()
    queries = view.queries[row, head * GROUP : (head + 1) * GROUP].flatten(0, 1).double().numpy()
    newest = int(view.positions[row].max())
    asked = np.tile(np.arange(newest - QUERIES + 1, newest + 1), GROUP)
    logits = queries @ keys.T / math.sqrt(DIM) + votes
    logits[view.positions[row, head, slots].numpy() > asked[:, None]] = -np.inf
    return np.exp(logits - logits.max(1, keepdims=True)), slots


def pursued(matrix, count, selector):
    """The columns in the order in which they are chosen."""
    mass, chosen, lost = matrix.sum(1), [], []

    def factors():
        part = matrix[:, chosen]
        start = np.ones(len(chosen))
        found = start + np.linalg.pinv(part) @ (mass - part @ start) if chosen else start
        return found.clip(1e-12, math.exp(selector.bound))

    for last in (False, False, False, True):
        left, steps = mass - matrix[:, chosen] @ factors(), 0
        while len(chosen) < min(count, matrix.shape[1] - len(lost)):
            worth = left @ matrix
            free = [column for column in range(matrix.shape[1]) if column not in chosen + lost]
            best = sorted(free, key=lambda column: (-worth[column], column))
            chosen += best[: min(selector.per_step, count - len(chosen))]
            steps += 1
            if steps % selector.refit_every == 0:
                left = mass - matrix[:, chosen] @ factors()
        weak = [one for one, factor in zip(chosen, factors(), strict=True) if factor < math.exp(selector.drop_below)]
        if last or not weak:
            break
        lost += weak
        chosen = [column for column in chosen if column not in weak]
    return chosen


VARIANTS = [{}, {"per_step": 3}, {"refit_every": 2}, {"per_step": 2, "refit_every": 3}, {"drop_below": 0.0}]


@pytest.mark.parametrize("changes", VARIANTS, ids=repr)
def test_each_head_chooses_for_itself_in_order(changes):
    """Where too few are left because others were too weak, the highest scores of the rest stay, too."""
    selector, short = attrs.evolve(PLAIN, **changes), 0
    counts = torch.tensor([[5, 0, 14], [1, 12, 7]])
    for seed in range(3):
        view, scores = held(seed), normal(ROWS, HEADS, SLOTS, seed=9)
        exponentials = selector.second_scores(view)
        picks = selector.picks(exponentials.flatten(0, 1), view.candidates.flatten(0, 1), counts.flatten())
        picks = picks.view(ROWS, HEADS, -1)
        chosen = selector.select(SelectionRequest.of(view, scores, counts, exponentials))
        for row, head in np.ndindex(ROWS, HEADS):
            matrix, slots = exponentials_of(view, row, head)
            count = int(counts[row, head])
            expected = [slots[column] for column in pursued(matrix, count, selector)]
            assert [slot for slot in picks[row, head].tolist() if slot >= 0] == expected
            rest = sorted(set(slots) - set(expected), key=lambda slot: -scores[row, head, slot])
            short += count - len(expected)
            kept = sorted(expected + rest[: count - len(expected)])
            assert chosen[row, head].nonzero()[:, 0].tolist() == kept
    assert short > 5 or "drop_below" not in changes


def test_less_of_the_mass_is_left_than_by_the_highest_attention():
    """Which is what it is for; by the best factors of either choice."""
    view, count = held(), 8
    counts = torch.full((ROWS, HEADS), count)
    scores = Attention(QUERIES, "candidates", "rms", "scores", "rms").score(view)
    pursuit = PLAIN.select(SelectionRequest.of(view, scores, counts, PLAIN.second_scores(view)))
    left, theirs = 0.0, 0.0
    for row, head in np.ndindex(ROWS, HEADS):
        matrix, slots = exponentials_of(view, row, head)
        highest = np.argsort(-scores[row, head, slots].numpy())[:count]
        left += residual(matrix, [slots.index(slot) for slot in pursuit[row, head].nonzero()[:, 0].tolist()])
        theirs += residual(matrix, highest)
    assert left < 0.9 * theirs


def residual(matrix, columns):
    part, mass = matrix[:, columns], matrix.sum(1)
    return np.linalg.norm(mass - part @ np.linalg.lstsq(part, mass, rcond=None)[0])


def asked(scores, counts, exponentials, candidates=None):
    candidates = torch.ones(scores.shape, dtype=torch.bool) if candidates is None else candidates
    positions = torch.arange(scores.shape[-1]).expand(scores.shape)
    return SelectionRequest(scores, candidates, torch.tensor(counts), positions, second_scores=exponentials)


def test_what_is_not_finite_and_what_is_not_scored():
    exponentials = normal(1, 1, 6, 5).abs()
    scores = torch.tensor([[[0.1, torch.nan, 0.3, 0.2, torch.nan]]])
    assert PLAIN.select(asked(scores, [[3]], exponentials))[0, 0].tolist() == [True, False, True, True, False]
    assert PLAIN.select(asked(scores, [[4]], exponentials))[0, 0].tolist() == [True, True, True, True, False]
    scores = torch.arange(5.0)[None, None]
    clean = PLAIN.select(asked(scores, [[2]], exponentials[:, :, 1:]))
    spoilt = exponentials.clone()
    spoilt[0, 0, 0, 3] = torch.nan
    assert torch.equal(PLAIN.select(asked(scores, [[2]], spoilt)), clean)
    assert PLAIN.select(asked(scores, [[2]], spoilt * torch.nan)).sum() == 2


def test_all_stay_where_as_many_are_asked_for_and_none_where_none_is():
    scores, exponentials = normal(1, 2, 5), normal(1, 2, 4, 5).abs()
    assert PLAIN.select(asked(scores, [[5, 0]], exponentials)).tolist() == [[[True] * 5, [False] * 5]]


def test_equal_columns_go_by_position():
    scores, exponentials = torch.arange(1000.0)[None, None], torch.ones(1, 1, 3, 1000)
    chosen = attrs.evolve(PLAIN, per_step=3).select(asked(scores, [[3]], exponentials))
    assert chosen[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_a_ridge_goes_on_choosing_behind_the_first_n():
    """Of 2 queries nothing would be left of the mass behind two entries but rounding."""
    matrix = normal(1, 2, 20).abs()
    everything, count = torch.ones(1, 20, dtype=torch.bool), torch.tensor([12])
    picks = attrs.evolve(PLAIN, ridge=0.1).picks(matrix, everything, count)[0].tolist()
    numbers, chosen = matrix[0].double().numpy(), []
    for _ in range(12):
        part = numbers[:, chosen]
        strength = math.sqrt(0.1) * (np.linalg.norm(part, 2) if chosen else 1.0)
        system = np.concatenate([part, strength * np.eye(len(chosen))])
        wanted = np.concatenate([numbers.sum(1), strength * np.ones(len(chosen))])
        factors = np.linalg.lstsq(system, wanted, rcond=None)[0].clip(1e-12)
        worth = (numbers.sum(1) - part @ factors) @ numbers
        assert worth.max() > 0.1
        chosen.append(max((column for column in range(20) if column not in chosen), key=lambda column: worth[column]))
    assert picks == chosen


def test_it_must_be_told():
    with pytest.raises(ValueError, match="give it what its second_scores returned"):
        PLAIN.select(asked(normal(1, 1, 4), [[2]], None))
