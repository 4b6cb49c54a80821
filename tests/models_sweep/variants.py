"""What some types need beside small numbers, and configurations that differ from the default in what is attended."""

from typing import Any

_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_FULL = {"sliding_window": None}
_ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)

SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": {}},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "gemma3": {"num_hidden_layers": 6},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n_text": {"num_kv_shared_layers": 5, "num_hidden_layers": 10},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": []},
    "glm5_next": {"num_key_value_heads": 4},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "shieldgemma2": {"num_hidden_layers": 6},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"text:{name}:decoder": {"is_decoder": True} for name in _ENCODERS},
    **{f"text:{name}:full": _FULL for name in ("doge", "mistral", "mixtral", "starcoder2")},
    **{f"image:{name}:full": _FULL for name in ("idefics2", "mistral3")},
    "text:doge:sliding": {"sliding_window": 16},
    "text:falcon:alibi": {"alibi": True},
    "text:gpt_bigcode:heads": {"multi_query": False, "num_key_value_heads": 4},
    "text:phi3:longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    },
    "text:llama:dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "text:llama:yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}
