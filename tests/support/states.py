"""Everything that can be reached from a cache, one by one: what a copy must have, too."""

import attrs
import torch

import kvpolicy
from kvpolicy.cache.observation_window import ObservationWindow
from kvpolicy.cache.request.prompt_tokens import PromptTokens
from kvpolicy.cache.request.request_spans import RequestSpans
from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.cache.storage.page_summaries import PageSummaries
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer

KIVI = {"use": "kivi", "bits": 4, "group": 4, "residual": 8, "batch": 4}
PAGES = {"use": "pages", "page": 4, "budget": 12, "dense_first": 0}
NOT_STATE = {  # what a copy has from the attachment, what is counted anew, and what follows from the rest
    PolicyCache: {"plan", "_config", "owner", "integrity", "_scheduler", "stock_bytes"},
    PolicyLayer: {"plan", "scheduler", "integrity", "stats", "changes", "output_projection", "_resized"},
    PromptTokens: {"given", "_given"},
    RequestSpans: {"protect", "_given", "_labels"},
    SlotStore: {
        *("_base", "_added", "_longest_base", "_average_base", "_fullest_base", "_room"),
        *("_lengths", "_shapes", "_starts", "_firsts", "_tables", "_tabled"),
    },
    KVTensor: {"form"},
    PageSummaries: {"form"},
    ObservationWindow: {"_queries", "_positions"},
}


def everything():
    """A policy that uses every kind of state: of slots and rows, packed entries, pages, windows, ragged heads."""
    history = {"use": "history", "of": {"use": "attention", "queries": 4}, "weight": 0.1}
    scores = [{"use": "attention", "queries": 4}, {"use": "accumulated_attention", "weight": 0.1}, history]
    return kvpolicy.load(
        "snapkv",
        budget=14,
        compress={"every": 4},
        protect={"sinks": 2, "recent": 4},
        score=scores,
        allocate={"heads": {"use": "adaptive", "floor": 0.1}},
        merge={"use": "d2o"},
        store=KIVI,
        read=PAGES,
    )


def reachable(value, path="cache"):
    """Every tensor and plain value below an object, by how it is reached."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype, torch.device)):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from reachable(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"{path}.length", len(value)
        for place, part in enumerate(value):
            yield from reachable(part, f"{path}[{place}]")
    elif isinstance(value, (set, frozenset)):
        yield path, tuple(sorted(value))
    elif not isinstance(value, type):
        left_out = {name for kind, names in NOT_STATE.items() if isinstance(value, kind) for name in names}
        for name, part in [*_attributes(value), *_computed(value)]:
            if name not in left_out:
                yield from reachable(part, f"{path}.{name}")


def _attributes(value):
    if hasattr(value, "__dict__"):
        return list(vars(value).items())
    return [(field.name, getattr(value, field.name)) for field in attrs.fields(type(value))]


def _computed(value):
    if isinstance(value, SlotStore):
        return [(name, getattr(value, name)) for name in ("lengths", "longest", "average", "fullest", "nbytes")]
    if isinstance(value, ObservationWindow):
        rows = range(value._positions.shape[0] if value._filled else 0)
        return [("last", value.last(rows)), ("nbytes", value.nbytes)]
    return []


def assert_same_state(one, other):
    """Both caches have the same in every place that can be reached, and no storage in common."""
    first, second = dict(reachable(one)), dict(reachable(other))
    assert first.keys() == second.keys()
    for path, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[path].dtype, path
            assert torch.equal(value.isnan(), second[path].isnan()), path
            assert torch.equal(value.nan_to_num(), second[path].nan_to_num()), path
        else:
            assert type(value) is type(second[path]), path
            assert value == second[path], path
    assert not storages(first) & storages(second)


def storages(found):
    """Where the tensors among what was reached are, those of the windows' buffers included."""
    return {one.untyped_storage().data_ptr() for one in found.values() if isinstance(one, torch.Tensor)} - {0}
