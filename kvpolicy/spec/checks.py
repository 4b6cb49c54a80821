"""Rules between the keys of a policy, which no single key can keep."""

from kvpolicy.errors import PluginError
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.tree import Item, Place, Problems
from kvpolicy.stages.declared import flag_of, needs_of
from kvpolicy.stages.registry.plugins import registry


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
    if spec.merge.reads_window and not any(needs_of(plugin).queries for plugin in plugins):
        message = (
            f"{spec.merge.name} weighs by the logits of observed queries, and no scorer of this policy observes any"
        )
        problems.add(_place(root, "merge"), "merge", f"{message}; add one that does, such as attention")


def _check_store_suits_heads(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if flag_of(spec.store, "joint") and flag_of(spec.allocate.divider, "ragged"):
        key = spec.allocate.divider.stage
        message = f"{spec.store.name} holds the heads of a layer together: {key} must give them equally many"
        problems.add(_place(root, "store"), "store", f"{message} entries: {spec.allocate.divider.name}")


def _check_reader_has_its_store(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if spec.read.stores and not any(_is_meant(spec, name) for name in spec.read.stores):
        wanted = " or ".join(spec.read.stores)
        problems.add(_place(root, "read"), "read", f"{spec.read.name} needs store: {wanted}: {spec.store.name}")


def _is_meant(spec: PolicySpec, name: str) -> bool:
    """Whether the store is the one that the reader calls so: its distribution's own, or a built-in one."""
    known = registry()
    try:
        return known.find(spec.store.stage, name, known.owner(type(spec.read))) is type(spec.store)
    except PluginError:  # a class that nobody offers
        return spec.store.name == name


def _place(root: Item, key: str) -> Place:
    """Where a key stands, or the policy where it was left out."""
    item = dict(root.mapping()).get(key)
    return root.place if item is None else item.place
