"""Rules between the keys of a policy, which no single key can keep."""

from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.tree import Item, Place, Problems


def check(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """Add what is wrong with `spec` as a whole; `root` tells where its keys stand."""
    _check_budget_covers_protected(spec, root, problems)
    _check_merger_has_logits(spec, root, problems)
    _check_store_suits_heads(spec, root, problems)
    _check_reader_has_its_store(spec, root, problems)


def _check_budget_covers_protected(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """A share or a size is known only later; then the plan sees to it that protected entries stay."""
    tokens, protected = spec.budget.tokens, spec.protect.total
    if tokens is not None and tokens < protected:
        place = dict(root.mapping())["budget"].place
        message = f"must be >= protect.sinks + protect.recent, {protected} entries in all: {tokens}"
        problems.add(place, "budget", message)


def _check_merger_has_logits(spec: PolicySpec, root: Item, problems: Problems) -> None:
    plugins = [*(one.scorer for one in spec.score), spec.merge]
    if spec.merge.reads_window and not any(plugin.needs().queries for plugin in plugins):
        message = (
            f"{spec.merge.name} weighs by the logits of observed queries, and no scorer of this policy observes any"
        )
        problems.add(_place(root, "merge"), "merge", f"{message}; add one that does, such as attention")


def _check_store_suits_heads(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if spec.store.joint and spec.allocate.heads.ragged:
        message = f"{spec.store.name} holds the heads of a layer together: allocate.heads must give them equally many"
        problems.add(_place(root, "store"), "store", f"{message} entries: {spec.allocate.heads.name}")


def _check_reader_has_its_store(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if spec.read.stores and spec.store.name not in spec.read.stores:
        wanted = " or ".join(spec.read.stores)
        problems.add(_place(root, "read"), "read", f"{spec.read.name} needs store: {wanted}: {spec.store.name}")


def _place(root: Item, key: str) -> Place:
    """Where a key stands, or the policy where it was left out."""
    item = dict(root.mapping()).get(key)
    return root.place if item is None else item.place
