"""Attention shapes in a configuration, given for all layers or per layer."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

_HEADS, _KV_HEADS, _HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"


def is_set(text: PretrainedConfig, name: str) -> bool:
    """Whether a value is neither None, 0 nor False, for any layer."""
    value = _value(text, name)
    return any(value) if isinstance(value, (list, tuple)) else bool(value)


def differences(text: PretrainedConfig, layers: Sequence[int]) -> Iterator[str]:
    """Errors: numbers in which these layers differ, or that are not integers."""
    for name in (_HEADS, _KV_HEADS, _HEAD_DIM):
        values = {_of_layer(_value(text, name), layer) for layer in layers}
        if len(values) > 1:
            listed = ", ".join(sorted(map(str, values)))
            yield f"the layers with full attention differ in {name}: {listed}"
        elif not all(value is None or type(value) is int for value in values):
            yield f"{name} must be an integer: {next(iter(values))!r}"


def shape_of(text: PretrainedConfig, layers: Sequence[int]) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension of these layers, which are equal for all of them."""
    heads, kv_heads, head_dim = (
        _of_layer(_value(text, name), layers[0] if layers else 0) for name in (_HEADS, _KV_HEADS, _HEAD_DIM)
    )
    decoder_heads = getattr(text, "decoder_attention_heads", None)
    if decoder_heads:  # the common names are those of the encoder
        heads, kv_heads = decoder_heads, decoder_heads
    if text.model_type == "gpt_bigcode":
        kv_heads = 1 if text.multi_query else heads
    return int(heads), int(kv_heads or heads), int(head_dim or text.hidden_size // heads)


def _value(text: PretrainedConfig, name: str) -> Any:
    """The value of a name: one value, or a list with one per layer; None if absent."""
    try:
        return getattr(text, name, None)
    except Exception:  # noqa: BLE001 - transformers raises an error if layers have different values
        layers = getattr(text, "per_layer_config", None) or ()
        return [getattr(layer, name, None) for layer in layers]


def _of_layer(value: Any, layer: int) -> Any:
    if isinstance(value, (list, tuple)):
        return value[layer] if layer < len(value) else None
    return value
