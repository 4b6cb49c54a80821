"""What is kept beside the highest scores is what the authors' own code kept, with the numbers that it drew."""

from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor

import kvpolicy
from kvpolicy.plan.compress.step import compress_one
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Scorer, View
from tests.golden.families import Vectors, cases, family_of, same
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_selection"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


@attrs.frozen(eq=False)
class Recorded(Scorer):
    """Scores that were recorded, [B, K, n], of the first n slots."""

    name: ClassVar[str] = "recorded"

    scores: Tensor

    def score(self, view: View) -> Tensor:
        missing = view.positions.shape[-1] - self.scores.shape[-1]
        return torch.nn.functional.pad(self.scores, (0, missing))


def kept_by(name: str, view: View, scores: Tensor, budget: int) -> Tensor:
    """Positions [B, K, budget] that the shipped policy keeps, given scores in place of its own."""
    spec = attrs.evolve(kvpolicy.load(name).spec, score=(Weighted(Recorded(scores)),))
    kept = compress_one(spec, view, [budget] * len(view.positions)).kept
    return view.positions.gather(-1, kept)


def entries_at(vectors: Tensor, positions: Tensor) -> Tensor:
    """Vectors [B, K, n, D] of the positions [B, K, n], of those of a whole sequence."""
    return vectors.gather(2, positions[..., None].expand(*positions.shape, vectors.shape[-1]))


def check_random_pp(v):
    """The code pins as much of the prompt as leaves room for one entry beside it; the policy pins all of it."""
    prompt, budget, residual, selected = (
        v.parameter(name) for name in ("prompt", "token_budget", "residual", "k_select")
    )
    keys, values = v["k"], v["v"]
    held = torch.arange(prompt).expand(*keys.shape[:2], prompt)
    lengths, events = [prompt], []
    for tokens in range(prompt + 1, prompt + len(v["cache_len_after_step"])):
        held = torch.cat([held, torch.full_like(held[..., :1], tokens - 1)], -1)
        if held.shape[-1] > budget and held.shape[-1] % residual == 0:
            same(held, v[f"positions_before_r{len(events)}"])
            pinned = held < min(prompt, selected - 1)
            entries = {"values": entries_at(values, held), "positions": held}
            view = view_of(entries_at(keys, held), **entries, recent=residual, pinned=pinned)
            held = kept_by("random", view, v[f"u_r{len(events)}"], budget)
            same(held, v[f"kept_positions_r{len(events)}"])
            events.append(tokens)
        lengths.append(held.shape[-1])
    same(torch.tensor(lengths), v["cache_len_after_step"])
    same(torch.tensor(events), v["trigger_total_len"])
    assert len(events) == v["rounds"]


def check_random_randkv(v):
    """A budget without the buffer; layers stand in the place of rows."""
    prompt, buffer, budget = (v.parameter(name) for name in ("prompt", "buffer", "budget"))
    v.parameter("seed"), v.text("p_request")  # of the draws, which are recorded
    held = torch.empty(v.parameter("layers"), v.parameter("heads"), 0, dtype=torch.int64)
    newest = -1
    for event, tokens in enumerate(v["trigger_total_len"].tolist()):
        new = torch.arange(newest + 1, tokens).expand(*held.shape[:2], -1)
        held, newest = torch.cat([held, new], -1), tokens - 1
        same(held, v[f"positions_before_r{event}"])
        view = view_of(torch.zeros(*held.shape, 1), positions=held, recent=buffer, pinned=held < prompt)
        drawn = (held[..., None] == v[f"drawn_positions_r{event}"][..., None, :]).any(-1)
        held = kept_by("random", view, drawn.float(), budget + buffer)
        same(held, v[f"kept_positions_r{event}"])
    assert event + 1 == v["rounds"]


CHECKS = {
    "random_pp": check_random_pp,
    "random_randkv": check_random_randkv,
}
