"""When a row of a layer is compressed. Decided on the host, from counts that it has anyway."""

from kvpolicy.plan.plan import Plan


def entries_allowed(plan: Plan, ordinal: int, seq_len: int, *, decoding: bool, least: int = 0) -> float:
    """Entries per KV head that a row with `seq_len` tokens may hold after a forward without being compressed.

    `least` are those that spans of the request protect, which are held anyway. A prompt, a prompt chunk or another turn
    is brought down to the budget at once; while decoding, `every` tokens may come on top.
    """
    compress = plan.spec.compress
    budget = plan.budgets.entries(ordinal, seq_len, least)
    if not decoding:
        return budget if compress.prefill else float("inf")
    return budget + plan.budgets.slack - 1 if plan.compresses_while_decoding else float("inf")
