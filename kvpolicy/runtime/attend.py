"""Attention over what a layer holds, and the mass that each entry receives."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.plan.plan import ATTENTION, LOG_VOTES, POSITIONS, Plan
from kvpolicy.runtime.store import Store

_QUERY_BLOCK = 128  # queries whose probabilities exist at one time while attention mass is summed


@attrs.frozen(eq=False)
class Asked:
    """The queries of one attention call."""

    queries: Tensor  # [B, H, q, D] post-RoPE
    positions: Tensor  # [B, q] int, place among the row's real tokens; -1 = pad
    padded: bool  # whether there is a pad among them
    scaling: float

    def first(self, count: int) -> "Asked":
        """The oldest `count` queries."""
        return attrs.evolve(self, queries=self.queries[:, :, :count], positions=self.positions[:, :count])

    def select_rows(self, rows: Sequence[int]) -> "Asked":
        """The rows named, in that order."""
        return attrs.evolve(self, queries=self.queries[list(rows)], positions=self.positions[list(rows)])


def attend(plan: Plan, store: Store, asked: Asked, *, pads: bool, dropout: float = 0.0) -> Tensor:
    """Attention of the queries over the held entries at positions up to their own, [B, H, q, Dv].

    `pads` says that there may be pads among the held slots.
    """
    options = {"scale": asked.scaling, "dropout_p": dropout}
    if store.layout.uniform is not None:
        return _grouped(asked, _held(plan, store, store.dense), options, full=store.even and not pads)
    heads = [_grouped(part, held, options, full=not pads) for part, held in _by_segment(plan, store, asked)]
    rows = [torch.cat(heads[start : start + store.layout.heads], 1) for start in _starts(store)]
    return torch.cat(rows)


def add_attention_mass(plan: Plan, store: Store, asked: Asked) -> None:
    """Add to the attention column what each entry receives from the queries; those at position -1 give nothing."""
    if store.layout.uniform is not None:
        _add_mass(_held(plan, store, store.dense), asked)
    else:
        for part, held in _by_segment(plan, store, asked):
            _add_mass(held, part)


@attrs.frozen(eq=False)
class _Held:
    keys: Tensor  # [B, K, T, D]
    values: Tensor  # [B, K, T, Dv]
    positions: Tensor  # [B, K, T]
    log_votes: Tensor | None
    attention: Tensor | None  # [B, K, T, G]


def _held(plan: Plan, store: Store, read: Callable[[str], Tensor]) -> _Held:
    keys, values = plan.spec.store.decode({name: read(name) for name in plan.entry_columns})
    votes = read(LOG_VOTES) if LOG_VOTES in store.columns else None
    attention = read(ATTENTION) if ATTENTION in store.columns else None
    return _Held(keys, values, read(POSITIONS), votes, attention)


def _by_segment(plan: Plan, store: Store, asked: Asked) -> Iterator[tuple[Asked, _Held]]:
    group = plan.geometry.group
    for row in range(store.layout.rows):
        for head in range(store.layout.heads):
            own = asked.queries[row : row + 1, head * group : (head + 1) * group]
            part = attrs.evolve(asked, queries=own, positions=asked.positions[row : row + 1])
            yield part, _held(plan, store, lambda name, b=row, k=head: store.segment(name, b, k)[None, None])  # type: ignore[misc]


def _starts(store: Store) -> range:
    return range(0, store.layout.rows * store.layout.heads, store.layout.heads)


def _grouped(asked: Asked, held: _Held, options: dict[str, Any], *, full: bool) -> Tensor:
    """One call for all heads of `held`; `full` says that no slot among them is empty."""
    queries, heads = asked.queries, held.keys.shape[1]
    group, count = queries.shape[1] // heads, queries.shape[2]
    sees_all = count == 1 and full and held.log_votes is None
    bias = None if sees_all else _bias(held, asked.positions, queries.dtype)
    if count == 1:  # the group's queries stand in for query tokens of one head: keys are read once
        packed = queries.reshape(queries.shape[0], heads, group, -1)
        out = scaled_dot_product_attention(packed, held.keys, held.values, attn_mask=bias, **options)
        return out.flatten(1, 2)[:, :, None]
    if bias is not None and bias.shape[1] > 1:
        bias = bias.repeat_interleave(group, 1)
    return scaled_dot_product_attention(
        queries, held.keys, held.values, attn_mask=bias, enable_gqa=group > 1, **options
    )


def _bias(held: _Held, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the logits: bool [B, 1, q, T], or with votes a float [B, K, q, T].

    Held entries are older than the chunk, whichever they are, so heads differ in what they hold and not in which
    slots a query sees: one head's positions stand for all, unless votes differ.
    """
    if held.log_votes is None:
        return _visible(held.positions[:, :1], positions)
    visible = _visible(held.positions, positions)
    return held.log_votes[:, :, None].to(dtype).expand(visible.shape).masked_fill(~visible, -torch.inf)


def _add_mass(held: _Held, asked: Asked) -> None:
    if held.attention is None:
        return
    keys = held.keys.float()[:, :, None].transpose(-1, -2)  # [B, K, 1, D, T]
    queries = asked.queries.unflatten(1, (keys.shape[1], -1))  # [B, K, G, q, D]
    blocks = zip(queries.split(_QUERY_BLOCK, 3), asked.positions.split(_QUERY_BLOCK, 1), strict=True)
    for block, positions in blocks:
        logits = (block.float() * asked.scaling) @ keys  # [B, K, G, q, T]
        if held.log_votes is not None:
            logits = logits + held.log_votes[:, :, None, None]
        hidden = ~_visible(held.positions, positions)[:, :, None]
        mass = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
        held.attention.add_(mass.sum(3).transpose(-1, -2))


def _visible(held: Tensor, positions: Tensor) -> Tensor:
    """Positions [B, K, T] and query positions [B, q] to bool [B, K, q, T]."""
    held = held[:, :, None]
    return (held >= 0) & (held <= positions[:, None, :, None])
