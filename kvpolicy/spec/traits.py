"""What a policy saves, when, and what it needs: for lists and tables."""

from collections.abc import Sequence

import attrs

from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages.checking.declared import needs_of
from kvpolicy.stages.parameters import Plugged, rule_of

SAVES = {
    "nothing": "Keeps everything as it is",
    "entries": "Fewer entries",
    "merged entries": "Fewer entries, into which evicted ones are merged",
    "bits": "Fewer bits",
    "entries and bits": "Fewer entries and fewer bits",
    "entries and reads": "Fewer entries, and fewer reads of these",
    "reads": "Fewer reads of entries that are all kept",
}
_PLAIN, _READ_ALL = "plain", "all"


def saves(spec: PolicySpec) -> str:
    """One of `SAVES`."""
    evicts, packs = spec.budget.share != 1, spec.store.name != _PLAIN
    if spec.read.name != _READ_ALL:
        return "entries and reads" if evicts else "reads"
    if evicts and packs:
        return "entries and bits"
    if packs:
        return "bits"
    if not evicts:
        return "nothing"
    return "entries" if spec.merge.moves_only else "merged entries"


def stages(spec: PolicySpec) -> Sequence[str]:
    """The plugins that it is composed of, such as `score: attention`, without those that a file may leave out."""
    scorers = [] if spec.budget.share == 1 else [("score", term.scorer.name) for term in spec.score]
    fields = [(holder, field) for holder in (spec.allocate, spec) for field in attrs.fields(type(holder))]
    plugged = [(rule_of(field), getattr(holder, field.name)) for holder, field in fields]
    others = [
        (plugin.stage, plugin.name)
        for rule, plugin in plugged
        if isinstance(rule, Plugged) and plugin is not None and plugin.name != rule.default
    ]
    return tuple(dict.fromkeys(f"{stage}: {name}" for stage, name in (*scorers, *others)))


def compresses(spec: PolicySpec) -> Sequence[str]:
    """Which of `prompt` and `decoding` entries are evicted in."""
    if spec.budget.share == 1:
        return ()
    when = (("prompt", spec.compress.prefill), ("decoding", spec.compress.every != NEVER))
    return tuple(name for name, does in when if does)


def needs(spec: PolicySpec) -> Sequence[str]:
    """What must be observed, known or measured beside the entries, in a few words each."""
    observed = [needs_of(plugin) for plugin in spec.shown_views.values()]
    evicts = spec.budget.share != 1
    told = {
        "calibration": bool(spec.calibrated),
        "passes over the prompt": evicts and any(need.passes for need in observed),
        "attention of all queries": evicts
        and any(need.attention or need.forward_queries or need.chunk for need in observed),
        "recent queries": evicts and any(need.queries for need in observed),
        "rotary embedding": evicts and any(need.rotary for need in observed),
        "output projection": evicts and any(need.output_projection for need in observed),
        "hidden states": evicts and any(need.hidden_norms for need in observed),
        "regions of the request": bool(spec.protect.regions) or any(need.regions for need in observed),
    }
    return tuple(name for name, needed in told.items() if needed)
