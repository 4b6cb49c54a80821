"""Layers with votes, and what the properties of mergers that keep them are checked with."""

import attrs
import torch
from hypothesis import strategies as st

from kvpolicy.stages import QueryLogits
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.shared.merge_groups import (
    evicted_of,
    groups_of,
    nearest,
    to_float,
)
from kvpolicy_plugins.mergers.window_fit import WindowFit
from tests.property.layers import layers
from tests.support.views import fresh_state

CONTENTS = ("normal", "clustered", "one hot", "all equal", "zero")
KEYS = ("scale", "additive", "bias")
views = layers(CONTENTS, most=40)
keepkvs = st.builds(
    KeepKV,
    st.sampled_from((-1.0, 0.0, 0.8)),
    alpha=st.sampled_from((0.0, 0.9)),
    window=st.integers(1, 5),
    key=st.sampled_from((*KEYS, "mean")),
    fallback=st.sampled_from(KEYS[1:]),
    estimate=st.sampled_from(("ema", "window")),
)
mean_fits = st.one_of(
    st.builds(
        WindowFit, st.just("cosine"), st.sampled_from((-1.0, 0.3)), st.sampled_from((0.0, 1.0)), st.integers(0, 3)
    ),
    st.builds(WindowFit, st.just("ward"), attended=st.sampled_from((0.0, 1.0))),
)
window_fits = mean_fits | st.builds(
    WindowFit, values=st.just("solve"), ridge=st.sampled_from((0.01, 1.0)), queries=st.integers(0, 3)
)


def some_kept(view, random, share=0.4):
    """Keep indices of at least one entry of each head that has any."""
    mask = torch.rand(view.positions.shape, generator=random) < share
    return indices_of(view.valid & (mask | (view.positions == 0)))


def with_votes(view, random, precise=torch.float64):
    """The view in another dtype, with random votes, and junk where nothing is held."""
    votes = 1 + torch.randint(5, view.positions.shape, generator=random).to(precise)
    empty = ~view.valid

    def dirty(entries):
        return entries.to(precise).masked_fill(empty[..., None], 1e3)

    return attrs.evolve(
        view,
        keys=dirty(view.keys),
        values=dirty(view.values),
        queries=view.queries.to(precise),
        log_votes=votes.log().masked_fill(empty, 50.0),
    )


def raw_logits(view, queries):
    """[B, K, G, W, T] of queries [B, K, G, W, D], -inf where nothing is held."""
    logits = queries.to(view.keys.dtype) @ view.keys[:, :, None].transpose(-1, -2) * view.scaling
    return logits.masked_fill(~view.valid[:, :, None, None], -torch.inf)


def observed(merger, view, queries):
    """The view after a forward of `queries` [B, K, G, W, D] that see everything."""
    logits = to_float(raw_logits(view, queries))
    state = {name: one.to(logits.dtype) for name, one in fresh_state(merger, view).items()}
    return attrs.evolve(view, slot_state={**state, **merger.observe_forward(QueryLogits(logits), state)})


def attend(queries, keys, values, log_votes):
    """Output [B, K, G, D] of queries [B, K, G, D], and the log-sum-exp; entries with a log-vote of -inf are hidden."""
    logits = queries @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5 + log_votes[:, :, None]
    return logits.softmax(-1).nan_to_num() @ values, logits.logsumexp(-1)


def members_of(view, kept, threshold):
    evicted = evicted_of(view, kept)
    similarity, place = nearest(view.keys, kept, evicted)
    return groups_of(kept, evicted & ((similarity >= threshold) | (threshold == -1)), place)


def hidden(log_votes, shown):
    return log_votes.masked_fill(~shown, -torch.inf)


def layer_queries(view):
    return view.queries.unflatten(1, (view.keys.shape[1], -1))
