"""Which models can carry a policy: read from the configuration, before anything is changed."""

from collections.abc import Iterator

from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvpolicy.errors import KVPolicyError, UnsupportedModelError
from kvpolicy.stages import Geometry


def geometry_of(config: PretrainedConfig) -> Geometry:
    """The geometry of a model's decoder. Raises UnsupportedModelError with every reason that was found."""
    text = config.get_text_config(decoder=True)
    reasons = list(_refusals(config, text))
    if reasons:
        raise UnsupportedModelError(f"{config.model_type} cannot carry a policy: " + "; ".join(reasons))
    heads = int(text.num_attention_heads)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Geometry(_managed(text), heads, int(kv_heads), int(head_dim), _windows(text))


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError when this instance cannot be attached to, whatever its configuration says."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "_prepare_cache_for_generation"):
        raise UnsupportedModelError(f"must be a transformers model that can generate: {type(model).__name__}")
    if model.device.type == "meta":
        raise UnsupportedModelError("the model has no weights yet (device meta)")
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        raise UnsupportedModelError("attention with learned sinks is not supported: eviction would change their share")


def _refusals(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder model"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        yield "its attention logits are soft-capped"
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        yield "layers share the keys of other layers"
    if getattr(text, "kv_lora_rank", None):
        yield "its attention is latent (MLA): there are no keys per head to evict"
    if not hasattr(text, "num_attention_heads"):
        yield "it has no attention heads"
        return
    layers = _stock_layers(text)
    if any(not isinstance(layer, CacheLayerMixin) for layer in layers):
        yield "it has layers with linear attention or a recurrent state"
    elif not any(type(layer) is DynamicLayer for layer in layers):
        yield "no layer has full attention: a sliding window bounds its cache already"


def _managed(text: PretrainedConfig) -> tuple[int, ...]:
    # The exact type: subclasses hold more than keys and values (indexers, windows, quantised states).
    return tuple(index for index, layer in enumerate(_stock_layers(text)) if type(layer) is DynamicLayer)


def _windows(text: PretrainedConfig) -> tuple[int, ...]:
    return tuple(int(one.sliding_window) for one in _stock_layers(text) if isinstance(one, DynamicSlidingWindowLayer))


def _stock_layers(text: PretrainedConfig) -> list[object]:
    try:
        return list(DynamicCache(config=text).layers)
    except KVPolicyError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{text.model_type} has no dynamic cache: {error}") from error
