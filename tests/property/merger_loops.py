"""What the published mergers compute, one head and one entry at a time, in float64."""

import math

import attrs
import torch
from hypothesis import assume

from kvpolicy_plugins.mergers.cam import CaM
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.weightedkv import WeightedKV


@attrs.frozen(eq=False)
class Head:
    """What is held of one head, in float64, without empty slots."""

    keys: torch.Tensor
    values: torch.Tensor
    free: list  # whether an entry is unprotected
    kept: list
    attention: torch.Tensor  # of the last queries, causal
    average: torch.Tensor  # mass per query that saw an entry

    @property
    def evicted(self):
        return [slot for slot in range(len(self.keys)) if slot not in self.kept]

    def nearest(self):
        """{evicted: (cosine similarity, kept)}, and how close a second one came."""
        directions = self.keys / self.keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        found, margin = {}, math.inf
        for slot in self.evicted if self.kept else ():
            cosines = [float(directions[slot] @ directions[other]) for other in self.kept]
            best = max(cosines)
            found[slot] = (best, self.kept[cosines.index(best)])
            margin = min([margin, *(best - one for at, one in enumerate(cosines) if at != cosines.index(best))])
        return found, margin


def head_of(view, kept, row, head, queries):
    held = view.valid[row, head]
    positions = view.positions[row, head][held]
    keys, asked = view.keys[row, head][held].double(), view.window_positions[row]
    grouped = view.queries[row].unflatten(0, (kept.shape[1], -1))[head].double()
    grouped, asked = grouped[:, -queries:], asked[-queries:]
    rows = [
        (view.scaling * keys @ query).masked_fill(positions > at, -torch.inf).softmax(-1)
        for group in grouped
        for query, at in zip(group, asked, strict=True)
        if at >= 0
    ]
    seen = view.positions[row].max() - positions + 1
    return Head(
        keys=keys,
        values=view.values[row, head][held].double(),
        free=view.candidates[row, head][held].tolist(),
        kept=[slot for slot in kept[row, head].tolist() if slot >= 0],
        attention=torch.stack(rows).mean(0) if rows else torch.zeros(len(keys)),
        average=view.attention[row, head][:, held].double().mean(0) / seen,
    )


def mean_of(entries, weights):
    """Weighted mean of {slot: weight}."""
    return sum(weight * entries[slot] for slot, weight in weights.items()) / sum(weights.values())


def by_target(head, found):
    return {kept: [slot for slot, (_, target) in found.items() if target == kept] for kept in head.kept}


def plain_weighted(head, _merger, found):
    sets = {
        kept: {kept: 1.0, **{slot: max((found[slot][0] + 1) / 2, 1e-6) for slot in joined}}
        for kept, joined in by_target(head, found).items()
    }
    return [mean_of(head.keys, one) for one in sets.values()], [mean_of(head.values, one) for one in sets.values()]


def plain_pivot(head, _merger, found):
    def one(entries, kept, joined):
        parts = [entries[kept], *((entries[kept] + entries[slot]) / 2 for slot in joined)]
        return torch.stack(parts).mean(0)

    sets = by_target(head, found).items()
    return [[one(entries, *pair) for pair in sets] for entries in (head.keys, head.values)]


def plain_tome(head, merger, found):
    passed = {slot: pair for slot, pair in found.items() if pair[0] >= merger.threshold}
    if merger.fraction < 1 and found:
        ordered = sorted(pair[0] if slot in passed else -math.inf for slot, pair in found.items())
        rank = (len(ordered) - 1) * (1 - merger.fraction)
        below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
        border = below if below in (above, -math.inf) else below + (above - below) * (rank % 1)
        assume(all(abs(pair[0] - border) > 1e-6 for pair in found.values()))
        passed = {slot: pair for slot, pair in passed.items() if pair[0] >= border}
    norms = head.values.norm(dim=-1)
    sets = {kept: {kept: 1.0} for kept in head.kept}
    for slot, (similarity, target) in passed.items():
        sets[target][slot] = max(similarity, 0) * norms[slot] / (norms[slot] + norms[target] + 1e-6)
    return [head.keys[kept] for kept in sets], [mean_of(head.values, one) for one in sets.values()]


