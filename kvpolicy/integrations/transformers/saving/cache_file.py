"""The safetensors file of a saved cache: its state, and digests of the policy, the model and the tokenizer."""

import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from kvpolicy.cache.regions import Regions
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
    """Write the state of a cache that is whole, made for the model of this digest.

    Raises SavedCacheError when that cannot be done, ParameterError for what is no tokenizer.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, object] = {}
    parts = []
    for index, layer in enumerate(cache.layers):
        described = layer.state.describe() if isinstance(layer, PolicyLayer) else stock.describe(index, layer)
        parts.append(below(f"layers.{index}", described))
    if cache.prompt is not None:
        parts.append(below("prompt", cache.prompt.describe()))
    for name, value in itertools.chain(below("spans", cache.spans.describe()), *parts):
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
    """A new cache with the state in a file, all of whose rows it holds; `new_cache` makes one with the regions there.

    Raises SavedCacheError when the file is damaged, contradicts itself, or was saved for something else than this plan,
    the model of this digest, and this tokenizer, if one is given; ParameterError for what is no tokenizer.
    """
    wanted = None if tokenizer is None else tokenizer_digest(tokenizer)
    tensors, about = _FILES.read(path)
    name = os.fsdecode(path)
    # Copies: what has been read is the file itself, which others may change.
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
        raise SavedCacheError(f"{name}: contradicts itself: {error}") from error
    contents.require_all_read()
    if (about.get(_ROWS), about.get(_SEEN)) != (str(cache.rows), str(cache.get_seq_length())):
        raise SavedCacheError(f"{name}: contradicts itself: other rows or tokens are held than it says")
    return cache


def _fixed(plan: Plan, model: str) -> dict[str, str]:
    """What must be the same where a cache is loaded, by what a message calls it."""
    geometry = json.dumps(attrs.asdict(plan.geometry), sort_keys=True)
    digests = {"policy": digest(plan.spec), "calibration": plan.calibration, "model": model}
    return {**digests, "geometry": geometry, "dtype": str(plan.dtype)}


def _check_tokenizer(name: str, about: Mapping[str, str], wanted: str | None) -> None:
    if wanted is None:
        return
    if _TOKENIZER not in about:
        raise SavedCacheError(f"{name}: says nothing of a tokenizer: save it with tokenizer=…, or load it without")
    if about[_TOKENIZER] != wanted:
        raise SavedCacheError(
            f"{name}: was saved for another tokenizer: {shown(about[_TOKENIZER])}, here {shown(wanted)}"
        )


def _numbers(name: str, about: Mapping[str, str]) -> dict[str, Any]:
    try:
        numbers = json.loads(about.get(_NUMBERS, ""))
    except (ValueError, RecursionError) as error:
        raise SavedCacheError(f"{name}: the numbers in it are no JSON") from error
    if not isinstance(numbers, dict):
        raise SavedCacheError(f"{name}: the numbers in it must be a mapping: {shown(numbers)}")
    return numbers


def _restore(cache: "PolicyCache", contents: Contents) -> None:
    """Managed layers first: they say how many tokens of how many rows there are."""
    parts = [contents.below(f"layers.{index}") for index in range(len(cache.layers))]
    counts: list[tuple[list[int], int]] = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PolicyLayer):
            continue
        state = layer.new_state(parts[index].size("num_tokens"))
        state.restore(parts[index], cache.plan.geometry)
        layer.restore(state)
        if state.rows:
            counts.append((state.num_tokens, state.seq_len))
    if not counts or not counts[0][1] or any(one != counts[0] for one in counts):
        raise CacheError("its layers hold no tokens, or have not all seen the same")
    rows, seen = len(counts[0][0]), counts[0][1]
    for part, layer in zip(parts, cache.layers, strict=True):
        if not isinstance(layer, PolicyLayer):
            stock.restore(layer, part, rows, seen, cache.plan.dtype)
    cache.spans.restore(contents.below("spans"), rows)
    if cache.prompt is not None:
        cache.prompt.restore(contents.below("prompt"), rows)
