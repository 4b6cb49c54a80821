"""Saved caches: safetensors files with the state and with digests of policy, model and tokenizer."""

import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from kvpolicy.cache.request.regions import Regions
from kvpolicy.cache.state_contents import Contents, below
from kvpolicy.errors import CacheError, RegionError, SavedCacheError, shown
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.saving import stock_layers as stock
from kvpolicy.integrations.transformers.saving.tokenizer_digest import tokenizer_digest
from kvpolicy.plan.plan import Plan
from kvpolicy.plan.tensor_file import TensorFiles
from kvpolicy.spec.dump import digest

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache import PolicyCache

VERSION = "1"
_FILES = TensorFiles(
    "saved cache", "compress the prefix again", SavedCacheError, most_tensors=2**16, largest=2**44, largest_header=2**24
)
_VERSION_KEY, _NUMBERS, _ROWS, _SEEN, _TOKENIZER = "kvpolicy_cache", "numbers", "rows", "seen", "tokenizer"
_REGIONS = "regions"


def write(cache: "PolicyCache", path: "str | os.PathLike[str]", model: str, tokenizer: object) -> None:
    """Write the state of a consistent cache; `model` is the digest of its model.

    Raises SavedCacheError if that fails, ParameterError if `tokenizer` is not a tokenizer.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, object] = {}
    states = []
    for index, layer in enumerate(cache.layers):
        described = layer.state.describe() if isinstance(layer, PolicyLayer) else stock.describe(index, layer)
        states.append(below(f"layers.{index}", described))
    if cache.prompt is not None:
        states.append(below("prompt", cache.prompt.describe()))
    for name, value in itertools.chain(below("spans", cache.spans.describe()), *states):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            numbers[name] = value
    about = {_VERSION_KEY: VERSION, **_fixed(cache.plan, model), _NUMBERS: json.dumps(numbers)}
    about |= {_ROWS: str(cache.rows), _SEEN: str(cache.get_seq_length())}
    if cache.spans.regions is not None:
        about[_REGIONS] = cache.spans.regions.dump()
    if tokenizer is not None:
        about[_TOKENIZER] = tokenizer_digest(tokenizer)
    _FILES.write(path, tensors, about)


def read(
    path: "str | os.PathLike[str]",
    plan: Plan,
    model: str,
    tokenizer: object,
    new_cache: "Callable[[Regions | None], PolicyCache]",
) -> "PolicyCache":
    """A new cache with the state in a file; `new_cache` makes an empty cache with given regions.

    Raises SavedCacheError if the file is damaged or inconsistent, or was saved for another plan, model (a digest) or,
    if one is given, tokenizer; ParameterError if `tokenizer` is not a tokenizer.
    """
    wanted = None if tokenizer is None else tokenizer_digest(tokenizer)
    tensors, about = _FILES.read(path)
    name = os.fsdecode(path)
    # Copies, because the tensors are mapped from the file, which may change.
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    if about.get(_VERSION_KEY) != VERSION:
        version = shown(about.get(_VERSION_KEY))
        raise SavedCacheError(f"{name}: is no saved cache of kvpolicy (version {VERSION}): {version}")
    _FILES.require_whole(name, tensors, about)
    for key, value in _fixed(plan, model).items():
        if about.get(key) != value:
            raise SavedCacheError(f"{name}: was saved for another {key}: {shown(about.get(key))}, here {shown(value)}")
    _check_tokenizer(name, about, wanted)
    contents = Contents(
        tensors, _numbers(name, about), plan.device, lambda message: SavedCacheError(f"{name}: {message}")
    )
    try:
        cache = new_cache(Regions.parse(about[_REGIONS]) if _REGIONS in about else None)
        _restore(cache, contents)
    except (CacheError, RegionError) as error:
        raise SavedCacheError(f"{name}: is inconsistent: {error}") from error
    contents.require_all_read()
    if (about.get(_ROWS), about.get(_SEEN)) != (str(cache.rows), str(cache.get_seq_length())):
        raise SavedCacheError(f"{name}: is inconsistent: its rows or tokens differ from its metadata")
    return cache


def _fixed(plan: Plan, model: str) -> dict[str, str]:
    """Properties that must be equal when a cache is loaded, by their names in messages."""
    geometry = json.dumps(attrs.asdict(plan.geometry), sort_keys=True)
    digests = {"policy": digest(plan.spec), "calibration": plan.calibration, "model": model}
    return {**digests, "geometry": geometry, "dtype": str(plan.dtype)}


def _check_tokenizer(name: str, about: Mapping[str, str], wanted: str | None) -> None:
    if wanted is None:
        return
    if _TOKENIZER not in about:
        raise SavedCacheError(f"{name}: has no digest of a tokenizer: save it with tokenizer=…, or load it without")
    if about[_TOKENIZER] != wanted:
        raise SavedCacheError(
            f"{name}: was saved for another tokenizer: {shown(about[_TOKENIZER])}, here {shown(wanted)}"
        )


def _numbers(name: str, about: Mapping[str, str]) -> dict[str, Any]:
    try:
        numbers = json.loads(about.get(_NUMBERS, ""))
    except (ValueError, RecursionError) as error:
        raise SavedCacheError(f"{name}: its numbers are not JSON") from error
    if not isinstance(numbers, dict):
        raise SavedCacheError(f"{name}: its numbers must be a mapping: {shown(numbers)}")
    return numbers


def _restore(cache: "PolicyCache", contents: Contents) -> None:
    """Restore all layers; managed layers first, which have the numbers of rows and tokens."""
    layer_contents = [contents.below(f"layers.{index}") for index in range(len(cache.layers))]
    counts: list[tuple[list[int], int]] = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PolicyLayer):
            continue
        state = layer.new_state(layer_contents[index].size("num_tokens"))
        state.restore(layer_contents[index], cache.plan.geometry)
        layer.restore(state)
        if state.rows:
            counts.append((state.num_tokens, state.seq_len))
    if not counts or not counts[0][1] or any(other != counts[0] for other in counts):
        raise CacheError("its layers have no tokens, or different numbers of tokens")
    rows, seen = len(counts[0][0]), counts[0][1]
    for contents_of_layer, layer in zip(layer_contents, cache.layers, strict=True):
        if not isinstance(layer, PolicyLayer):
            stock.restore(layer, contents_of_layer, rows, seen, cache.plan.dtype)
    cache.spans.restore(contents.below("spans"), rows)
    if cache.prompt is not None:
        cache.prompt.restore(contents.below("prompt"), rows)
