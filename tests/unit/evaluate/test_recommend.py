"""What is recommended: the bound of conformal risk control, and choices from measured lines."""

import random
from fractions import Fraction

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig

import kvpolicy
from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.harness.record import Cell
from kvpolicy.evaluate.harness.run import Unit
from kvpolicy.evaluate.harness.setup import Contender
from kvpolicy.evaluate.recommend.candidates import memory_of
from kvpolicy.evaluate.recommend.choose import choose_by_bound, choose_by_bytes
from kvpolicy.evaluate.recommend.risk import fewest_pieces, smallest_share

SHARES = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))


@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=3, max_size=3), st.floats(0.01, 0.5))
def test_the_share_is_the_smallest_that_the_theorem_allows(rows, bound):
    """Against the formula, written out for each share with losses made monotone one by one."""
    losses = {float(share): row for share, row in zip(SHARES, rows, strict=True)}
    found = smallest_share(losses, bound)
    expected = None
    for index, share in enumerate(SHARES):
        worst = [max(min(rows[i][piece], 5 * bound) for i in range(index + 1)) for piece in range(6)]
        if (sum(worst) + 5 * bound) / 7 <= bound:
            expected = float(share)
        else:
            break

    assert (None if found is None else found.share) == expected


def test_the_bound_holds_on_average_over_texts():
    """2,000 draws of pieces with heavy losses: the clipped loss of the next one is below the bound on average."""
    rng, bound, shares = random.Random(0), 0.1, (0.5, 0.25, 0.125)  # noqa: S311 - makes losses

    def piece():
        scale = rng.expovariate(1)
        return [scale * factor for factor in (0.02, 0.05, 0.3)]

    next_losses = []
    for _ in range(2000):
        pieces = [piece() for _ in range(12)]
        found = smallest_share({share: [one[i] for one in pieces] for i, share in enumerate(shares)}, bound)
        if found is not None:
            next_losses.append(min(piece()[shares.index(found.share)], 5 * bound))
        else:
            next_losses.append(0.0)

    assert 0.01 < sum(next_losses) / len(next_losses) <= bound


def test_too_few_pieces_bound_nothing():
    """Even when they lose nothing."""
    few = [0.0] * (fewest_pieces() - 1)

    assert smallest_share({0.5: few}, 0.1) is None
    assert smallest_share({0.5: [0.0] * fewest_pieces()}, 0.1).share == 0.5


class Measured:
    """Stands for an evaluation: its cells are made up by a function of policy, share and piece."""

    def __init__(self, kl, held=lambda _name, share: share, pieces=12):
        self.kl, self.held, self.pieces = kl, held, pieces
        self.measured = []

    def units(self):
        policies = [attrs.evolve(kvpolicy.load(name)) for name in ("snapkv", "rkv")]
        some = tuple(Contender(policy, share) for share in SHARES for policy in policies)
        return [
            Unit("text", group, (Contender(), Contender(kvpolicy.load("kivi4")), *some)) for group in range(self.pieces)
        ]

    def run(self, units):
        self.measured += [(unit.group, one.label) for unit in units for one in unit.contenders]
        return [self._cell(unit.group, *one.key) for unit in units for one in unit.contenders]

    def _cell(self, group, name, share):
        held = 1.0 if name == "full cache" else self.held(name, 0.4 if share is None else share)
        values = {"kl": [0.0 if name == "full cache" else self.kl(name, share, group)]}
        return Cell("text", group, name, share, values, held_bytes=1000 * held, full_bytes=1000)


def test_by_bytes_the_least_divergence_that_fits():
    """What takes more than there is room for is shown and not chosen; what cannot be told apart is named."""
    measured = Measured(
        lambda name, share, group: {"kivi4": 0.0, "snapkv": 0.1, "rkv": 0.11}[name] + 0.05 * (group % 3)
    )
    choice = choose_by_bytes(
        Measured(measured.kl),
        lambda units: [cell for cell in measured.run(units) if cell.share in (None, 0.25)],
        Fraction(1, 4),
    )

    assert (choice.policy, choice.share) == ("snapkv", Fraction(1, 4))
    assert [line.policy for line in choice.lines] == ["snapkv", "rkv", "kivi4"]
    assert choice.same == ()


def test_by_bytes_near_ties_are_named():
    """One is better on some pieces, the other on others."""
    measured = Measured(
        lambda name, share, group: 0.1 + 0.05 * ((group + (name == "rkv")) % 2) + 0.001 * (name == "rkv")
    )
    choice = choose_by_bytes(
        measured, lambda units: [cell for cell in measured.run(units) if cell.share == 0.25], Fraction(1, 4)
    )

    assert choice.same == ("rkv",)


