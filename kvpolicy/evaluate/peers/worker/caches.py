"""The caches of the peers by name: which cache a prompt goes into, and what compresses it meanwhile."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import DynamicCache, QuantizedCache

Made = tuple[Any, AbstractContextManager[Any]]  # a new cache, and what the forward over the prompt runs in

_QUANTISED = {"quanto4": ("quanto", 4), "quanto2": ("quanto", 2), "hqq4": ("hqq", 4), "hqq2": ("hqq", 2)}
_HQQ_AXIS = 1  # the axis of groups that hqq recommends; of quanto the default is used
_SNAPKV_WINDOW = 64


class UnknownPeerError(ValueError):
    """There is no such peer."""


def cache_of(name: str, model: Any, ratio: float | None) -> Callable[[], Made]:
    """What makes a peer's cache, with `ratio` of the prompt removed if it takes one. Raises UnknownPeerError."""
    if name == "full":
        return lambda: (DynamicCache(config=model.config), nullcontext())
    if name in _QUANTISED:
        backend, bits = _QUANTISED[name]
        axes = {"axis_key": _HQQ_AXIS, "axis_value": _HQQ_AXIS} if backend == "hqq" else {}
        return lambda: (QuantizedCache(backend=backend, config=model.config, nbits=bits, **axes), nullcontext())
    if ratio is None:
        raise UnknownPeerError(f"no such peer without a ratio: {name}")
    return lambda: (DynamicCache(config=model.config), press_of(name, ratio)(model))


def press_of(name: str, ratio: float) -> Any:
    """A new press of kvpress, with its defaults. Raises UnknownPeerError."""
    import kvpress  # type: ignore[import-not-found]  # noqa: PLC0415 - there in this environment only

    presses: dict[str, Callable[[], Any]] = {
        "snapkv": lambda: kvpress.SnapKVPress(compression_ratio=ratio, window_size=_SNAPKV_WINDOW),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio, window_size=_SNAPKV_WINDOW)),
        "tova": lambda: kvpress.TOVAPress(compression_ratio=ratio),
        "expected_attention": lambda: kvpress.ExpectedAttentionPress(compression_ratio=ratio),
        "keydiff": lambda: kvpress.KeyDiffPress(compression_ratio=ratio),
        "kvzip": lambda: kvpress.KVzipPress(compression_ratio=ratio),
        "streaming_llm": lambda: kvpress.StreamingLLMPress(compression_ratio=ratio),
    }
    if name not in presses:
        raise UnknownPeerError(f"no such peer: {name}")
    return presses[name]()
