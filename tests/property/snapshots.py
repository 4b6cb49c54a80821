"""What a layer holds before a forward, as plain tensors in float64, and what a forward must then give: brute force."""

import math

import torch

from tests.support import driving
from tests.support.storage import STATES, segments_of

SCALING = driving.DIM**-0.5  # that of `feed`
ESTIMATE = "merge.log_estimate"
SAMPLES = "merge.samples"
SCORE = "merge.log_score_"


class Forward:
    """The queries [B, H, q, D] of one forward and their positions [B, q]."""

    def __init__(self, queries, positions):
        self.queries, self.positions = queries.double(), positions

    def of_rows(self, rows):
        """The rows named."""
        return Forward(self.queries[rows], self.positions[rows])

    def oldest(self, count):
        """The first `count` queries."""
        return Forward(self.queries[:, :, :count], self.positions[:, :count])


def held_by(layer):
    """[row][head] of the columns, keys and values of a layer, copied, pads left out."""
    heads, names = range(layer.plan.geometry.kv_heads), (*STATES, *layer.plan.columns)
    held = []
    for row in range(len(layer.num_tokens)):
        columns = {name: segments_of(layer.storage, name, row) for name in names}
        held.append([_without_pads({name: columns[name][head] for name in names}) for head in heads])
    return held


def nothing(plan, rows):
    """The same for an empty layer."""
    shapes = {name: column.shape for name, column in plan.columns.items()}
    shapes |= dict.fromkeys(STATES, (plan.geometry.head_dim,))
    one = {name: torch.zeros(0, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    return [[dict(one) for _ in range(plan.geometry.kv_heads)] for _ in range(rows)]


def _without_pads(one):
    real = one["positions"] >= 0
    return {name: column[real].double() for name, column in one.items()}


def appended(held, plan, forward, keys, values):
    """`held` with the new entries [B, K, q, D] behind."""
    after = []
    for row, segments in enumerate(held):
        real = forward.positions[row] >= 0
        new = {"positions": forward.positions[row][real].double()}
        line = []
        for head, one in enumerate(segments):
            new |= {"keys": keys[row, head][real].double(), "values": values[row, head][real].double()}
            fills = {name: column.fill for name, column in plan.columns.items()}
            filled = {
                name: new.get(name, one[name].new_full((int(real.sum()), *one[name].shape[1:]), fills.get(name, 0.0)))
                for name in one
            }
            line.append({name: torch.cat([one[name], filled[name]]) for name in one})
        after.append(line)
    return after


def attention(held, forward):
    """[B, H, q, D] float64 over held entries at or before the queries, log-votes added; zeros for pads."""
    out = torch.zeros_like(forward.queries)
    for row, heads in enumerate(held):
        positions = forward.positions[row][:, None]
        for head, queries in enumerate(forward.queries[row]):
            one = heads[head // (forward.queries.shape[1] // len(heads))]
            seen = (one["positions"] <= positions) & (positions >= 0)
            logits = queries @ one["keys"].T * SCALING + one.get("log_votes", 0.0)
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            out[row, head] = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ one["values"]
    return out


def update_observers(held, forward, merge):
    """Bring the state of the merger up to date, query by query: only the newest `window` of each row count."""
    for row, segments in enumerate(held):
        real = (forward.positions[row] >= 0).nonzero()[:, 0].tolist()[-merge.window :]
        group = forward.queries.shape[1] // len(segments)
        for head, one in enumerate(segments):
            for place in real:
                own = forward.queries[row, head * group : (head + 1) * group, place]
                scores = (own @ one["keys"].T * SCALING).exp().mean(0)
                seen = one["positions"] <= forward.positions[row, place]
                _FOLLOWED[merge.estimate](one, scores.where(seen, 0.0), seen.double(), merge)


def _moving_average(one, scores, seen, merge):
    decay = merge.alpha**seen
    one[ESTIMATE] = (decay * one[ESTIMATE].exp() + (1 - merge.alpha) * scores).log()
    one[SAMPLES] = one[SAMPLES] + seen


def _window(one, scores, seen, merge):
    for back in range(merge.window - 1, 0, -1):
        one[f"{SCORE}{back}"] = one[f"{SCORE}{back - 1}"]
    one[f"{SCORE}0"] = scores.log()
    one[SAMPLES] = (one[SAMPLES] + seen).clamp(max=merge.window)


_FOLLOWED = {"ema": _moving_average, "window": _window}


def assert_same_state(found, expected, prefix="merge."):
    """Compare the state of entries that both hold with the same votes: those were not merged in between."""
    names = [name for name in found if name.startswith(prefix)]
    before = {int(position): place for place, position in enumerate(expected["positions"])}
    for place, position in enumerate(found["positions"].tolist()):
        known = before[int(position)]
        if found["log_votes"][place] != expected["log_votes"][known]:
            continue
        for name in names:
            left, right = float(found[name][place]), float(expected[name][known])
            assert left == right or math.isclose(left, right, rel_tol=1e-4, abs_tol=1e-4), (name, position, left, right)