def test_nothing_fits():
    """One line."""
    measured = Measured(lambda *_: 0.1, held=lambda name, share: 0.9)
    with pytest.raises(EvaluationError, match=r"no policy fits into 0\.25 of a full cache"):
        choose_by_bytes(measured, measured.run, Fraction(1, 4))


def test_by_bound_one_half_chooses_and_the_other_confirms():
    """The policy that holds least, and of its shares the smallest that the other pieces allow."""
    measured = Measured(lambda name, share, group: {"kivi4": 0.01, "snapkv": 0.002, "rkv": 0.2}[name] / (share or 1))
    choice = choose_by_bound(measured, measured.run, 0.05)
    second = {label for group, label in measured.measured if group >= 6 and label != "full cache"}

    assert (choice.policy, choice.share) == ("snapkv", Fraction(1, 8))
    assert second == {"snapkv 50%", "snapkv 25%", "snapkv 12.5%"}
    assert choice.risk.pieces == 6
    assert choice.risk.mean == pytest.approx(0.016)


def test_no_share_is_confirmed_that_was_not_below_the_bound_where_it_was_chosen():
    measured = Measured(lambda name, share, group: {"kivi4": 0.1, "snapkv": 0.008, "rkv": 0.2}[name] / (share or 1))
    choice = choose_by_bound(measured, measured.run, 0.05)

    assert choice.share == Fraction(1, 2)
    assert {label for group, label in measured.measured if group >= 6} == {"snapkv 50%", "snapkv 25%"}


def test_what_is_far_from_the_bound_is_measured_on_few_pieces():
    """And larger caches than one that is far below it on no more."""
    measured = Measured(lambda name, share, group: {"kivi4": 0.01, "snapkv": 0.002, "rkv": 0.2}[name] / (share or 1))
    choose_by_bound(measured, measured.run, 0.05)
    later = {label for group, label in measured.measured if 2 <= group < 6}

    assert later == {"snapkv 12.5%", "snapkv 25%"}
    assert {label for group, label in measured.measured if group < 2} > {"rkv 50%", "kivi4", "snapkv 50%"}


def test_what_was_promising_and_is_not_below_the_bound_leaves_larger_caches_to_be_measured():
    """The smaller cache is far below it on the first two pieces alone."""
    measured = Measured(
        lambda name, _, group: (
            0.01 + 0.03 * (group < 6) if name == "kivi4" else 0.01 if group < 2 and name == "snapkv" else 1
        )
    )
    choice = choose_by_bound(measured, measured.run, 0.05)

    assert choice.policy == "kivi4"
    assert {len(line.groups) for line in choice.lines if line.policy == "rkv"} == {2}


def test_what_was_chosen_by_luck_is_not_confirmed():
    """The second half diverges."""
    measured = Measured(lambda name, share, group: 0.001 if group < 6 else 1.0)
    with pytest.raises(EvaluationError, match="6 further pieces do not confirm it"):
        choose_by_bound(measured, measured.run, 0.05)


def test_no_policy_and_too_few_pieces():
    """Both are said before anything is chosen."""
    with pytest.raises(EvaluationError, match=r"no policy has a mean KL divergence of at most 0\.05"):
        choose_by_bound(measured := Measured(lambda *_: 1.0), measured.run, 0.05)
    with pytest.raises(EvaluationError, match="a bound needs at least 10 pieces of text: 8"):
        choose_by_bound(measured := Measured(lambda *_: 0.0, pieces=8), measured.run, 0.05)


def test_memory_is_counted_with_the_layers_that_stay():
    """Bytes of a full cache by hand: two layers, one of them with a window of 16 tokens."""
    config = Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    plan = kvpolicy.load("full").compile(config, dtype=torch.bfloat16)
    token = 2 * 2 * 16 * 2  # key and value, heads, dimensions, bytes of a number
    room = memory_of(plan, config, 300_000, 1024, 4)

    assert (room.full_bytes, room.other_bytes) == (4 * 1024 * token, 4 * 16 * token)
    assert room.share == Fraction(300_000 - 4 * 16 * token, 4 * 1024 * token)
    assert not room.is_enough
    assert memory_of(plan, config, 4 * 1040 * token, 1024, 4).is_enough
    with pytest.raises(EvaluationError, match="--memory: layers with a sliding window alone take 8192 bytes: 8000"):
        memory_of(plan, config, 8000, 1024, 4)
    with pytest.raises(EvaluationError, match="--context 5000: the model knows 4096 positions"):
        memory_of(plan, config, 2**20, 5000, 1)
