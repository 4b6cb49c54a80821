"""Strategies: layers of any shape, and scores with everything that makes comparison hard."""

import attrs
import torch
from hypothesis import strategies as st

from kvpolicy.stages import View
from tests.support.views import view_of

HARD = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-42, -1e-42, 3.4e38, -3.4e38)


def _normal(random, *shape):
    return torch.randn(*shape, generator=random)


def _clustered(random, *shape):
    centres = torch.randn(*shape[:-2], 3, shape[-1], generator=random)
    return centres[..., torch.randint(3, shape[-2:-1], generator=random), :] + 0.3 * _normal(random, *shape)


def _one_hot(random, *shape):
    return torch.eye(shape[-1])[torch.randint(shape[-1], shape[:-1], generator=random)]


CONTENTS = {
    "normal": _normal,
    "clustered": _clustered,
    "whole numbers": lambda random, *shape: _normal(random, *shape).round(),
    "one hot": _one_hot,
    "all equal": lambda random, *shape: torch.ones(shape),
    "zero": lambda random, *shape: torch.zeros(shape),
    "tiny": lambda random, *shape: 1e-40 * _normal(random, *shape),
}
generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def layers(draw, contents=tuple(CONTENTS), most=80):
    """Views of B 1-3, K 1-4, G 1-4, T 1-80, D 16, 32 or 59, with empty slots, queries and attention."""
    batch, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slots, dim = draw(st.integers(1, most)), draw(st.sampled_from((16, 32, 59)))
    random = draw(generators)
    make = CONTENTS[draw(st.sampled_from(contents))]
    lengths = torch.full((batch, heads), slots)
    if draw(st.booleans()):
        lengths = torch.randint(1, slots + 1, (batch, draw(st.sampled_from((1, heads)))), generator=random)
    return view_of(
        make(random, batch, heads, slots, dim),
        values=_normal(random, batch, heads, slots, dim),
        queries=_normal(random, batch, heads * group, draw(st.integers(1, 9)), dim),
        lengths=lengths.expand(batch, heads),
        attention=torch.rand(batch, heads, group, slots, generator=random),
        sinks=draw(st.integers(0, 4)),
        recent=draw(st.integers(0, 9)),
    )


@st.composite
def scored(draw):
    """Scores [B, K, T], hard to compare, and candidates of the same shape."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 80))
    random = draw(generators)
    scores = torch.randn(shape, generator=random)
    kind = draw(st.sampled_from(("ordinary", "ties", "hard", "plateaus")))
    if kind == "ties":
        scores = scores.round()
    if kind == "hard":
        scores = torch.tensor(HARD)[torch.randint(len(HARD), shape, generator=random)]
    if kind == "plateaus":
        scores = torch.nn.functional.max_pool1d(scores, 7, 1, 3)
    share = draw(st.sampled_from((0.0, 0.5, 0.9, 1.0)))
    return scores, torch.rand(shape, generator=random) < share


def row_alone(view: View, row: int) -> View:
    """One row of a view, in a tensor of its own length."""
    slots = max(1, int(view.lengths[row].max()))
    held = ("keys", "values", "positions")
    return attrs.evolve(
        view,
        **{name: getattr(view, name)[[row], :, :slots] for name in held},
        queries=view.queries[[row]],
        attention=view.attention[[row]][..., :slots],
        slot_state={name: state[[row], :, :slots] for name, state in view.slot_state.items()},
    )
