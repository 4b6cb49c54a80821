"""Eviction written as loops over entries, run inside the plain model: what a policy must hold after every forward.

The plain model has a cache of its own that holds everything. Its attention is done here, by a loop over rows and
heads, over the entries that the method has kept so far; then the method sees the queries and evicts. All numbers are
computed in float64 from the float32 queries, keys and values of the model; a decision that rounding could turn is told
by `margin`. Nothing of the product is used.
"""

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from tests.support.oracle import attending_by

Contents = dict[tuple[int, int], list[dict[int, tuple[np.ndarray, np.ndarray, float]]]]  # by layer, row; head; position


@attrs.define
class Entry:
    """A token that one KV head holds."""

    position: int  # among the row's real tokens
    key: np.ndarray  # [D], rotated
    value: np.ndarray
    received: float = 0.0  # attention so far, for methods that count it
    remembered: float | None = None  # score of earlier rounds, for methods that remember it
    votes: float = 1.0  # how many entries it stands for


@attrs.define
class Head:
    """What one KV head of a row holds, in order, and the last queries [G, D] that it has seen, with their positions."""

    scaling: float
    layer: int
    number: int  # among the KV heads of its layer
    prompt: int  # tokens of the row's first forward
    entries: list[Entry] = attrs.field(factory=list)
    window: list[tuple[int, np.ndarray]] = attrs.field(factory=list)

    def logits(self, queries: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        """[q, G, T]; -inf where a query does not see an entry because it came later."""
        keys = np.stack([entry.key for entry in self.entries])
        votes = np.log([entry.votes for entry in self.entries])
        positions = np.array([entry.position for entry in self.entries])
        found = np.stack([self.scaling * query @ keys.T + votes for _, query in queries])
        for row, (position, _) in enumerate(queries):
            found[row, :, positions > position] = -np.inf
        return found


class Method:
    """What a policy scores and how it shares out its budget; the oracles say it in their own words."""

    def __init__(self, budget: int, every: int, sinks: int, recent: int, queries: int = 1) -> None:
        self.budget, self.every, self.sinks, self.recent, self.queries = budget, every, sinks, recent, queries
        self.margin = np.inf  # the narrowest decision so far, as a share of the largest score

    def observe(self, head: Head, probabilities: np.ndarray) -> None:
        """Told the attention [q, G, T] of each forward, before anything is evicted."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        """For each KV head of a row, a score for each candidate: entries that are neither sinks nor recent."""
        raise NotImplementedError

    def entries(self, layer: int, layers: int, tokens: int) -> int:
        """Entries that a KV head of a layer may hold, once a row has had so many tokens."""
        return min(self.budget, tokens)

    def allowed(self, heads: list[Head], layers: int, tokens: int) -> int:
        """Entries that the KV heads of a row may hold on average, once it has had so many tokens."""
        return self.entries(heads[0].layer, layers, tokens)

    def due(self, heads: list[Head], allowed: int, *, decoding: bool) -> bool:
        """Whether the heads of a row hold too much after a forward."""
        held = sum(len(head.entries) for head in heads) / len(heads)
        return held > (allowed + self.every - 1 if decoding else allowed) and (decoding or self.prefill)

    def attended(self, head: Head, queries: Sequence[tuple[int, np.ndarray]], *, decoding: bool) -> np.ndarray:
        """Logits [q, G, T] of the queries of a forward; -inf where a query does not look."""
        return head.logits(queries)

    prefill = True  # whether prompts and turns are compressed, too

    competing = False  # whether `shares` is told the scores of all layers, when a forward is over

    def shares(self, scores: list[np.ndarray], each: int) -> list[int]:
        """Candidates that each head of a layer keeps, `each` on average."""
        return [each] * len(scores)

    def candidates(self, head: Head) -> list[int]:
        """The slots of a head that may be evicted."""
        return list(range(self.sinks, len(head.entries) - self.recent))

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        """Ascending indices of the candidates of a head that stay, `count` of them."""
        return self.best(scores, count)

    def best(self, scores: np.ndarray, count: int) -> list[int]:
        """Ascending indices of the highest scores; among equals the earlier ones."""
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        if 0 < count < len(order):
            self.decided(scores, scores[order[count - 1]], scores[order[count]])
        return sorted(order[:count])

    def decided(self, scores: np.ndarray, last: float, next_one: float) -> None:
        """Note how clear a cut between two neighbouring scores is. Equal ones are equal for all: pooling copies."""
        others = [abs(score - last) for score in scores if score != last]
        gap = last - next_one if last != next_one else min(others, default=np.inf)
        self.margin = min(self.margin, gap / max(1e-30, np.abs(scores).max()))


@attrs.define
class Simulation:
    """The attention of the plain model under a method, for tokens [B, T] and their mask, padded on the left."""

    method: Method
    mask: np.ndarray  # [B, T] bool
    layers: int
    heads: dict[tuple[int, int], list[Head]] = attrs.field(factory=dict)  # by layer and row
    tokens: dict[tuple[int, int], int] = attrs.field(factory=dict)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **call):
        rows, kv_heads, length = key.shape[:3]
        count = query.shape[2]
        output = torch.zeros(rows, count, query.shape[1], value.shape[3])
        for row in range(rows):
            place = (module.layer_idx, row)
            columns = [column for column in range(length - count, length) if self.mask[row, column]]
            numbers = range(kv_heads)
            new = [Head(scaling, module.layer_idx, number, len(columns)) for number in numbers]
            heads = self.heads.setdefault(place, new)
            given = (each[row].double().numpy() for each in (query, key, value))
            output[row] = torch.from_numpy(self._row(heads, columns, length - count, self.tokens.get(place, 0), *given))
            self.tokens[place] = self.tokens.get(place, 0) + len(columns)
            if not self.method.competing:
                self._evict([module.layer_idx], row, decoding=count == 1)
        if self.method.competing and module.layer_idx == self.layers - 1:
            for row in range(rows):
                self._evict(list(range(self.layers)), row, decoding=count == 1)
        return output, None

    def _row(self, heads, columns, first, before, query, key, value):
        """One forward of a row: append, attend, observe. [q, H, D]."""
        group = query.shape[0] // len(heads)
        output = np.zeros((query.shape[1], query.shape[0], value.shape[2]))
        for index, head in enumerate(heads):
            own = slice(index * group, (index + 1) * group)
            positions = range(before, before + len(columns))
            head.entries += [
                Entry(position, key[index, column], value[index, column])
                for position, column in zip(positions, columns, strict=True)
            ]
            queries = [
                (position, query[own, column - first]) for position, column in zip(positions, columns, strict=True)
            ]
            if not queries:
                continue
            probabilities = softmax(self.method.attended(head, queries, decoding=query.shape[1] == 1))
            values = np.stack([entry.value for entry in head.entries])
            output[np.array(columns) - first, own] = probabilities @ values
            head.window = (head.window + queries)[-self.method.queries :]
            self.method.observe(head, probabilities)
        return output

    def _evict(self, layers: list[int], row: int, *, decoding: bool) -> None:
        """Of layers that share what they may hold: one, or all of them."""
        method, heads = self.method, [head for layer in layers for head in self.heads[layer, row]]
        allowed = method.allowed(heads, self.layers, self.tokens[layers[0], row])
        if not method.due(heads, allowed, decoding=decoding):
            return
        scores = method.scores(heads)
        shares = method.shares(scores, allowed - len(heads[0].entries) + len(method.candidates(heads[0])))
        for head, own, share in zip(heads, scores, shares, strict=True):
            slots = method.candidates(head)
            kept = {slots[index] for index in method.chosen(head, own, share)}
            head.entries = [entry for slot, entry in enumerate(head.entries) if slot in kept or slot not in set(slots)]

    def held(self) -> list[list[list[list[int]]]]:
        """Positions, [layer][row][head]."""
        rows = range(len(self.mask))
        return [
            [[[entry.position for entry in head.entries] for head in self.heads[layer, row]] for row in rows]
            for layer in range(self.layers)
        ]

    def refresh(self, contents: Contents) -> None:
        """Give entries the keys, values and votes that they have become: packed, or merged with others."""
        for place, heads in self.heads.items():
            for head, known in zip(heads, contents[place], strict=True):
                for entry in head.entries:
                    if entry.position in known:  # else another method holds it, which will be told
                        entry.key, entry.value, entry.votes = known[entry.position]


def simulate(model, method: Method, tokens, mask, sizes, contents=None):
    """What is held after each forward: positions [forward][layer][row][head].

    `contents`, after each forward, are what entries hold where a policy packs or merges them.
    """
    simulation = Simulation(method, mask.bool().numpy(), model.config.num_hidden_layers)
    held, cache, start = [], None, 0
    with attending_by(model, simulation), torch.no_grad():
        for step, size in enumerate(sizes):
            end = start + size
            if contents is not None and step:
                simulation.refresh(contents[step - 1])
            given = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            cache = model(tokens[:, start:end], **given).past_key_values
            held.append(simulation.held())
            start = end
    return held


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
