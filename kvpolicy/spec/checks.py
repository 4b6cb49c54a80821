"""Rules between the keys of a policy, which no single key can keep."""

from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.tree import Item, Problems


def check(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """Add what is wrong with `spec` as a whole; `root` tells where its keys stand."""
    _check_budget_covers_protected(spec, root, problems)


def _check_budget_covers_protected(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """A share or a size is known only later; then the plan sees to it that protected entries stay."""
    tokens, protected = spec.budget.tokens, spec.protect.total
    if tokens is not None and tokens < protected:
        place = dict(root.mapping())["budget"].place
        message = f"must be >= protect.sinks + protect.recent, {protected} entries in all: {tokens}"
        problems.add(place, "budget", message)
