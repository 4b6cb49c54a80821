"""When a row of a layer is compressed. Decided on the host, from counts that it has anyway."""

from collections.abc import Iterable, Sequence

from kvpolicy.plan.plan import Plan


def entries_allowed(plan: Plan, ordinal: int, seq_len: int, *, decoding: bool, least: int = 0) -> float:
    """Entries per KV head that a row with `seq_len` tokens may hold after a forward without being compressed.

    `least` are those that spans of the request protect, which are held anyway. A prompt, a prompt chunk or another turn
    is brought down to the budget at once; while decoding, `every` tokens may come on top.
    """
    return plan.budgets.entries(ordinal, seq_len, least) + _on_top(plan, decoding=decoding)


def least_allowed(plan: Plan, seq_lens: Iterable[int], *, decoding: bool) -> Sequence[float]:
    """The least that any of several rows may hold, in each layer, where no spans are protected."""
    on_top = _on_top(plan, decoding=decoding)
    if on_top == float("inf"):
        return (on_top,) * plan.geometry.layers
    return [min(entries) + on_top for entries in zip(*map(plan.budgets.by_layer, set(seq_lens)), strict=True)]


def _on_top(plan: Plan, *, decoding: bool) -> float:
    """Entries per KV head that may be held beside the budget."""
    if not decoding:
        return 0 if plan.spec.compress.prefill else float("inf")
    return plan.budgets.slack - 1 if plan.compresses_while_decoding else float("inf")