def plain_kvmerger(head, merger, _found):
    run, runs = -1, []
    for slot, free in enumerate(head.free):
        pair = head.keys[slot - 1 : slot + 1] if slot else None
        cosine = -math.inf if pair is None else torch.cosine_similarity(pair[0], pair[1], 0, 1e-12)
        assume(abs(cosine - merger.similarity) > 1e-6)
        run += not (free and slot and head.free[slot - 1] and cosine > merger.similarity)
        runs.append(run)
    sets = {kept: {kept: 1.0} for kept in head.kept}
    for slot in head.evicted:
        near = [kept for kept in head.kept if runs[kept] == runs[slot]]
        if near:
            sets[min(near, key=lambda kept: (abs(kept - slot), kept))][slot] = None
    for kept, one in sets.items():
        distance = {slot: float((head.keys[slot] - head.keys[kept]).norm()) for slot in one if slot != kept}
        width = sum(distance.values()) / max(1, len(distance))
        one.update({slot: math.exp(-(far**2) / (2 * width**2)) for slot, far in distance.items()})
    return [mean_of(head.keys, one) for one in sets.values()], [mean_of(head.values, one) for one in sets.values()]


def plain_weightedkv(head, _merger, _found):
    sets = {kept: {kept: float(head.average[kept])} for kept in head.kept}
    for slot in head.evicted if head.kept else ():
        later = [kept for kept in head.kept if kept > slot]
        sets[(later or head.kept[-1:])[0]][slot] = float(head.average[slot])
    return [head.keys[kept] for kept in sets], [mean_of(head.values, one) for one in sets.values()]


def plain_cam(head, merger, _found):
    values = head.values.clone()
    for slot in head.evicted:
        later = [kept for kept in head.kept if kept > slot]
        targets = later[: merger.window]
        over = head.attention[later if merger.over == "recent" else targets]
        if targets and head.attention[slot] > 0:
            share = min(1.0, float(head.attention[slot] / over.mean())) if over.sum() > 0 else 1.0
            values[targets] += share * head.values[slot] / len(targets)
    return [head.keys[kept] for kept in head.kept], [values[kept] for kept in head.kept]


PLAIN = {
    Weighted: plain_weighted,
    Pivot: plain_pivot,
    ToMe: plain_tome,
    KVMerger: plain_kvmerger,
    WeightedKV: plain_weightedkv,
    CaM: plain_cam,
}


def plain_d2o(merger, found, old):
    """What is merged per head, and the new threshold; None if nothing is evicted."""
    everything = [u for one in found for u, _ in one.values()]
    if not everything:
        return found, old
    mean = sum(everything) / len(everything)
    threshold = mean if old is None else merger.alpha * old + merger.beta * mean
    named = [
        {slot: rank if merger.together == "rank" else slot for rank, slot in enumerate(sorted(one))} for one in found
    ]
    merged = [{} for _ in found]
    for number, own in enumerate(named):
        for slot, name in own.items():
            together = [one[e][0] for one, names in zip(found, named, strict=True) for e in names if names[e] == name]
            agreed = sum(together) / len(together)
            assume(abs(agreed - threshold) > 1e-7 or len(everything) == 1)
            if agreed >= threshold:
                merged[number][slot] = found[number][slot]
    return merged, threshold


def d2o_mean(merger, entries, kept, joined):
    if merger.normalize == "count":
        return (entries[kept] + sum(u * entries[slot] for slot, u in joined.items())) / (1 + len(joined))
    return mean_of(entries, {kept: math.e, **{slot: math.exp(u) for slot, u in joined.items()}})
