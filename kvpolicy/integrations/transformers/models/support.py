"""Which models are supported, from their configuration, before anything is changed."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvpolicy.errors import KVPolicyError, UnsupportedModelError
from kvpolicy.integrations.transformers.models.attention_shape import differences, is_set, shape_of
from kvpolicy.stages import Geometry

_SHARDED = ("DTensor", "FlatParameter")  # types of parameters that are sharded over processes
_UNSUPPORTED = {  # reason: names in a configuration, one of which is set
    "its attention logits are soft-capped": ("attn_logit_softcapping",),
    "layers share the keys of other layers": ("num_kv_shared_layers", "kv_sharing_modes"),
    "its attention is latent (MLA): there are no keys per head to evict": ("kv_lora_rank",),
    "layers attend to an image instead of to tokens": ("cross_attention_layers",),
}
_OWN_ATTENTION = {
    "doge": "its attention makes masks of its own, from the values",
    "gemma4_unified": "its masks hide more than pads and later tokens, whatever it is given",
    "jetmoe": "its attention is computed by experts of its own",
}
_CAN_SET = "_can_set_attn_implementation"
_LAYER_DROP = ("layerdrop", "decoder_layerdrop")


def geometry_of(config: PretrainedConfig) -> Geometry:
    """The geometry of a model's decoder. Raises UnsupportedModelError with all reasons."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnsupportedModelError(f"{config.model_type} cannot carry a policy: {error}") from error
    reasons = list(_refusals(config, text))
    if reasons:
        raise UnsupportedModelError(f"{config.model_type} cannot carry a policy: " + "; ".join(reasons))
    return Geometry(_managed(text), *shape_of(text, _managed(text)), _windows(text))


def layer_count(config: PretrainedConfig) -> int:
    """Layers of a model's decoder, whether a policy manages them or not."""
    return len(_decoder_layers(config.get_text_config(decoder=True)))


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if a policy cannot be attached to this instance, independent of its configuration."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "_prepare_cache_for_generation"):
        raise UnsupportedModelError(f"must be a transformers model that can generate: {type(model).__name__}")
    device_of(model)
    require_no_sinks(model)


def require_no_sinks(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if attention has learned sinks: entries without a token."""
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        raise UnsupportedModelError("attention with learned sinks is not supported: eviction would change their share")


def require_interface(model: PreTrainedModel, configs: Sequence[PretrainedConfig]) -> None:
    """Raise UnsupportedModelError if a submodel with one of these configurations bypasses AttentionInterface."""
    config_ids = {id(config) for config in configs}
    for module in model.modules():
        uses = isinstance(module, PreTrainedModel) and id(module.config) in config_ids
        if uses and not getattr(module, _CAN_SET)():
            raise UnsupportedModelError(
                f"{type(module).__name__} does not call its attention through transformers' AttentionInterface"
            )


def device_of(model: PreTrainedModel) -> torch.device:
    """The device on which forwards begin, also for offloaded weights. Raises UnsupportedModelError without weights."""
    first = model.device
    if first.type != "meta":
        return first
    for module in model.modules():
        for hook in _offloading_hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise UnsupportedModelError("the model has no weights yet (device meta)")


def runs_elsewhere(model: PreTrainedModel) -> str | None:
    """Why a forward of this model is expensive, needs other processes or has no cache; None if it can be checked."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "weights are offloaded"
    if any(type(parameter).__name__ in _SHARDED or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "weights are sharded"
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing runs forwards without a cache"
    if model.training and any(getattr(model.config, name, 0) for name in _LAYER_DROP):
        return "layers are dropped at random while it trains"
    return None


def _offloading_hooks(module: nn.Module) -> Iterator[object]:
    """The hooks of accelerate on a module."""
    unvisited = [getattr(module, "_hf_hook", None)]
    while unvisited:
        hook = unvisited.pop()
        if hook is not None:
            unvisited.extend(getattr(hook, "hooks", ()))
            yield hook


def _refusals(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder model"
    if getattr(text, "is_decoder", None) is False and hasattr(text, "add_cross_attention"):
        yield "its attention looks at later tokens, unless its configuration says is_decoder=True"
    for reason, names in _UNSUPPORTED.items():
        if any(is_set(text, name) for name in names):
            yield reason
    for model_type in dict.fromkeys((config.model_type, text.model_type)):
        if model_type in _OWN_ATTENTION:
            yield _OWN_ATTENTION[model_type]
    if not is_set(text, "num_attention_heads"):
        yield "it has no attention heads"
        return
    layers = _stock_layers(text)
    if any(not isinstance(layer, CacheLayerMixin) for layer in layers):
        yield "it has layers with linear attention or a recurrent state"
    elif not any(type(layer) is DynamicLayer for layer in layers):
        yield "no layer has full attention: a sliding window bounds its cache already"
    else:
        yield from differences(text, _managed(text))


def _managed(text: PretrainedConfig) -> tuple[int, ...]:
    # The exact type: subclasses have more than keys and values (indexers, windows, quantised states).
    return tuple(index for index, layer in enumerate(_decoder_layers(text)) if type(layer) is DynamicLayer)


def _windows(text: PretrainedConfig) -> tuple[int, ...]:
    return tuple(
        int(layer.sliding_window) for layer in _stock_layers(text) if isinstance(layer, DynamicSlidingWindowLayer)
    )


def _decoder_layers(text: PretrainedConfig) -> list[object]:
    return _stock_layers(text)[: getattr(text, "decoder_layers", None)]  # encoder layers come after them


def _stock_layers(text: PretrainedConfig) -> list[object]:
    try:
        return list(DynamicCache(config=text).layers)
    except KVPolicyError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{text.model_type} has no dynamic cache: {error}") from error
