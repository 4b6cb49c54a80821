"""When a row of a layer is compressed. Decided on the host, from counts that it has anyway."""

from kvpolicy.plan.plan import Plan


def entries_allowed(plan: Plan, ordinal: int, seq_len: int, *, decoding: bool, least: int = 0) -> float:
    """Entries per KV head that a row with `seq_len` tokens may hold after a forward without being compressed.

    `least` are those that are protected, where they are more than the budget. A prompt, a prompt chunk or another turn
    is brought down to the budget at once; while decoding, `every` tokens may come on top.
    """
    compress = plan.spec.compress
    budget = max(plan.budgets.per_layer(seq_len)[ordinal], least)
    if not decoding:
        return budget if compress.prefill else float("inf")
    return budget + plan.budgets.slack - 1 if plan.compresses_while_decoding else float("inf")
