"""Rules that involve several keys of a policy."""

from kvpolicy.errors import PluginError
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.tree import Item, Problems, SourcePosition
from kvpolicy.stages.checking.declared import flag_of, needs_of
from kvpolicy.stages.registry.plugins import registry


def check(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """Add violated rules of `spec` to `problems`; `root` has the positions of its keys."""
    _check_budget_covers_protected(spec, root, problems)
    _check_generated_is_known(spec, root, problems)
    _check_queries_are_observed(spec, root, problems)
    _check_store_suits_heads(spec, root, problems)
    _check_reader_has_its_store(spec, root, problems)


def _check_budget_covers_protected(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """Only for a budget in tokens. For shares and bytes the plan guarantees room for protected entries."""
    tokens, protected = spec.budget.tokens, spec.protect.total
    if tokens is not None and tokens < protected:
        position = dict(root.mapping())["budget"].position
        message = f"must be >= protect.sinks + protect.recent, {protected} entries in all: {tokens}"
        problems.add(position, "budget", message)


def _check_generated_is_known(spec: PolicySpec, root: Item, problems: Problems) -> None:
    """A budget of what was generated comes on top of the prompt, and says nothing of shares of itself."""
    if spec.budget.generated is None:
        return
    if not spec.protect.prompt:
        message = f"needs protect: {{prompt: true}}, as it comes on top of the prompt: {spec.budget}"
        problems.add(_position(root, "budget"), "budget", message)
    for key in ("sinks", "recent"):
        if not isinstance(getattr(spec.protect, key), int):
            message = f"must be a number of tokens beside a budget that comes on top of it, {spec.budget}"
            problems.add(_position(root, "protect"), f"protect.{key}", f"{message}: {getattr(spec.protect, key)}")


def _check_queries_are_observed(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if any(needs_of(plugin).queries for plugin in spec.shown_views.values()):
        return
    readers = {"merge": spec.merge, "allocate": spec.allocate.divider}
    for key, plugin in readers.items():
        if flag_of(plugin, "reads_window"):
            message = (
                f"{plugin.name} uses the logits of observed queries, but no scorer of this policy observes queries"
            )
            problems.add(_position(root, key), plugin.stage, f"{message}; add one that does, such as attention")


def _check_store_suits_heads(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if flag_of(spec.store, "joint") and flag_of(spec.allocate.divider, "ragged"):
        key = spec.allocate.divider.stage
        message = f"{spec.store.name} packs the heads of a layer together: {key} must give them equally many"
        problems.add(_position(root, "store"), "store", f"{message} entries: {spec.allocate.divider.name}")


def _check_reader_has_its_store(spec: PolicySpec, root: Item, problems: Problems) -> None:
    if spec.read.stores and not any(_is_store_of(spec, name) for name in spec.read.stores):
        wanted = " or ".join(spec.read.stores)
        problems.add(_position(root, "read"), "read", f"{spec.read.name} needs store: {wanted}: {spec.store.name}")


def _is_store_of(spec: PolicySpec, name: str) -> bool:
    """Whether `name`, as the reader uses it, is the store: a plugin of the reader's distribution, or a built-in one."""
    plugins = registry()
    try:
        return plugins.find(spec.store.stage, name, plugins.owner(type(spec.read))) is type(spec.store)
    except PluginError:  # no distribution offers the class
        return spec.store.name == name


def _position(root: Item, key: str) -> SourcePosition:
    """Position of a key, or of the policy if the key is absent."""
    item = dict(root.mapping()).get(key)
    return root.position if item is None else item.position
