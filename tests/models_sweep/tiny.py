"""Tiny random models of any class: the default configuration, with all that counts something made small."""

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tests.models_sweep.pairs import Pair
from tests.models_sweep.variants import SPECIAL, VARIANTS

VOCABULARY = 97
MOST_PARAMETERS = 50_000_000


class CannotBuildError(Exception):
    """A class that this harness has no tiny model of, and why."""

    model_class = ""


_LAYERS, _WIDTH, _HEADS, _HEAD_DIM, _LENGTH = 4, 64, 4, 16, 512
_TEXT = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _LENGTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("qk_nope_head_dim",), 8),
    **dict.fromkeys(("v_head_dim", "qk_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "hidden_size_per_layer_input": 8,
    "zero_expert_num": 0,
    "encoder_layers": 2,
    "encoder_attention_heads": _HEADS,
    "num_attention_groups": 2,
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size"), 16),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # every generation has the length that was asked for
}
_OTHER = {  # of encoders of images and sounds, which are built and not run
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "d_model", "encoder_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim",), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "num_global_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "projector_input_dim", "projector_output_dim"), _WIDTH),
    "vision_output_dim": 96,
    "image_size": 32,
    "patch_size": 8,
}
_SECTIONED = ("ernie4_5_vl", "glm4v", "glm46v", "glm_ocr", "hunyuan_vl", "paddleocr_vl", "qwen2_5", "qwen2_vl")
_WINDOWS = ("sliding_window", "attention_window", "attention_chunk_size")
_TEXT_PARTS = ("text_config", "decoder", "decoder_config", "llm_config")


def tiny_config(config_class: type[PretrainedConfig], special: dict[str, Any]) -> PretrainedConfig:
    """The default configuration with small numbers, and `special` on top, for its text part if it has one."""
    default = config_class()
    own = _those_of(default, special) if config_class.sub_configs else special  # the rest belongs to a part
    values = {**_those_of(default, _TEXT), **_rotary(default), **own}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is None:
            continue
        small = (
            {**_those_of(part, _TEXT), **_rotary(part), **special} if name in _TEXT_PARTS else _those_of(part, _OTHER)
        )
        if small:
            values[name] = {**small, **_those_of(part, {"model_type": part.model_type})}
    return config_class(**values)


def _those_of(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values that a configuration has a place for: some are computed, some cannot be read for all layers at once.

    A window that is None by default stays so: there is none.
    """
    absent = {name for name in _WINDOWS if vars(config).get(name, 0) is None}
    found = {
        name: value
        for name, value in values.items()
        if name not in absent and (name in vars(config) or _settable(config, name))
    }
    for name, value in found.items():
        default = vars(config).get(name)
        if isinstance(default, (list, tuple)) and isinstance(value, int):
            a_layer = len(default) == getattr(config, "num_hidden_layers", None)
            found[name] = value if a_layer else [value] * len(default)
    return found


def _rotary(config: PretrainedConfig) -> dict[str, Any]:
    """Sections of positions in several dimensions, cut to the width of a head."""
    default = vars(config).get("rope_parameters")
    if not isinstance(default, dict) or not ("mrope_section" in default or config.model_type.startswith(_SECTIONED)):
        return {}
    pairs = int(_HEAD_DIM * default.get("partial_rotary_factor", 1.0)) // 2
    sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return {"rope_parameters": {**default, "mrope_section": sections}}


def _settable(config: PretrainedConfig, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # noqa: BLE001 it is there, once a layer
        return False


def build(pair: Pair) -> PreTrainedModel:
    """A model in evaluation mode whose weights are large enough that attention is far from even.

    Raises CannotBuildError.
    """
    try:
        model_class, config_class = pair.classes()
        special = {**SPECIAL.get(pair.model_type, {}), **VARIANTS.get(pair.name, {})}
        config = tiny_config(config_class, special)
        for name, part in config_class.sub_configs.items():
            if part is model_class.config_class:  # as transformers' own Auto classes do
                config = getattr(config, name)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model_class(config).parameters())
        torch.manual_seed(0)
        model = model_class(config).float().eval() if count <= MOST_PARAMETERS else None
    except Exception as error:
        raise CannotBuildError(f"{type(error).__name__}: {error}") from error
    if model is None:
        raise CannotBuildError(f"{count} parameters are too many")
    _fill(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _fill(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif "bias" in name:
                parameter.normal_(0, 0.1, generator=generator)
